"""How libraries are called: arguments by name in any order, what they lack composed; tried on ops that stand in for them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pcp_mla import MLADims, MLAPrefill, PCPMetadata, PCPPlanner, pcp_attention, reference
from pcp_mla.ops.attention import call, libraries, support
from pcp_mla.ops.attention.libraries import arguments, of_function, of_op
from pcp_mla.ops.attention.support import SUPPORT

SCALE = 0.3
LIBRARY = torch.library.Library("pcp_mla_test", "FRAGMENT")
# Versions of a library: another order, other names, some that insist on things, one without lengths of its own; and a function of
# Python, which gives an LSE on request.
SCHEMAS = {
    "fa3": (
        "(Tensor v, Tensor k, Tensor q, Tensor? q_v, Tensor? out, Tensor? seqused_q, Tensor? seqused_k, Tensor? cu_seqlens_k, "
        "Tensor? cu_seqlens_q, int? max_seqlen_k, int? max_seqlen_q, float softmax_scale, int sm_margin, bool is_causal, "
        "int window_size_left, int window_size_right, int attention_chunk, float softcap, bool is_rotary_interleaved, "
        "int cp_world_size, int cp_rank, int num_splits=0) -> Tensor[]"
    ),
    "fa2": (
        "(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, int max_q, int max_k, float dropout_p, "
        "bool is_causal, bool return_debug_mask, *, float? scale=None, Tensor? seqused_k=None) -> (Tensor, Tensor)"
    ),
    "old": (
        "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, "
        "float p_dropout, float softmax_scale, bool zero_tensors, bool causal, int window_size_left, int window_size_right, "
        "float softcap, bool return_softmax) -> (Tensor, Tensor)"
    ),
}


NAMES = [*SCHEMAS, "fa4"]


def compute(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, causal, max_q, max_k):
    assert all(x.isfinite().all() for x in (k, v))  # they read whole tiles
    assert max_q >= cu_seqlens_q.diff().max()  # and make as many as the longest row has
    assert max_k >= seqused_k.max()
    out, lse = q.new_full((*q.shape[:2], v.shape[2]), torch.nan), torch.full(q.shape[:2], torch.nan)
    reference.attention(q, k, v, None, None, cu_seqlens_q, cu_seqlens_k, seqused_k, None, None, scale, causal, out, lse)
    return out, lse.T.contiguous()


def fa3(
    v, k, q, q_v, out, seqused_q, seqused_k, cu_k, cu_q, max_k, max_q, scale, sm_margin, causal,
    left, right, chunk, softcap, interleaved, cp_world_size, cp_rank, num_splits=0,
):  # fmt: skip
    assert (q_v, seqused_q, sm_margin, num_splits) == (None, None, 0, 1)
    assert (left, right, chunk, softcap) == (-1, -1, 0, 0.0)  # no window, no limit
    assert (interleaved, cp_world_size, cp_rank) == (True, 1, 0)
    got, lse = compute(q, k, v, cu_q, cu_k, seqused_k, scale, causal, max_q, max_k)
    return [got if out is None else out.copy_(got), lse]


def fa2(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None, seqused_k=None):
    assert (dropout, debug) == (0.0, False)
    assert q.shape[2] == v.shape[2]
    out, lse = compute(q, k, v, cu_q, cu_k, seqused_k, scale, causal, max_q, max_k)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)


def old(q, k, v, cu_q, cu_k, max_q, max_k, dropout, scale, zero, causal, left, right, softcap, return_softmax):
    assert (dropout, zero, return_softmax) == (0.0, False, False)
    assert (left, right, softcap) == (-1, -1, 0.0)
    out, lse = compute(q, k, v, cu_q, cu_k, cu_k.diff(), scale, causal, max_q, max_k)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)


def fa4(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_k=None, softmax_scale=None,
    causal=False, window_size=(None, None), num_splits=0, return_lse=False,
):  # fmt: skip
    assert (window_size, num_splits) == ((None, None), 1)
    out, lse = compute(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, softmax_scale, causal, max_seqlen_q, max_seqlen_k)
    return out, lse if return_lse else None


for name, function in (("fa3", fa3), ("fa2", fa2), ("old", old)):
    LIBRARY.define(name + SCHEMAS[name])
    LIBRARY.impl(name, function, "CPU")


@pytest.fixture
def library(monkeypatch):
    """Put a stand-in in the place of fa2."""

    def use(name):
        if name == "fa4":
            found = of_function(fa4)
        else:
            found = replace(of_op(getattr(torch.ops.pcp_mla_test, name).default), flash2=name != "fa3")
        monkeypatch.setattr(call, "find", lambda backend: found)
        monkeypatch.setattr(support, "missing", lambda backend, device: "")

    return use


def batch(workspace=None):
    planner = PCPPlanner(8, 400, 2, 1, device="cpu")
    return planner.plan([21, 1, 9, 2], [30, 5, 0, 12], [True, False, True, True], workspace_tokens=workspace)


def inputs(meta):
    """q, and K and V with three rows of NaN behind the last key."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((meta.num_tokens, 3, 24), (meta.num_kv_tokens + 3, 3, 24), (meta.num_kv_tokens + 3, 3, 16))
    q, k, v = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    k[meta.num_kv_tokens :] = v[meta.num_kv_tokens :] = torch.nan
    return q, k, v


