"""Our own attention kernel for Hopper: every form that it has, tile edges, bits that never change, and what it must not read."""

import itertools

import pytest
import torch

from pcp_mla.ops import native
from pcp_mla.ops.attention.rows import attend_row

pytestmark = pytest.mark.gpu

SCALE = 0.1
# Widths of q's first part and its rest, and of V: DeepSeek and Kimi, GLM, smaller ones; K in one piece.
GEOMETRIES = [
    (128, 64, 128),
    (192, 64, 256),
    (64, 64, 128),
    (64, 32, 64),
    (64, 64, 64),
    (64, 8, 128),
    (192, 0, 128),
    (256, 0, 256),
    (72, 0, 64),
]


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability()[0] != 9 or native.status["_native_cuda"]:
        pytest.skip("it is for Hopper")


class Call:
    """Random rows: queries one after another, keys of each row apart, with rows of NaN and inf behind them."""

    def __init__(self, lengths, used, geometry=(128, 64, 128), heads=2, dtype=torch.bfloat16, seed=0, gap=3):
        nope, rope, v_width = geometry
        random = torch.Generator(device="cuda").manual_seed(seed)
        self.lengths, self.used, self.rope = lengths, used, rope
        count, starts = sum(lengths), [0]
        for n in used:
            starts.append(starts[-1] + n + gap)

        def values(*shape):
            return torch.randn(*shape, generator=random, device="cuda").to(dtype)

        self.q, self.k, self.v = (
            values(count, heads, nope + rope),
            values(starts[-1], heads, nope),
            values(starts[-1], heads, v_width),
        )
        self.k_pe = values(starts[-1], rope) if rope else None
        for start, n in zip(starts, used, strict=False):
            for x, bad in ((self.k, torch.nan), (self.v, torch.inf), (self.k_pe, torch.nan)):
                if x is not None:
                    x[start + n : start + n + gap] = bad
        self.starts = starts[:-1]

    def lists(self, order):
        """cu_seqlens_q, cu_seqlens_k and seqused_k of rows that lie in this order."""
        ends = torch.tensor([0, *itertools.accumulate(self.lengths[i] for i in order)])
        return [torch.as_tensor(x).int().cuda() for x in (ends, [self.starts[i] for i in order], [self.used[i] for i in order])]

    def __call__(self, causal=True, order=None, **options):
        order = list(range(len(self.used))) if order is None else order
        ends = [0, *itertools.accumulate(self.lengths)]
        q = torch.cat([self.q[ends[i] : ends[i + 1]] for i in order])
        out = torch.full((*q.shape[:2], self.v.shape[2]), torch.nan, dtype=q.dtype, device="cuda")
        lse = torch.full(q.shape[:2], torch.nan, device="cuda")
        given = {"k": self.k, "v": self.v, "k_pe": self.k_pe, "rows": None} | options
        keys = (given["k"], given["v"], given["k_pe"], given["rows"])
        torch.ops.pcp_mla.attention_wgmma(q, *keys, *self.lists(order), None, None, SCALE, causal, out, lse)
        counts = [self.lengths[i] for i in order]
        back = [order.index(i) for i in range(len(order))]
        return [torch.cat([x.split(counts)[at] for at in back]) for x in (out, lse)]

    def check(self, got, causal=True):
        """Against float64: at most twice the error of torch's own, and one rounding."""
        out, lse = got
        begin = 0
        for length, used, start in zip(self.lengths, self.used, self.starts, strict=True):
            rows, keys = slice(begin, begin + length), slice(start, start + used)
            begin += length
            if length == 0:
                continue
            k = self.k[keys]
            if self.k_pe is not None:
                k = torch.cat([k, self.k_pe[keys, None].expand(-1, k.shape[1], -1)], -1)
            scores = torch.einsum("nhd,mhd->hnm", self.q[rows].double(), k.double()) * SCALE
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(used - length + 1).bool(), -torch.inf)
            right_lse = scores.logsumexp(-1).T
            right = torch.einsum("hnm,mhd->nhd", scores.softmax(-1).nan_to_num(), self.v[keys].double())
            assert torch.equal(lse[rows].isinf(), right_lse.isinf())
            seen = right_lse.isfinite()
            torch.testing.assert_close(lse[rows][seen].double(), right_lse[seen], rtol=2e-5, atol=2e-5)
            assert not out[rows][~seen].any()
            assert not out[rows].isnan().any()
            # torch has no causal product of more queries than keys, and none with a mask for the others: one rounding of weights.
            eps = torch.finfo(out.dtype).eps
            allowed = eps * right.abs().max() + 1e-6
            if causal and used >= length:
                allowed = 2 * (attend_row(self.q[rows], k, self.v[keys], SCALE) - right).abs().max() + 1e-6
            assert not ((out[rows] - right).abs() > allowed + eps / 2 * right.abs()).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_geometries(geometry, dtype, causal):
    call = Call([200, 0, 77, 1, 300], [700, 30, 77, 513, 140], geometry, heads=3, dtype=dtype)
    call.check(call(causal), causal)


