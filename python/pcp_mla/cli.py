"""``python -m pcp_mla``: env, demo, eval, vllm."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import torch

from . import __version__, demo, evaluation
from .exchange.choose import VARIABLE, asked
from .exchange.peer_mailbox import refusal
from .integrations.vllm.report import print_report
from .ops import native
from .ops.attention import support
from .ops.registry import COMPOSED, availability, public_name
from .ops.schemas import SCHEMAS


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "not on PATH"
    lines = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.strip().splitlines()
    return f"{lines[-1] if lines else 'no version'} ({path})"


def _exchange() -> str:
    """How latents would travel, as far as one process can tell."""
    count, way = torch.cuda.device_count(), asked()
    if way:
        return f"{way} ({VARIABLE})"
    reason = refusal(torch.device("cuda" if count else "cpu"), torch.bfloat16, count)
    apart = [(i, j) for i in range(count) for j in range(count) if i != j and not torch.cuda.can_device_access_peer(i, j)]
    if apart and not reason:
        reason = f"GPU {apart[0][0]} does not see the memory of GPU {apart[0][1]}"
    return f"nccl or gloo: {reason}" if reason else "peers, between processes of this host"


def print_env() -> int:
    """What a bug report needs: versions, GPUs, native libraries, and which backends each op has here."""
    print(f"pcp-mla      {__version__} ({native.PACKAGE})")
    print(f"python       {platform.python_version()} on {platform.platform()}")
    print(f"torch        {torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    print(f"numpy        {np.__version__}")
    for package in ("triton", "transformers", "flash-attn", "fa3-fwd", "vllm"):
        print(f"{package:12} {_version(package)}")
    print(f"nvcc         {_nvcc()}")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        print(f"gpu {i}        {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print("gpu          none visible to torch")
    for name, reason in native.status.items():
        print(f"{name:12} {reason or 'loaded'}")
    print(f"exchange     {_exchange()}")
    print()
    names = [op for op in SCHEMAS if not op.endswith("_out") and op not in (*COMPOSED.values(), "attention")]
    ops = {public_name(op): availability(op) for op in names} | {"pcp_attention": support.availability()}
    for name, backends in ops.items():
        print(name)
        for backend, reason in backends.items():
            print(f"  {backend:10} {'no: ' + reason if reason else 'yes'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pcp_mla", description="Prefill context parallelism for MLA models")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="print versions, GPUs, native libraries and backends")
    demo.add_arguments(commands.add_parser("demo", help="run a DeepSeek model stock and under PCP, and compare the logits"))
    evaluation.add_arguments(commands.add_parser("eval", help="solve word problems by a trained model, stock and under PCP"))
    commands.add_parser("vllm", help="print what would be replaced in the vLLM that is installed here")
    args = parser.parse_args(argv)
    if args.command == "env":
        return print_env()
    if args.command == "vllm":
        return print_report()
    return demo.run(args) if args.command == "demo" else evaluation.run(args)


if __name__ == "__main__":
    sys.exit(main())
