"""Geometries of MLA models: what they are called on the command line, and those that ``--geometry all`` stands for."""

from __future__ import annotations

from pcp_mla.plan.dims import MLADims

DEEPSEEK = MLADims(16, 128, 64, 128, 512)
# DeepSeek's, GLM-4.7-Flash's, narrow K, without rope, MiniCPM3's; 5 heads of GLM are an odd number of halves of a kernel's tile.
ALL = (
    "128,64,128,512x16",
    "128,64,128,512x96",
    "192,64,256,512x20",
    "192,64,256,512x5",
    "64,64,128,512x12",
    "256,0,256,512x24",
    "64,32,64,256x40",
)


def parse(text: str) -> MLADims:
    """``nope,rope,v,rank`` and, behind an ``x``, heads (16).

    Raises:
        ValueError: that is not what it is.
    """
    widths, given, heads = text.partition("x")
    try:
        nope, rope, v, rank = map(int, widths.split(","))
        return MLADims(int(heads) if given else 16, nope, rope, v, rank)
    except ValueError as error:
        raise ValueError(f"a geometry must be nope,rope,v,rank or nope,rope,v,rankxheads, got {text!r}: {error}") from error


def fields(dims: MLADims) -> dict[str, int]:
    """A result's, which say what it is of."""
    return {
        "heads": dims.num_heads,
        "nope": dims.qk_nope_head_dim,
        "rope": dims.qk_rope_head_dim,
        "v": dims.v_head_dim,
        "rank": dims.kv_lora_rank,
    }


def name(result: dict[str, int]) -> str:
    """Of a result's geometry, without heads; nothing where it says none, and DeepSeek's is meant."""
    if "nope" not in result:
        return ""
    return f"{result['nope']} + {result['rope']} / {result['v']}, rank {result['rank']}"
