import os
import subprocess
import sys
from pathlib import Path


def test_triton_kernels_compile_for_both_architectures(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("aot_compile.py")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == (2 * 3 + 1 + 4 * 2) * 3 + 2 + 2 * 4 + 1
    assert all(int(size) > 1000 for *_, size in lines)
