import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).resolve().parent
KERNELS = TESTS.parent / "python" / "pcp_mla" / "triton"
# What each kernel is compiled for beside "sm_80", "sm_90" and "ones sm_90" of a type; float8 results need sm_90.
TYPES = {
    "attention_kernel": ["*bf16 False", "*bf16 True", "*fp16 False", "*fp16 True"],
    "concat_k_kernel": ["*bf16", "*u8"],
    "fused_gather_kernel": ["*bf16", "*fp32", "*u8"],
    "fused_restore_kernel": ["*bf16", "*fp32", "*u8"],
    "kv_up_project_kernel": ["*bf16", "*fp32"],
    "latent_cache_kernel": ["*bf16", "*u8"],
    "merge_states_kernel": ["*bf16", "*fp32"],
    "plan_expand_kernel": ["indices"],
    "plan_rank_rows_kernel": ["indices"],
    "plan_shard_rows_kernel": ["indices"],
}


def expected(kernel):
    forms = [f"{data} {gpu}" for data in TYPES[kernel] for gpu in ("sm_80", "sm_90")]
    forms += ["ones sm_90"] if kernel == "attention_kernel" else [f"{data} ones sm_90" for data in TYPES[kernel]]
    if kernel == "kv_up_project_kernel":
        forms += ["*bf16 float8 sm_80", "*bf16 float8 sm_90"]
    return forms + [f"{data} float8 sm_90" for data in TYPES[kernel] if kernel == "merge_states_kernel"]


def test_triton_kernels_compile_for_both_architectures(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = TESTS / "aot_compile.py"
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    compiled = defaultdict(list)
    for line in done.stdout.splitlines():
        kernel, form, size = re.fullmatch(r"(\w+) (.+) (\d+)", line).groups()
        compiled[kernel].append(form)
        assert int(size) > 10_000
    there = {name for file in KERNELS.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)}
    assert set(compiled) == set(TYPES) == there
    for kernel, forms in compiled.items():
        assert sorted(forms) == sorted(expected(kernel)), kernel
