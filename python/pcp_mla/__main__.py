"""``python -m pcp_mla``."""

import sys

from .cli import main

sys.exit(main())