def attend(q, k, v, meta, **options):
    return pcp_attention(q, k, v, meta, softmax_scale=SCALE, return_lse=True, **options)


def same(got, wanted):
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def shifted(x):
    """The same numbers two bytes behind a multiple of 16, rows apart by an odd number of them."""
    room = torch.full((x.shape[0] * (x.shape[1] * x.shape[2] + 3) + 8,), torch.nan, dtype=x.dtype)
    first = 1 + -(room.data_ptr() // 2) % 8
    view = room[first:].as_strided(x.shape, (x.shape[1] * x.shape[2] + 3, x.shape[2], 1))
    return view.copy_(x)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_library_cannot_reach_is_copied(library, name, monkeypatch):
    library(name)
    meta = batch()
    q, k, v = (x[: meta.num_kv_tokens].clone() for x in inputs(meta))
    wanted, seen = attend(q, k, v, meta, backend="fa2"), []
    monkeypatch.setattr(libraries, "arguments", lambda library, values: seen.append(values) or arguments(library, values))
    out = shifted(torch.zeros(len(q), 3, 16).bfloat16()), torch.empty(len(q), 3)
    got = attend(shifted(q), shifted(k), shifted(v), meta, backend="fa2", out=out)
    assert got[0] is out[0]
    same(got, wanted)
    for values in seen:
        for x in [values[name] for name in ("q", "k", "v", "out") if values.get(name) is not None]:
            assert x.data_ptr() % 16 == 0
            assert all(stride * 2 % 16 == 0 for stride in x.stride()[:2])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("merged", [False, True])
def test_pads_of_q_are_not_written(library, name, merged):
    if merged and name == "old":
        pytest.skip("takes no earlier result")
    library(name)
    meta = PCPMetadata.build([7, 3], [0, 4], [True, True], world_size=4, rank=3)
    assert meta.num_tokens < meta.num_tokens_padded
    q, k, v = inputs(meta)
    pads = torch.full_like(q[:1], torch.nan).expand(meta.num_tokens_padded - len(q), -1, -1)
    prev = [torch.randn(len(q), 3, 16).bfloat16(), torch.randn(len(q), 3)] if merged else None
    wanted = attend(q, k, v, meta, backend="fa2", prev=None if prev is None else tuple(prev))
    if prev is not None:
        prev = tuple(torch.cat([x, x.new_full((len(pads), *x.shape[1:]), torch.nan)]) for x in prev)
    out, lse = torch.full((meta.num_tokens_padded, 3, 16), 7.0).bfloat16(), torch.full((meta.num_tokens_padded, 3), 7.0)
    for options in ({"out": (out, lse)}, {}):
        got = attend(torch.cat([q, pads]), k, v, meta, backend="fa2", prev=prev, **options)
        same([x[: len(q)] for x in got], wanted)
    assert out[len(q) :].eq(7).all()
    assert lse[len(q) :].eq(7).all()


@pytest.mark.parametrize("name", NAMES)
def test_arguments_find_their_places(library, name):
    library(name)
    meta = batch()
    q, k, v = inputs(meta)
    wanted = attend(q, k, v, meta, backend="torch")
    same(attend(q, k, v, meta, backend="fa2"), wanted)
    same(attend(q, k[..., :16], v, meta, k_pe=k[:, 0, 16:], backend="fa2"),
         attend(q, k[..., :16], v, meta, k_pe=k[:, 0, 16:], backend="torch"))  # fmt: skip
    given = torch.full_like(wanted[0], torch.nan), torch.full_like(wanted[1], torch.nan)
    got = attend(q, k, v, meta, out=given, backend="fa2")
    assert (got[0] is given[0], got[1] is given[1]) == (True, True)
    same(given, wanted)
    assert torch.equal(pcp_attention(q, k, v, meta, softmax_scale=SCALE, backend="fa2"), wanted[0])


@pytest.mark.parametrize("name", ["fa3", "fa2", "fa4"])
def test_rows_without_keys_stay_in_place(library, name):
    """As they are, and not made 0 by a merge of nothing with nothing."""
    library(name)
    meta = batch(workspace=35)
    q, k, v = inputs(meta)
    chunk = next(chunk for chunk in meta.key_chunks if (chunk.seqused_k == 0).any())
    out, lse = torch.full((len(q), 3, 16), 7.0).bfloat16(), torch.full((len(q), 3), -torch.inf)
    attend(q, k, v, meta, chunk=chunk, prev=(out, lse), out=(out, lse), backend="fa2")
    sees = torch.repeat_interleave(chunk.seqused_k > 0, meta.cu_seqlens_q.diff())
    assert 0 < sees.sum() < len(q)
    assert out[~sees].eq(7).all()
    assert lse[~sees].eq(-torch.inf).all()
    alone = attend(q, k, v, meta, chunk=chunk, backend="torch")
    same([x[sees] for x in (out, lse)], [x[sees] for x in alone])


@pytest.mark.parametrize("name", ["fa3", "fa2", "fa4"])
def test_earlier_results_are_merged(library, name):
    library(name)
    meta = batch(workspace=35)
    q, k, v = inputs(meta)
    assert len(meta.key_chunks) == 3
    for in_place in (False, True):
        states = []
        for backend in ("fa2", "torch"):
            state = attend(q, k, v, meta, chunk=meta.key_chunks[-1], backend=backend)
            for chunk in meta.key_chunks[:-1]:
                out = state if in_place else None
                state = attend(q, k, v, meta, chunk=chunk, prev=state, out=out, backend=backend)
            states.append(state)
        assert torch.allclose(states[0][0], states[1][0], atol=2**-6)
        assert torch.allclose(states[0][1], states[1][1], rtol=1e-5)


def test_no_queries_and_no_keys(library):
    """FlashAttention refuses empty tensors."""
    library("fa2")
    meta = PCPMetadata.build([0, 0], [0, 5], world_size=2, rank=0)
    q, k, v = (torch.zeros(n, 2, 24, dtype=torch.bfloat16) for n in (0, meta.num_kv_tokens, meta.num_kv_tokens))
    out, lse = attend(q, k, v, meta, backend="fa2")
    assert (out.shape, lse.shape) == ((0, 2, 24), (0, 2))


def test_a_library_without_lengths_cannot_take_chunks(library):
    library("old")
    meta = batch(workspace=35)
    q, k, v = inputs(meta)
    with pytest.raises(NotImplementedError, match="chunk and prev need seqused_k, which this version of fa2 lacks; triton does"):
        attend(q, k, v, meta, chunk=meta.key_chunks[0], backend="fa2")
    prev = torch.randn(len(q), 3, 16).bfloat16(), torch.randn(len(q), 3)
    with pytest.raises(NotImplementedError, match="chunk and prev need seqused_k, which this version of fa2 lacks; triton does"):
        attend(q, k, v, meta, prev=prev, backend="fa2")


@pytest.mark.parametrize("name", ["fa3", "fa2", "fa4"])
@pytest.mark.parametrize("in_place", [False, True])
def test_rows_without_keys_have_no_lse(library, name, in_place):
    """FlashAttention 2 gives +inf there."""
    library(name)
    meta = batch(workspace=35)
    q, k, v = inputs(meta)
    for chunk in meta.key_chunks:
        out = (torch.full((len(q), 3, 16), torch.nan).bfloat16(), torch.full((len(q), 3), torch.nan)) if in_place else None
        got, wanted = (
            attend(q, k, v, meta, chunk=chunk, out=out, backend="fa2"),
            attend(q, k, v, meta, chunk=chunk, backend="torch"),
        )
        same(got, wanted)
    assert any((chunk.seqused_k == 0).any() for chunk in meta.key_chunks)
    assert any((attend(q, k, v, meta, chunk=chunk, backend="fa2")[1] == -torch.inf).any() for chunk in meta.key_chunks)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("extra", [0, 2])
def test_given_results_of_any_layout(library, name, padded, extra):
    """A plan's pads, q with them or without, and an ``out`` with gaps: each token's row is written, and nothing else."""
    library(name)
    planner = PCPPlanner(8, 400, 2, 1, device="cpu")
    sizes = {"num_tokens_padded": 40, "num_kv_tokens_padded": 90} if padded else {}
    meta = planner.plan([21, 1, 9, 2], [30, 5, 0, 12], [True, False, True, True], **sizes)
    count = meta.num_tokens
    rows = meta.num_tokens_padded if extra else count
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows, 3, 24, generator=generator).bfloat16()
    k, v = (torch.randn(meta.num_kv_tokens, 3, width, generator=generator).bfloat16() for width in (24, 16))
    wanted = attend(q, k, v, meta, backend="torch")
    fresh = attend(q, k, v, meta, backend="fa2")
    assert (fresh[0].shape, fresh[1].shape) == ((rows, 3, 16), (rows, 3))
    same([x[:count] for x in fresh], [x[:count] for x in wanted])
    for gap in (0, 8):
        whole, lses = torch.full((rows, 3, 16 + gap), 7.0).bfloat16(), torch.full((3, rows), 7.0)
        lse = lses.T if gap else lses.view(rows, 3)
        given = (whole[..., :16], lse)
        got = attend(q, k, v, meta, out=given, backend="fa2")
        assert got[0] is given[0]
        assert got[1] is given[1]
        same([x[:count] for x in got], [x[:count] for x in wanted])
        assert whole[..., 16:].eq(7).all()
        if name == "old" or not padded:  # the others' stand-ins write every row of a padded plan
            assert all(x[count:].eq(7).all() for x in got)


