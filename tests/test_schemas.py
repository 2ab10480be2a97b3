"""Every op has its schema, its kernels and its files, under one word."""

import re
from pathlib import Path

import pytest
import torch

import pcp_mla
from pcp_mla import reference
from pcp_mla.ops import native, registry
from pcp_mla.ops.schemas import SCHEMAS

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
PACKAGE = Path(pcp_mla.__file__).parent


def test_native_libraries():
    """What `make build` made is what runs; a test run without it would test fallbacks only."""
    assert native.status["_native"] == ""
    if torch.version.cuda is None:
        assert native.status["_native_cuda"] == "this torch is a build without CUDA"
    elif torch.cuda.is_available():
        assert native.status["_native_cuda"] == ""


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema_and_kernels(op):
    """torch spells a schema as the table does, so it is read as it was meant; all devices have a kernel."""
    assert str(getattr(torch.ops.pcp_mla, op).default._schema) == f"pcp_mla::{op}{SCHEMAS[op]}"
    only_cuda = op in registry.COMPOSED.values()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pcp_mla::{op}", "CPU") != only_cuda
    if not only_cuda or native.status["_native_cuda"] == "":
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pcp_mla::{op}", "CUDA")


def registered(folder):
    """Ops that the sources of a folder have kernels for, by file."""
    return {
        path.stem: set(re.findall(r'm\.impl\("(\w+)"', path.read_text()))
        for path in sorted((CSRC / folder).glob("*.c*"))
        if path.suffix in (".cpp", ".cu")
    }


def test_kernels_are_of_ops_that_are_there():
    cpu, cuda = registered("cpu"), registered("cuda")
    composed = {*registry.COMPOSED, *registry.COMPOSED.values()}
    assert set().union(*cpu.values()) == set(SCHEMAS) - composed
    assert set().union(*cuda.values()) == set(SCHEMAS) - set(registry.COMPOSED)
    for files in (cpu, cuda):
        assert all(stem == registry.family(op) for stem, ops in files.items() for op in ops)


# Ops that users call through an object or by another op, not by a function of their own.
INTERNAL = {"plan_expand", "plan_rank_rows", "plan_shard_rows", *registry.COMPOSED.values()}


def test_one_word_an_op():
    """An op's files have one stem in every room and folder."""
    for op in (name for name in SCHEMAS if name.removesuffix("_out") not in set(SCHEMAS) - {name}):
        name, stem = registry.public_name(op), registry.family(op)
        assert callable(getattr(pcp_mla, name, None)) == (op not in INTERNAL)
        composed = op in (*registry.COMPOSED, *registry.COMPOSED.values())
        for path in (
            *(() if composed else (CSRC / "cpu" / f"{stem}.cpp",)),
            CSRC / "cuda" / f"{stem}.cu",
            CSRC / f"{stem}.h",
            *(PACKAGE / room / f"{stem}.py" for room in ("ops", "reference", "triton")),
            TESTS / f"test_{stem}.py",
        ):
            assert path.exists() or path.with_suffix("").is_dir(), path
        if op not in registry.COMPOSED.values():
            assert callable(getattr(reference, op))
        reasons = registry.availability(op)
        assert set(reasons) == set(registry.BACKENDS)
        assert reasons["reference"] == ""
        assert ("no C++ kernel" in reasons["cpu"]) == composed
