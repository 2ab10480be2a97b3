"""Every public call with one argument replaced by what it cannot be: a result or an error of the docstring, in our words."""

import numpy as np
import pytest
import torch

from pcp_mla import (
    LatentExchange,
    MLADims,
    MLAPrefill,
    PCPMetadata,
    PCPPlanner,
    concat_k,
    cp_correct_out,
    cp_lse_a2a,
    cp_lse_ag_out_ar,
    cp_lse_ag_out_rs,
    gather_latents,
    kv_up_project,
    merge_attn_states,
    merge_n_attn_states,
    partition,
    pcp_attention,
    pcp_fused_gather,
    pcp_fused_restore,
    write_latent_cache,
)
from pcp_mla.plan.slots import PagedCache, key_chunks
from pcp_mla.testing.launch import run_distributed

SIZES = {"num_heads": 2, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 16}
DIMS = MLADims(**SIZES)
JUNK = [
    0,
    -1,
    True,
    1.5,
    "x",
    None,
    [],
    (),
    object(),
    np.zeros(3),
    torch.zeros(0),
    torch.tensor(1.0),
    torch.zeros(0, 0, 0),
    torch.zeros(3, 0, 4),
    torch.zeros(0, 2, 16),
    torch.zeros(2, 3, 4, 5, 6),
    torch.zeros(3, 20, dtype=torch.complex128),
    torch.zeros(2, 2, device="meta"),
    torch.zeros(1, 1, dtype=torch.bool),
]


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def ops():
    meta = PCPMetadata.build([9, 4], None, [True, True], world_size=2, rank=0)
    heads, tails, keys = meta.num_head_tokens, meta.num_tail_tokens, meta.num_kv_tokens
    q, k, v = torch.randn(meta.num_tokens, 2, 16), torch.randn(keys, 2, 16), torch.randn(keys, 2, 8)
    outs, lses = torch.randn(2, 6, 2, 16), torch.randn(2, 6, 2)
    halves = {"out_head": q[:heads], "out_tail": q[heads:], "lse_head": torch.zeros(heads, 2), "lse_tail": torch.zeros(tails, 2)}
    pair = {"out_a": outs[0], "lse_a": lses[0], "out_b": outs[1], "lse_b": lses[1]}
    results = {"out": torch.zeros(6, 2, 16), "lse_out": torch.zeros(6, 2)}
    corrected = {"corrected": torch.zeros(6, 2, 16), "lse_out": torch.zeros(6, 2), "seqused_k": ints(*[1] * 12).view(2, 6)}
    cache, rows, linear = torch.randn(5, 4, 20), ints(0, 1, 2), torch.nn.Linear(16, 32).requires_grad_(False)
    table = {"block_table": ints(0, 1)[None], "cu_seqlens": ints(0, 3), "starts": ints(0), "num_rows": 3}
    up = {"latents": cache, "rows": rows, "dims": DIMS, "scale": None, "k_out": None, "v_out": None}
    return {
        "fused_gather": (pcp_fused_gather, {"q": q, "k": k, "v": v, "meta": meta, "out": None}),
        "fused_restore": (pcp_fused_restore, {**halves, "meta": meta, "out": None}),
        "merge": (merge_attn_states, {**pair, **results, "row_op": ints(*[3] * 6), "out_rows": ints(*range(6)), "scale": None}),
        "merge_n": (merge_n_attn_states, {"outs": outs, "lses": lses, **results, "scale": None}),
        "correct": (cp_correct_out, {"out": outs[0], "lses": lses, "rank": 0, **corrected}),
        "write": (write_latent_cache, {"latents": torch.randn(3, 20), "cache": cache, "slot_mapping": rows.long(), "scale": None}),
        "gather": (gather_latents, {"cache": cache, "rows": rows, "scale": None, "out": None}),
        "gather by table": (gather_latents, {"cache": cache, **table}),
        "up-projection": (kv_up_project, {**up, "weight": torch.randn(32, 16)}),
        "up-projection by module": (kv_up_project, {**up, "weight": None, "linear": linear}),
        "concat": (concat_k, {"k_nope": torch.randn(3, 2, 8), "k_pe": torch.randn(3, 4), "out": None}),
        "attention": (
            pcp_attention,
            {
                "q": q,
                "k": k,
                "v": v,
                "meta": meta,
                "softmax_scale": 0.3,
                "k_pe": None,
                "kv_rows": None,
                "prev": None,
                "chunk": None,
            },
        ),
    }