def test_a_library_that_cannot_be_called_is_refused_first(monkeypatch):
    """Before the gather for two calls, and in a layer before the exchange."""
    LIBRARY.define("demanding(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int magic) -> Tensor[]")
    found = of_op(torch.ops.pcp_mla_test.demanding.default)
    monkeypatch.setattr(call, "find", lambda backend: found)
    monkeypatch.setattr(support, "missing", lambda backend, device: "")
    monkeypatch.setattr(call, "pcp_fused_gather", lambda *args: pytest.fail("gathered"))
    meta = batch()
    with pytest.raises(NotImplementedError, match="this version of the library"):
        attend(*inputs(meta), meta, backend="fa2")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_layer_asks_its_library_before_the_exchange(library, chunked):
    """Key chunks need a library with lengths of its own; one without must not exchange, write or attend."""

    class NoExchange:
        def publish(self, *_, **__):
            raise InterruptedError

    library("old")
    dims = MLADims(num_heads=3, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, kv_lora_rank=32)
    layer = MLAPrefill(dims, SCALE, NoExchange(), "fa2")
    meta = PCPPlanner(1, 8, 1, 0, block_size=4).plan([6], [10], None, [[1, 0, 2, 3]], workspace_tokens=8 if chunked else None)
    shapes = ((6, 3, 24), (6, 32), (6, 8), (96, 32), (4, 4, 40))
    q, kv_c, k_pe, weight, cache = (torch.randn(shape).bfloat16() for shape in shapes)
    before = cache.clone()
    words = "chunk and prev need seqused_k, which this version of fa2 lacks"
    with pytest.raises(NotImplementedError if chunked else InterruptedError, match=words if chunked else None):
        layer(q, kv_c, k_pe, weight, meta, cache)
    assert torch.equal(cache, before)