EDGES = [0, 1, 2, 31, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 300]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("geometry", [(128, 64, 128), (192, 64, 256)], ids=str)
def test_edges_of_tiles(geometry, causal):
    """All lengths of queries by all of keys around those of a tile, also fewer keys than queries, in one launch of many rows."""
    pairs = list(itertools.product(EDGES, EDGES))
    call = Call([n for n, _ in pairs], [n for _, n in pairs], geometry, heads=1)
    call.check(call(causal), causal)


@pytest.mark.parametrize("listed", [False, True])
def test_bits_never_change(listed):
    """In 30 runs, in any order of the rows, with keys anywhere."""
    call = Call([500, 129, 64, 1, 333], [900, 129, 700, 260, 400], heads=4)
    wanted = call()
    random = torch.Generator().manual_seed(1)
    for run in range(30):
        options = {}
        if listed:
            count = len(call.k)
            index = torch.randperm(count, generator=random)
            if run % 3 == 0:  # runs that tensor copies can take, and some that they cannot
                index = torch.cat([torch.arange(count).split(96)[i] for i in torch.randperm(-(-count // 96), generator=random)])
            place = index.cuda()
            keys = {"k": call.k, "v": call.v, "k_pe": call.k_pe}
            options = {name: torch.empty_like(x).index_copy_(0, place, x) for name, x in keys.items()} | {"rows": place.int()}
        got = call(order=torch.randperm(5, generator=random).tolist(), **options)
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_no_keys_at_all():
    call = Call([5, 0, 130], [0, 0, 0], gap=0)
    assert len(call.k) == 0
    out, lse = call()
    assert not out.any()
    assert lse.eq(-torch.inf).all()


def many_tiles():
    """Several for each processor, short and long, without keys among them; and what they give where each block has one."""
    lengths = [1000, 0, 257, *[3, 130, 64] * 20, 700]
    used = [3000, 5, 0, *[0, 200, 1, 90, 513, 0] * 10, 700]
    call = Call(lengths, used, heads=16)
    listed = call(rows=torch.arange(len(call.k), dtype=torch.int32, device="cuda"))
    call.check(listed)
    return call, listed


def equal(got, wanted):
    return all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_blocks_take_several_tiles():
    call, wanted = many_tiles()
    for _ in range(30):
        assert equal(call(), wanted)
    call.check(call(causal=False), causal=False)


def test_streams_do_not_share_what_is_left_to_do():
    """Calls on streams at the same time, and a graph of several that is replayed beside them."""
    call, wanted = many_tiles()
    graph = torch.cuda.CUDAGraph()
    lists, order = call.lists(range(len(call.used))), (call.k, call.v, call.k_pe, None)
    outs = [[torch.empty_like(x) for x in wanted] for _ in range(3)]

    def run(out, lse):
        torch.ops.pcp_mla.attention_wgmma(call.q, *order, *lists, None, None, SCALE, True, out, lse)

    with torch.cuda.graph(graph):
        for out in outs:
            run(*out)
    streams = [torch.cuda.Stream() for _ in range(6)]
    made = []
    torch.cuda.synchronize()
    for turn in range(20):
        for out in outs:
            for x in out:
                x.fill_(torch.nan)
        torch.cuda.synchronize()
        for stream in streams:
            with torch.cuda.stream(stream):
                made.append([torch.full_like(x, torch.nan) for x in wanted])
                run(*made[-1])
        with torch.cuda.stream(streams[turn % 6]):
            graph.replay()
        torch.cuda.synchronize()
        assert all(equal(got, wanted) for got in (*outs, *made)), turn
        made.clear()


def test_rows_share_keys():
    """A head and a tail over the same keys, and rows that begin within another's."""
    call = Call([100, 100, 50], [1000, 0, 0])
    call.used = [400, 1000, 600]
    call.starts = [0, 0, 333]
    call.check(call())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float32}, "it needs bfloat16 or float16"),
        ({"geometry": (64, 0, 64)}, "its widths of q and v are"),
        ({"geometry": (96, 64, 128)}, "k beside k_pe must be a multiple of 64 wide"),
    ],
)
def test_what_it_does_not_take(change, words):
    with pytest.raises(RuntimeError, match=f"pcp_attention: the CUDA kernel does not take this: {words}"):
        Call([5], [9], **change)()


def test_addresses_and_expanded_tensors():
    call = Call([5], [9])
    wide = torch.zeros(len(call.k), 2, 132, dtype=call.k.dtype, device="cuda")
    with pytest.raises(RuntimeError, match="rows and heads must lie at multiples of 16 bytes"):
        call(k=wide[..., 4:])
    with pytest.raises(RuntimeError, match="q, k and v must not be expanded"):
        call(v=call.v[:, :1].expand(-1, 2, -1))
    with pytest.raises(RuntimeError, match="k_pe must not be expanded"):
        call(k_pe=call.k_pe[:1].expand(len(call.k), -1))
