"""A step's prefill rows, as vLLM's prefill context parallelism lays them out: which keys each query sees, over all calls."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pcp_mla.integrations.vllm import parts, prefill
from pcp_mla.integrations.vllm.prefill import FIELD, LayerPrefill
from pcp_mla.integrations.vllm.rows import host_rows, step_rows
from pcp_mla.ops.attention.call import run_rows

ORDERS = ("starts at 0 last", "by request", "any")


def rows_of_rank(requests, world, rank, order, shuffle):
    """(request, first position, tokens) of each row of a rank: chunks ``rank`` and ``2 * world - 1 - rank`` of each request's new
    tokens, as vLLM 0.26 orders them, as 0.33 does, or in any order."""
    rows = []
    for request, (length, context) in enumerate(requests):
        chunk = -(-length // (2 * world))
        for number in (rank, 2 * world - 1 - rank):
            tokens = min(chunk, length - number * chunk)
            if tokens > 0:
                rows.append((request, context + number * chunk, tokens))
    if order == "starts at 0 last":
        rows.sort(key=lambda row: row[1] == 0)
    elif order == "any":
        shuffle.shuffle(rows)
    return rows


@st.composite
def steps(draw, max_requests=5, max_len=45, max_context=60):
    world = draw(st.integers(1, 4))
    lengths = st.one_of(st.sampled_from([1, 2 * world - 1, 2 * world, 2 * world + 1]), st.integers(1, max_len))
    contexts = st.one_of(st.just(0), st.integers(0, max_context))
    requests = draw(st.lists(st.tuples(lengths, contexts), min_size=1, max_size=max_requests))
    rank = draw(st.integers(0, world - 1))
    rows = rows_of_rank(requests, world, rank, draw(st.sampled_from(ORDERS)), draw(st.randoms()))
    assume(rows)  # a rank may have none
    numbers = draw(st.permutations(range(10, 10 + len(requests))))  # vLLM's places of requests are in no order
    return {
        "rows": [(numbers[request], first, tokens) for request, first, tokens in rows],
        "lengths": {numbers[request]: length + context for request, (length, context) in enumerate(requests)},
        "block_size": draw(st.sampled_from([1, 4, 16])),
        "limit": draw(st.sampled_from([1, 7, 16, 50, 10_000])),
        "seed": draw(st.integers(0, 1000)),
    }


def tables_of(step):
    """A block table for each request, all blocks in random places and none of two requests."""
    size = step["block_size"]
    counts = {request: -(-length // size) for request, length in step["lengths"].items()}
    blocks = np.random.default_rng(step["seed"]).permutation(sum(counts.values()) + 3)
    tables, at = {}, 0
    for request, count in counts.items():
        tables[request], at = blocks[at : at + count], at + count
    return tables, len(blocks)


def plan(step):
    """The step's rows, their block table being as wide as vLLM's, with anything behind a request's blocks."""
    tables, _ = tables_of(step)
    wide = np.full((len(step["rows"]), max(map(len, tables.values())) + 2), 99_999, np.int32)
    for row, (request, _, _) in enumerate(step["rows"]):
        wide[row, : len(tables[request])] = tables[request]
    tokens = np.array([tokens for _, _, tokens in step["rows"]], np.int32)
    ends = np.array([first + tokens for _, first, tokens in step["rows"]], np.int32)
    host = host_rows(tokens, ends, np.array([request for request, _, _ in step["rows"]]), step["limit"])
    return host, step_rows(host, len(tokens), torch.from_numpy(wide), step["block_size"])