def test_unknown_arguments_are_named():
    LIBRARY.define("strange(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, int magic) -> Tensor[]")
    values = dict.fromkeys(("q", "k", "v", "cu_seqlens_q"))
    with pytest.raises(NotImplementedError, match="wants magic, which is not known here"):
        arguments(of_op(torch.ops.pcp_mla_test.strange.default), values)
    with pytest.raises(NotImplementedError, match="has no argument seqused_k"):
        arguments(of_op(torch.ops.pcp_mla_test.strange.default), values | {"seqused_k": None})


def test_functions_of_python():
    def varlen(q, k, v, cu_seqlens_q=None, causal=False, num_splits=0, return_lse=False):
        return None

    given = arguments(of_function(varlen), {"q": 1, "k": 2, "v": 3, "causal": True, "max_seqlen_q": 9})
    assert given == {"q": 1, "k": 2, "v": 3, "causal": True, "num_splits": 1, "return_lse": True}


def test_every_backend_has_a_reason_or_is_there():
    reasons = support.availability()
    assert set(reasons) == set(SUPPORT)
    assert reasons["torch"] == ""
    if not torch.cuda.is_available():
        assert reasons["fa3"] == "no CUDA GPU is visible to torch"


def test_the_table_of_the_page_is_the_table_of_the_code():
    page = (Path(__file__).parent.parent / "docs" / "attention.md").read_text()
    for name, supported in SUPPORT.items():
        cells = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |")).split("|")
        assert supported.words in cells[3]
        assert ("yes" in cells[4], "yes" in cells[5]) == (supported.kv_rows, supported.k_pe)


def test_a_loaded_library_is_found_without_imports(monkeypatch):
    """An engine has loaded its own; importing others would take seconds."""
    LIBRARY.define("fwd(Tensor q, Tensor k, Tensor v, Tensor? seqused_k) -> Tensor[]")
    monkeypatch.setattr(libraries, "_FA3", {"pcp_mla_elsewhere": "elsewhere", "pcp_mla_test": "here"})
    monkeypatch.setattr(libraries.importlib, "import_module", None)
    found = libraries.LIBRARIES["fa3"]()
    assert found.parameters == {"q": False, "k": False, "v": False, "seqused_k": True}


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(libraries, "_FA3", {"pcp_mla_elsewhere": "elsewhere"})
    words = "no library (elsewhere: No module named 'elsewhere'): pip install fa3-fwd"
    assert libraries.LIBRARIES["fa3"]() == words
