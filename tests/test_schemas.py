"""The op definitions of the native library and of a pure Python installation must not drift apart."""

import re
from pathlib import Path

import pytest
import torch

import pcp_mla
from pcp_mla import reference
from pcp_mla.ops import native, registry

CSRC = Path(__file__).parent.parent / "csrc"


def test_native_libraries():
    """What `make build` made is what runs; a test run without it would test fallbacks only."""
    assert native.status["_native"] == ""
    if torch.version.cuda is None:
        assert native.status["_native_cuda"] == "this torch is a build without CUDA"
    elif torch.cuda.is_available():
        assert native.status["_native_cuda"] == ""


@pytest.mark.parametrize("op", [*registry.SCHEMAS, *registry.PYTHON_SCHEMAS])
def test_python_and_native_schemas_are_equal(op):
    registered = str(getattr(torch.ops.pcp_mla, op).default._schema)
    assert registered == f"pcp_mla::{op}{(registry.SCHEMAS | registry.PYTHON_SCHEMAS)[op]}"


# Ops that users call through an object or by another op, not by a function of their own.
INTERNAL = {"plan_expand", *registry.COMPOSED.values()}


def test_every_op_has_all_its_parts():
    defined = set(re.findall(r'm\.def\(\s*"(\w+)\(', (CSRC / "ops.cpp").read_text()))
    assert defined == set(registry.SCHEMAS)
    for op in (*(defined - set(registry.COMPOSED.values())), *registry.PYTHON_SCHEMAS):
        assert callable(getattr(reference, op))
    for op in (name for name in defined if name.removesuffix("_out") not in defined):
        name, stem = op if op in registry.FAMILIES else f"pcp_{op}", registry.family(op)
        assert callable(getattr(pcp_mla, name, None)) == (op not in INTERNAL)
        composed = op in (*registry.COMPOSED, *registry.COMPOSED.values())
        for path in (
            *(() if composed else (CSRC / "cpu" / f"{stem}.cpp",)),
            CSRC / "cuda" / f"{stem}.cu",
            Path(pcp_mla.__file__).parent / "triton" / f"{stem}.py",
        ):
            assert path.exists(), path
        reasons = registry.availability(op)
        assert set(reasons) == set(registry.BACKENDS)
        assert reasons["reference"] == ""
        assert ("no C++ kernel" in reasons["cpu"]) == composed
