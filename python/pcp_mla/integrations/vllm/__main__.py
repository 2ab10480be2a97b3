"""``python -m pcp_mla.integrations.vllm``: what would be replaced in the vLLM that is installed here."""

from __future__ import annotations

import sys

from .report import print_report

sys.exit(print_report())
