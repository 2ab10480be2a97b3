"""Calls past the dispatcher: the same bits as through it, and only where nobody could want to see the op."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from batches import same_bits
from pcp_mla import cp_correct_out, merge_attn_states, merge_n_attn_states
from pcp_mla.ops import native, registry
from test_merge_states import check

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("inference")]


class Seen(TorchDispatchMode):
    """The ops of this package that pass the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pcp_mla":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """What its numbers are, only the dispatcher knows."""


def partials(count, dtype=torch.bfloat16, tokens=33, heads=5, dim=80):
    generator = torch.Generator("cuda").manual_seed(count)
    outs = [torch.randn(tokens, heads, dim + 16, device="cuda", generator=generator).to(dtype)[..., :dim] for _ in range(count)]
    lses = [torch.randn(heads, tokens, device="cuda", generator=generator).T for _ in range(count)]
    lses[0][3] = -torch.inf
    outs[0][3] = math.nan
    return outs, lses


def results(like, dtype=None):
    out = torch.full(like.shape, math.nan, device="cuda").to(dtype or like.dtype)
    return out, torch.full(like.shape[:2], math.nan, device="cuda")


def test_a_gpu_with_this_torch_has_direct_calls():
    assert (native.direct is not None) == hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert registry.direct() is native.direct


@pytest.mark.skipif(native.direct is None, reason="this torch has no DLPack exchange interface")
class TestCalls:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_two_way(self, dtype, refused):
        (a, b), (lse_a, lse_b) = partials(2, dtype)
        ops = torch.randint(0, 4, (33,), dtype=torch.int32, device="cuda")
        starts = torch.tensor([0, 10, 30], dtype=torch.int32, device="cuda")
        rows = torch.randperm(33, device="cuda").int()
        scale = torch.tensor([0.02], device="cuda")
        for options in (
            {},
            {"lse_base": "2"},
            {"row_op": ops},
            {"row_op": ops[:2].contiguous(), "cu_seqlens": starts},
            {"out_rows": rows},
            {"scale": scale},
        ):
            fp8 = torch.float8_e4m3fn if "scale" in options else None
            got, wanted = results(a, fp8), results(a, fp8)
            for (out, lse), backend in ((got, "auto"), (wanted, "cuda")):
                merge_attn_states(a, lse_a, b, lse_b, out=out, lse_out=lse, backend=backend, **options)
            assert same_bits(got[0], wanted[0])
            assert same_bits(got[1], wanted[1])
            if not options or "lse_base" in options:
                check(*got, [a, b], [lse_a, lse_b], options.get("lse_base", "e"))
        assert (refused.calls, refused.count) == (6, 0)

    @pytest.mark.parametrize("count", [1, 3, 8])
    def test_many(self, count, refused):
        outs, lses = partials(count)
        for given in ((outs, lses), (torch.stack(outs), torch.stack(lses))):
            got, wanted = results(outs[0]), results(outs[0])
            merge_n_attn_states(*given, out=got[0], lse_out=got[1])
            merge_n_attn_states(*given, out=wanted[0], lse_out=wanted[1], backend="cuda")
            assert same_bits(got[0], wanted[0])
            assert same_bits(got[1], wanted[1])
            check(*got, outs, lses)
        assert (refused.calls, refused.count) == (2, 0)

    def test_correction(self, refused):
        outs, lses = partials(4, heads=6)
        used = torch.randint(0, 2, (4, 33), dtype=torch.int32, device="cuda")
        got = cp_correct_out(outs[2], torch.stack(lses), 2, seqused_k=used)
        wanted = cp_correct_out(outs[2], torch.stack(lses), 2, seqused_k=used, backend="cuda")
        assert same_bits(got[0], wanted[0])
        assert same_bits(got[1], wanted[1])
        shares = torch.empty(2, 33, 3, 80, device="cuda")
        cp_correct_out(outs[2], torch.stack(lses), 2, corrected=shares, seqused_k=used)
        assert same_bits(shares.transpose(0, 1).reshape(33, 6, 80), wanted[0])
        parts = [cp_correct_out(x, torch.stack(lses), n, seqused_k=used)[0] for n, x in enumerate(outs)]
        counted = [lse.masked_fill(used[n, :, None] == 0, -torch.inf) for n, lse in enumerate(lses)]
        check(sum(parts), got[1], [x.float() for x in outs], counted)
        assert (refused.calls, refused.count) == (6, 0)

    def test_a_refusal_is_an_error_with_its_words(self, refused):
        (a, b), (lse_a, lse_b) = partials(2)
        out, lse = results(a)
        for wrong, error, words in (
            ((a, lse_a, b[1:], lse_b), ValueError, "out_b must have shape"),
            ((a, lse_a, b.half(), lse_b), TypeError, "out_b must have dtype bfloat16"),
            ((a, lse_a, b, lse_b.cpu()), ValueError, "lse_b must be on cuda"),
            ((a, lse_a, b, 3), TypeError, "lse_b must be a torch.Tensor, got int"),
            ((a.double(), lse_a, b.double(), lse_b), NotImplementedError, "out_a must be bfloat16, float16 or float32"),
        ):
            with pytest.raises(error, match=words):
                merge_attn_states(*wrong, out=out, lse_out=lse)
        assert refused.calls == refused.count == 5
        assert out.isnan().all()
        assert lse.isnan().all()

    def test_shared_memory_is_refused(self, refused):
        (a, b), (lse_a, lse_b) = partials(2)
        before, rows = a.clone(), torch.arange(32, -1, -1, dtype=torch.int32, device="cuda")
        with pytest.raises(ValueError, match="out must not share memory with out_a, got"):
            merge_attn_states(a, lse_a, b, lse_b, out=a, out_rows=rows)
        with pytest.raises(ValueError, match=r"out must not share memory with outs\[1\] unless it is outs\[1\] itself"):
            merge_n_attn_states([a[1:], b[1:]], [lse_a[1:], lse_b[1:]], out=b[:-1])
        with pytest.raises(ValueError, match="corrected must not share memory with out unless it is out itself"):
            cp_correct_out(a[1:], torch.stack([lse_a, lse_b])[:, 1:], 0, corrected=a[:-1])
        assert refused.calls == refused.count == 3
        assert same_bits(a, before)
        merge_attn_states(a, lse_a, b, lse_b, out=a, lse_out=lse_a)  # in place
        assert (refused.calls, refused.count) == (4, 3)

    def test_what_the_dispatcher_refuses(self, refused):
        (a, b), (lse_a, lse_b) = partials(2)
        out, lse = results(a)
        with pytest.raises(ValueError, match="outs must have 4 dimensions"):
            merge_n_attn_states(a, lse_a, out=out, lse_out=lse)
        with pytest.raises(ValueError, match=r"outs\[0\] must have 3 dimensions"):
            merge_n_attn_states([torch.stack([a, b])], [torch.stack([lse_a, lse_b])], out=out, lse_out=lse)
        with pytest.raises(TypeError, match="rank must be an int, got True"):
            cp_correct_out(a, torch.stack([lse_a, lse_b]), True)
        assert out.isnan().all()
        assert refused.calls == 0

    def test_no_rows_to_scatter(self, refused):
        (a, b), (lse_a, lse_b) = partials(2)
        out, lse = results(a)
        none = torch.zeros(0, dtype=torch.int32, device="cuda")
        merge_attn_states(a[:0], lse_a[:0], b[:0], lse_b[:0], out=out, lse_out=lse, out_rows=none)
        assert out.isnan().all()
        assert (refused.calls, refused.count) == (1, 0)

    def test_modes_and_gradients_see_the_op(self, refused):
        (a, b), (lse_a, lse_b) = partials(2)
        out, lse = results(a)
        with Seen() as seen:
            merge_attn_states(a, lse_a, b, lse_b, out=out, lse_out=lse)
        assert seen.names == ["merge_attn_states_out"]
        with torch.inference_mode(False), torch.enable_grad():
            merge_attn_states(*(x.clone() for x in (a, lse_a, b, lse_b)), out=torch.empty_like(a), lse_out=torch.empty_like(lse))
        with FakeTensorMode():
            fake = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in (a, lse_a, b, lse_b, out, lse)]
            merge_attn_states(*fake[:4], out=fake[4], lse_out=fake[5])
        assert refused.calls == refused.count == 3

    def test_subclasses_go_through_the_dispatcher(self, refused):
        (a, b), (lse_a, lse_b) = partials(2)
        for subclass, count in ((Subclass, 1), (torch.nn.Parameter, 0)):
            out, lse = results(a)
            refused.calls = refused.count = 0
            merge_attn_states(torch.Tensor._make_subclass(subclass, a), lse_a, b, lse_b, out=out, lse_out=lse)
            assert (refused.calls, refused.count) == (1, count)
            assert not out.isnan().any()

    def test_capture_on_a_side_stream(self):
        (a, b), (lse_a, lse_b) = partials(2)
        out, lse = results(a)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            merge_attn_states(a, lse_a, b, lse_b, out=out, lse_out=lse)
        assert out.isnan().all()
        b.mul_(2)
        graph.replay()
        wanted = merge_attn_states(a, lse_a, b, lse_b, backend="cuda")
        assert same_bits(out, wanted[0])
        assert same_bits(lse, wanted[1])