def others():
    planner = {"max_requests": 4, "max_tokens": 64, "world_size": 2, "rank": 0, "block_size": 4, "dcp_world_size": 1, "dcp_rank": 0}
    tables = np.arange(20, dtype=np.int32).reshape(2, 10)
    meta = PCPPlanner(4, 64, 1, 0, block_size=4).plan([9, 4], [0, 3], [True, True], tables)
    latents = {"kv_c": torch.randn(13, 16), "k_pe": torch.randn(13, 4)}
    exchange = LatentExchange(None, 16, DIMS, torch.float32)
    layer = {
        "q": torch.randn(13, 2, 12),
        **latents,
        "kv_b_proj": torch.randn(32, 16),
        "meta": meta,
        "cache": torch.zeros(20, 4, 20),
    }
    batch = {"query_lens": [9, 4], "context_lens": [0, 3], "is_prefill": [True, True], "world_size": 2, "rank": 0}
    state = {"out": torch.randn(6, 2, 16), "lse": torch.randn(6, 2), "group": None, "lse_base": "e", "seqused_k": None}
    return {
        "dims": (MLADims, SIZES),
        "exchange": (LatentExchange, {"group": None, "max_tokens": 4, "dims": DIMS, "dtype": torch.float32}),
        "all-gather": (exchange.all_gather, {**latents, "meta": meta}),
        "layer": (MLAPrefill(DIMS, 0.3, exchange), layer),
        "prefill": (MLAPrefill, {"dims": DIMS, "softmax_scale": 0.3, "exchange": exchange}),
        "planner": (PCPPlanner, {**planner, "cp_interleave": 1, "max_kv_tokens": 64, "max_context_chunks": 2}),
        "partition": (partition, batch),
        "metadata": (PCPMetadata.build, batch),
        "cache": (PagedCache, {"block_size": 1, "dcp_world_size": 1, "dcp_rank": 0, "cp_interleave": 1}),
        "chunks": (key_chunks, {"part": partition([9, 4], [3, 0], world_size=1, rank=0), "workspace_tokens": 8}),
        "launch": (run_distributed, {"world_size": 0, "fn": print}),
        "a2a": (cp_lse_a2a, state),
        "reduce-scatter": (cp_lse_ag_out_rs, state),
        "all-reduce": (cp_lse_ag_out_ar, state),
    }


def outcome(function, arguments):
    """What was raised of what the docstrings name."""
    try:
        function(**arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        return str(error)
    return ""


def try_all(function, good, skipped=()):
    for name in good:
        for junk in JUNK if name not in skipped else ():
            message = outcome(function, {**good, name: junk})
            # "op: argument must ...", not what Python or torch say of what they stumble over.
            op, _, words = message.partition(": ")
            assert bool(words) == bool(message), (name, junk, message)
            assert op.replace("_", "").replace(".", "").isalnum() or not message, (name, junk, message)


@pytest.mark.parametrize("backend", ["auto", "cpu", "triton", "reference"])
@pytest.mark.parametrize("op", ops())
def test_ops(op, backend):
    function, good = ops()[op]
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("Triton takes CUDA tensors here")
    if backend == "cpu" and op in ("attention", "up-projection", "up-projection by module"):
        pytest.skip("it has no C++ kernel")
    backend = "torch" if op == "attention" and backend == "reference" else backend
    function(**good, backend=backend)
    try_all(lambda **arguments: function(**arguments, backend=backend), good)


@pytest.mark.parametrize("name", others())
def test_the_rest(name):
    function, good = others()[name]
    if name != "launch":
        function(**good)
    lists = ("query_lens", "context_lens", "is_prefill")  # NumPy says what is no list
    try_all(function, good, skipped=("part", "fn", "exchange", *lists))


@pytest.mark.parametrize("value", [0, -1, True, 2.0, None])
@pytest.mark.parametrize("name", SIZES)
def test_widths_of_a_layer(name, value):
    if (name, value) == ("qk_rope_head_dim", 0) and not isinstance(value, bool):
        MLADims(**{**SIZES, name: value})
        return
    kind, words = (
        (ValueError, "must be at least") if value in (0, -1) and not isinstance(value, bool) else (TypeError, "must be an int")
    )
    with pytest.raises(kind, match=f"^MLADims: {name} {words}"):
        MLADims(**{**SIZES, name: value})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: LatentExchange(None, -1, DIMS, torch.float32),
            ValueError,
            "LatentExchange: max_tokens must be at least 0, got -1",
        ),
        (lambda: LatentExchange(None, True, DIMS, torch.float32), TypeError, "LatentExchange: max_tokens must be an int, got True"),
        (lambda: LatentExchange(None, 4, None, torch.float32), TypeError, "LatentExchange: dims must be MLADims, got NoneType"),
        (lambda: PagedCache(block_size=0), ValueError, "PagedCache: block_size must be at least 1, got 0"),
        (lambda: PagedCache(dcp_world_size=2, dcp_rank=2), ValueError, r"PagedCache: dcp_rank must be in 0\.\.1, got 2"),
        (lambda: run_distributed(0, print), ValueError, "run_distributed: world_size must be at least 1, got 0"),
        (lambda: run_distributed(1.0, print), TypeError, "run_distributed: world_size must be an int, got 1.0"),
        (lambda: gather_by_table(-1), ValueError, "gather_latents: num_rows must be at least 0, got -1"),
        (lambda: gather_by_table(True), TypeError, "gather_latents: num_rows must be an int, got True"),
        (lambda: gather_by_table(None), ValueError, "gather_latents: num_rows or out must be given with block_table"),
        (lambda: MLAPrefill(None, 0.3, None), TypeError, "MLAPrefill: dims must be MLADims, got NoneType"),
    ],
)
def test_counts(call, error, words):
    with pytest.raises(error, match=f"^{words}"):
        call()


def gather_by_table(num_rows):
    return gather_latents(torch.zeros(2, 4, 8), block_table=ints(0)[None], cu_seqlens=ints(0, 3), num_rows=num_rows)


def test_no_rows_by_a_table():
    assert gather_by_table(0).shape == (0, 8)