def slot(table, position, size):
    return int(table[position // size]) * size + position % size


@settings(max_examples=200, deadline=None)
@given(step=steps())
def test_each_query_sees_its_keys_once(step):
    host, planned = plan(step)
    tables, _ = tables_of(step)
    kv_rows = planned.kv_rows.tolist()
    # every key once: of each request those up to the end of its last row here
    ends = {}
    for request, first, tokens in step["rows"]:
        ends[request] = max(ends.get(request, 0), first + tokens)
    wanted = sorted(slot(tables[request], position, step["block_size"]) for request, end in ends.items() for position in range(end))
    assert sorted(kv_rows) == wanted
    assert host.num_keys == len(wanted)

    seen = [[] for row in step["rows"] for _ in range(row[2])]
    for number, chunk in enumerate(planned.chunks):
        keys = kv_rows[chunk.first : chunk.first + chunk.num_keys]
        rows, last = chunk.rows, number == len(planned.chunks) - 1
        assert rows.causal is last
        assert rows.cu_seqlens_q.tolist() == np.cumsum([0, *(tokens for _, _, tokens in step["rows"])]).tolist()
        assert rows.max_seqlen_q == max(tokens for _, _, tokens in step["rows"])
        assert rows.max_seqlen_k == max(rows.seqused_k.tolist())
        assert int(rows.cu_seqlens_k[-1]) == chunk.num_keys == len(keys)
        at = 0
        for row, (_, _, tokens) in enumerate(step["rows"]):
            first, used = int(rows.cu_seqlens_k[row]), int(rows.seqused_k[row])
            assert first >= 0
            assert first + used <= chunk.num_keys
            for query in range(tokens):
                sees = used - (tokens - 1 - query) if rows.causal else used
                seen[at + query] += keys[first : first + sees]
            at += tokens
    queries = [(request, first + number) for request, first, tokens in step["rows"] for number in range(tokens)]
    for (request, position), slots in zip(queries, seen, strict=True):
        assert slots == [slot(tables[request], p, step["block_size"]) for p in range(position + 1)]


@settings(max_examples=200, deadline=None)
@given(step=steps())
def test_calls_keep_to_the_limit(step):
    host, planned = plan(step)
    starts = {}
    for request, first, _ in step["rows"]:
        starts[request] = min(starts.get(request, first), first)
    context = sum(starts.values())
    *before, new = planned.chunks
    if host.num_keys <= step["limit"] or not context:
        assert not before
    else:  # full ones, and one with the rest
        assert [chunk.num_keys for chunk in before[:-1]] == [step["limit"]] * (-(-context // step["limit"]) - 1)
        assert sum(chunk.num_keys for chunk in before) == context
        assert new.num_keys == host.num_keys - context
    assert [chunk.first for chunk in planned.chunks] == np.cumsum([0, *(chunk.num_keys for chunk in before)]).tolist()


def test_numbers_of_a_step():
    """Two requests on rank 0 of 2 as vLLM 0.26 has them: the tails first, then the heads, which start at 0."""
    host = host_rows(np.array([2, 3, 2, 3]), np.array([8, 12, 2, 3]), np.array([5, 4, 5, 4]), 100)
    table = torch.tensor([[7], [3], [7], [3]], dtype=torch.int32)
    planned = step_rows(host, 4, table, 16)
    (chunk,) = planned.chunks
    assert chunk.rows.seqused_k.tolist() == [8, 12, 2, 3]
    assert chunk.rows.cu_seqlens_k.tolist() == [0, 8, 0, 8, 20]
    assert planned.kv_rows.tolist() == [*range(112, 120), *range(48, 60)]
    assert planned.kv_rows.dtype == torch.int32


# Attention over them, by the part itself.

HEADS, NOPE, ROPE, V, RANK = 2, 8, 4, 6, 12
SCALE = 0.3


class UnquantizedLinearMethod:
    pass


class ColumnParallelLinear(torch.nn.Module):
    """What the part looks at of vLLM's."""

    def __init__(self, weight, quantised=False):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.quant_method = object() if quantised else UnquantizedLinearMethod()
        self.bias, self.gather_output, self.calls = None, False, 0

    def forward(self, x):
        self.calls += 1
        return x @ self.weight.T, None


class Impl:
    num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, kv_lora_rank, scale = HEADS, NOPE, ROPE, V, RANK, SCALE
    kv_cache_dtype = "auto"

    def __init__(self, linear):
        self.kv_b_proj = linear
        self.own = []

    def forward_mha(self, *args):
        self.own.append(args)


class Layer:
    def __init__(self, impl, k_scale=None):
        self.impl, self._k_scale = impl, k_scale

    def forward_impl(self, *args, **named):
        self.impl.own.append((args, named))
        return "vLLM's"


class Metadata:
    def __init__(self, rows, tokens=0, decodes=0):
        self.num_actual_tokens, self.num_decode_tokens = tokens, decodes
        self.prefill = type("Prefill", (), {})()
        if rows is not None:
            setattr(self.prefill, FIELD, rows)


def attention(q, cache, step, weight):
    """Row by row and token by token, in float64."""
    tables, _ = tables_of(step)
    out, at = torch.empty(len(q), HEADS, V, dtype=torch.float64), 0
    for request, first, tokens in step["rows"]:
        for position in range(first, first + tokens):
            slots = [slot(tables[request], p, step["block_size"]) for p in range(position + 1)]
            latents = cache.flatten(0, 1)[slots].double()
            expanded = (latents[:, :RANK] @ weight.double().T).view(len(slots), HEADS, NOPE + V)
            rope = latents[:, None, RANK:].expand(-1, HEADS, -1)
            k, v = torch.cat((expanded[..., :NOPE], rope), -1), expanded[..., NOPE:]
            scores = torch.einsum("hd,khd->hk", q[at].double(), k) * SCALE
            out[at] = torch.einsum("hk,khd->hd", scores.softmax(-1), v)
            at += 1
    return out


def run_part(step, weight, linear, cache, q, cache_dtype="auto", scale=None):
    impl = Impl(linear)
    impl.kv_cache_dtype = cache_dtype
    _, planned = plan(step)
    output = torch.full((len(q), HEADS * V), torch.nan)
    before = parts.counts["prefill"]
    LayerPrefill(Layer(impl)).forward_mha(q, None, None, cache, Metadata(planned), scale, output)
    # The whole layer, with pads behind the tokens, whatever they hold.
    pads = torch.full((3, *q.shape[1:]), torch.nan, dtype=q.dtype, device=q.device)
    whole = torch.full((len(q) + 3, HEADS * V), torch.nan, dtype=q.dtype, device=q.device)
    raw = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
    call = LayerPrefill(Layer(impl, scale)).forward_impl
    assert call(torch.cat((q, pads)), None, None, raw, Metadata(planned, len(q)), whole) is whole
    assert torch.equal(whole[: len(q)], output)
    assert not whole[len(q) :].any()
    assert parts.counts["prefill"] == before + 2
    assert not impl.own
    return output.view(len(q), HEADS, V)


def tensors_of(step):
    generator = torch.Generator().manual_seed(step["seed"])
    weight = torch.randn(HEADS * (NOPE + V), RANK, generator=generator) / RANK**0.5
    cache = torch.randn(tables_of(step)[1], step["block_size"], RANK + ROPE, generator=generator)
    q = torch.randn(sum(tokens for _, _, tokens in step["rows"]), HEADS, NOPE + ROPE, generator=generator)
    return weight, cache, q


@settings(max_examples=30, deadline=None)
@given(step=steps(max_requests=3, max_len=20, max_context=25), quantised=st.booleans())
def test_attention(step, quantised):
    """float32's step is 6e-8; a row has at most 45 keys, whose scores, weights and values are each rounded a few times."""
    weight, cache, q = tensors_of(step)
    linear = ColumnParallelLinear(weight, quantised)
    out = run_part(step, weight, linear, cache, q)
    torch.testing.assert_close(out.double(), attention(q, cache, step, weight), rtol=1e-5, atol=1e-5)
    assert (linear.calls > 0) is quantised  # a plain one goes by its weight


FIXED = {
    "rows": [(3, 28, 6), (8, 6, 2), (3, 10, 6), (8, 0, 2)],
    "lengths": {3: 34, 8: 8},
    "block_size": 4,
    "limit": 9,
    "seed": 1,
}


@pytest.mark.parametrize("limit", [9, 1000])
@pytest.mark.parametrize("quantised", [False, True])
def test_attention_over_an_fp8_cache_with_its_scale(limit, quantised):
    step = {**FIXED, "limit": limit}
    weight, cache, q = tensors_of(step)
    scale = torch.tensor([0.5])
    stored = (cache / scale).to(torch.float8_e4m3fn)
    out = run_part(step, weight, ColumnParallelLinear(weight, quantised), stored, q, "fp8", scale)
    torch.testing.assert_close(out.double(), attention(q, stored.float() * scale, step, weight), rtol=1e-5, atol=1e-5)


def test_scale_of_a_cache_that_is_not_quantised_is_not_used():
    weight, cache, q = tensors_of(FIXED)
    out = run_part(FIXED, weight, ColumnParallelLinear(weight), cache, q, scale=torch.tensor([7.0]))
    torch.testing.assert_close(out.double(), attention(q, cache, FIXED, weight), rtol=1e-5, atol=1e-5)


def test_weights_may_be_swapped():
    weight, cache, q = tensors_of(FIXED)
    linear = ColumnParallelLinear(weight)
    run_part(FIXED, weight, linear, cache, q)
    linear.weight.data = other = weight.flip(0).contiguous()
    out = run_part(FIXED, other, linear, cache, q)
    torch.testing.assert_close(out.double(), attention(q, cache, FIXED, other), rtol=1e-5, atol=1e-5)


def test_layers_of_other_backends_share_no_call(monkeypatch):
    """Of one scale, with narrower keys that the first one's backend may not take."""

    def prepared(name, rows, scale):
        def run(q, k, v, out):
            shared.append(q.shape[2])
            run_rows("torch", q, k, v, rows, scale, False, out=out)

        return run if name == "cuda" else None

    monkeypatch.setattr(prefill, "choose", lambda backend, device, dtype, width, *_: "cuda" if width == NOPE + ROPE else "torch")
    monkeypatch.setattr(prefill, "prepared_rows", prepared)
    shared, step = [], {**FIXED, "limit": 1000}
    weight, cache, q = tensors_of(step)
    planned = plan(step)[1]
    for nope in (NOPE, NOPE - 2, NOPE):
        impl = Impl(ColumnParallelLinear(weight[: HEADS * (nope + V)]))
        impl.qk_nope_head_dim = nope
        out = torch.empty(len(q), HEADS * V)
        LayerPrefill(Layer(impl)).forward_mha(q[..., : nope + ROPE], None, None, cache, Metadata(planned), None, out)
    assert shared == [NOPE + ROPE] * 2
    torch.testing.assert_close(out.view(-1, HEADS, V).double(), attention(q, cache, step, weight), rtol=1e-5, atol=1e-5)


def test_a_rank_without_tokens_has_a_plan_without_keys():
    """vLLM gives such a rank one row of no tokens; the keys before it are read by no query."""
    for end in (0, 9):
        host = host_rows(np.array([0]), np.array([end]), np.array([3]), 100)
        planned = step_rows(host, 1, torch.tensor([[5]], dtype=torch.int32), 16)
        assert planned.kv_rows.tolist() == [*range(80, 80 + end)]
        assert [chunk.rows.cu_seqlens_q.tolist() for chunk in planned.chunks] == [[0, 0]]


def test_unplanned_steps_are_vllms():
    impl = Impl(ColumnParallelLinear(torch.zeros(HEADS * (NOPE + V), RANK)))
    prefill = LayerPrefill(Layer(impl))
    args = (torch.zeros(1), None, None, torch.zeros(1), Metadata(None), None, torch.zeros(1))
    prefill.forward_mha(*args)
    assert impl.own == [(*args, None)]


@pytest.mark.parametrize(
    "case", ["profile run", "decodes alone", "decodes beside", "unplanned", "quantised", "another dtype", "keyword"]
)
def test_layers_that_are_vllms(case):
    impl = Impl(ColumnParallelLinear(torch.zeros(HEADS * (NOPE + V), RANK)))
    planned = plan(FIXED)[1]
    metadata = Metadata(None if case == "unplanned" else planned, 16, 1 if case == "decodes beside" else 0)
    if case == "profile run":
        metadata = None
    elif case == "decodes alone":
        metadata.prefill = None
    output = torch.zeros(16, dtype=torch.float64 if case == "another dtype" else torch.float32)
    more = (torch.ones(1),) if case == "quantised" else ()
    named = {"q_dcp_replicated": torch.ones(1)} if case == "keyword" else {"quant_group_size": None}
    args = (torch.zeros(16), 1, 2, torch.zeros(1), metadata, output, *more)
    assert LayerPrefill(Layer(impl)).forward_impl(*args, **named) == "vLLM's"
    assert impl.own == [(args, named)]
    assert not output.any()


def test_a_rank_without_tokens_attends_to_nothing():
    impl = Impl(ColumnParallelLinear(torch.zeros(HEADS * (NOPE + V), RANK)))
    output = torch.full((4, HEADS * V), torch.nan)
    metadata = Metadata(plan(FIXED)[1], 0)
    assert LayerPrefill(Layer(impl)).forward_impl(torch.zeros(4, HEADS, 1), 1, 2, torch.zeros(1), metadata, output) is output
    assert not output.any()
    assert not impl.own


def test_a_quantised_output_is_refused_before_anything_is_written():
    weight, cache, q = tensors_of(FIXED)
    output = torch.full((len(q), HEADS * V), torch.nan)
    prefill = LayerPrefill(Layer(Impl(ColumnParallelLinear(weight))))
    with pytest.raises(NotImplementedError, match="prefill output must not be quantised"):
        prefill.forward_mha(q, None, None, cache, Metadata(plan(FIXED)[1]), None, output, torch.ones(1))
    assert output.isnan().all()
