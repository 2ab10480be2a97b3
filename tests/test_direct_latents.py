"""A layer's calls past the dispatcher: the bits of the ops, and only where nobody could want to see them. Which tensors the Hopper
kernel of kv_up_project takes is in test_kv_up_project_choice.py."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from batches import random_bytes, same_bits
from pcp_mla import MLADims, concat_k, kv_up_project, write_latent_cache
from pcp_mla.exchange.latents import pack_latents
from pcp_mla.ops import native
from test_direct import Seen
from test_kv_up_project_choice import HOPPER
from test_latent_cache import random_cache, random_slots
from test_layer import Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.direct is None, reason="no calls past the dispatcher here"),
    pytest.mark.usefixtures("inference"),
]
VIEWED = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8]
DIMS = MLADims(2, 64, 64, 64, 128)


def numbers(*shape):
    return torch.randn(*shape, device="cuda").bfloat16()


def projection():
    """Latents, slots of 33 of them, a weight, and K and V to be written."""
    rows = torch.randperm(50, device="cuda")[:33].int()
    outs = (torch.full((33, 2, width), math.nan, device="cuda").bfloat16() for width in (128, 64))
    return numbers(10, 5, 192), rows, numbers(256, 128) / 8, *outs


class TestBits:
    @pytest.mark.parametrize("dtype", VIEWED)
    def test_concat(self, dtype, refused):
        generator = torch.Generator().manual_seed(5)
        k_nope = random_bytes((33, 3, 192), dtype, "cuda", generator)[..., :128]
        k_pe = random_bytes((33, 576), dtype, "cuda", generator)[:, -64:]
        wanted = concat_k(k_nope, k_pe, backend="cuda")
        assert same_bits(concat_k(k_nope, k_pe), wanted)
        room = random_bytes((33, 4, 192), dtype, "cuda", generator)
        before = room[:, 0].clone()
        assert same_bits(concat_k(k_nope, k_pe[:, None], out=room[:, 1:]).contiguous(), wanted)
        assert same_bits(room[:, 0].contiguous(), before)
        assert (refused.calls, refused.count) == (2, 0)

    @pytest.mark.parametrize("dtype", VIEWED)
    @pytest.mark.parametrize("tokens", [0, 1, 33])
    def test_packed_rows(self, dtype, tokens, refused):
        """Of two dimensions, from slices and into a slice."""
        generator = torch.Generator().manual_seed(6)
        kv_c = random_bytes((tokens, 520), dtype, "cuda", generator)[:, :512]
        k_pe = random_bytes((tokens, 64), dtype, "cuda", generator)
        room = random_bytes((tokens + 2, 580), dtype, "cuda", generator)
        wanted, item = room.view(torch.uint8).clone(), room.element_size()
        wanted[1:-1, : 512 * item] = kv_c.view(torch.uint8)
        wanted[1:-1, 512 * item : 576 * item] = k_pe.view(torch.uint8)
        pack_latents(kv_c, k_pe, room[1:-1, :576])
        assert torch.equal(room.view(torch.uint8), wanted)
        assert (refused.calls, refused.count) == (1, 0)

    @pytest.mark.parametrize("dtype", VIEWED)
    @pytest.mark.parametrize("form", ["slots", "layer", "gaps", "odd gaps", "gapless"])
    def test_write(self, form, dtype, refused):
        generator = torch.Generator().manual_seed(7)
        cache = random_cache(form, 7, 4, 576, dtype, "cuda", generator)
        latents = random_bytes((20, 579), dtype, "cuda", generator)[:, :576]
        slots = random_slots(20, 28, generator).cuda()
        wanted = cache.clone()
        write_latent_cache(latents, wanted, slots, backend="cuda")
        write_latent_cache(latents, cache, slots)
        assert same_bits(cache.contiguous(), wanted.contiguous())
        assert (refused.calls, refused.count) == (1, 0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_write_with_a_scale(self, dtype, refused):
        latents, slots = torch.randn(20, 576, device="cuda").to(dtype), torch.randperm(28, device="cuda")[:20]
        scale = torch.tensor([0.02], device="cuda")
        cache, wanted = (torch.zeros(7, 4, 576, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
        write_latent_cache(latents, wanted, slots, scale=scale, backend="cuda")
        write_latent_cache(latents, cache, slots, scale=scale)
        assert same_bits(cache, wanted)
        assert wanted.float().any()
        assert (refused.calls, refused.count) == (1, 0)

    def test_types_that_are_rare(self, refused):
        """They go through the dispatcher."""
        latents, slots = torch.randn(20, 576, device="cuda").double(), torch.randperm(28, device="cuda")[:20]
        cache = torch.zeros(7, 4, 576, dtype=torch.float64, device="cuda")
        write_latent_cache(latents, cache, slots)
        assert torch.equal(cache.view(-1, 576)[slots], latents)
        packed = torch.empty(20, 577, dtype=torch.float64, device="cuda")
        pack_latents(latents, latents[:, :1], packed)
        assert torch.equal(packed, torch.cat([latents, latents[:, :1]], 1))
        assert refused.calls == refused.count == 2

    @pytest.mark.parametrize("listed", [True, False])
    def test_up_projection(self, listed, refused):
        latents, rows, weight, *_ = projection()
        if not listed:
            latents, rows = latents.flatten(0, 1)[rows.long()], None
        for calls, apart in ((1, False), (2, True)):
            got = kv_up_project(latents, rows, weight, DIMS, k_pe_apart=apart)
            assert (refused.calls, refused.count) == (calls, 0 if HOPPER else calls)
            wanted = kv_up_project(latents, rows, weight, DIMS, k_pe_apart=apart, backend="cuda" if HOPPER else "triton")
            assert all(same_bits(x, y) for x, y in zip(got, wanted, strict=True))

    def test_a_layer(self, refused, monkeypatch):
        step = Step(None, "cuda", torch.bfloat16, "triton")
        step.weight = torch.nn.Parameter(step.weight, requires_grad=False)
        cache = step.cache.clone()
        refused.calls = refused.count = 0
        got = step()
        assert (refused.calls, refused.count) == (3, 0 if HOPPER else 1)
        filled, step.cache = step.cache, cache
        monkeypatch.setattr(native, "direct", None)
        assert same_bits(got, step())
        assert same_bits(filled, cache)


class TestRefusals:
    def test_words_of_a_refusal(self, refused):
        latents, cache, slots = numbers(20, 576), numbers(7, 4, 576), torch.arange(20, device="cuda")
        k_nope, whole = numbers(20, 2, 128), numbers(20, 3, 192)
        before, whole_before = cache.clone(), whole.clone()
        rows = cache.view(-1, 576)
        with pytest.raises(ValueError, match="write_latent_cache: cache must not share memory with latents"):
            write_latent_cache(rows[:20], cache, slots)
        with pytest.raises(ValueError, match="concat_k: out must not share memory with k_nope"):
            concat_k(whole[:, :2, :128], whole[:, 2, 128:], out=whole[:, 1:])
        with pytest.raises(ValueError, match="concat_k: out must not share memory with k_pe"):
            concat_k(k_nope, whole[:, 0, 128:], out=whole[:, :2])
        assert refused.calls == refused.count == 3
        for wrong, error, words in (
            ({"slot_mapping": slots[:-1]}, ValueError, "slot_mapping must have shape"),
            ({"slot_mapping": slots.int()}, TypeError, "slot_mapping must be int64, got int32"),
            ({"slot_mapping": slots.cpu()}, ValueError, "slot_mapping must be on cuda"),
            ({"latents": latents.half()}, TypeError, "cache must be float16 as latents"),
        ):
            with pytest.raises(error, match=words):
                write_latent_cache(**{"latents": latents, "cache": cache, "slot_mapping": slots, **wrong})
        assert refused.calls == 3  # these never came to it
        assert same_bits(cache, before)
        assert same_bits(whole, whole_before)

    def test_what_does_not_fit(self):
        """Called by hand: nothing is written."""
        latents, cache, slots = numbers(20, 576), numbers(7, 4, 576), torch.arange(20, device="cuda")
        k_nope, k_pe, out = numbers(20, 2, 128), numbers(20, 64), numbers(20, 2, 192)
        before, out_before = cache.clone(), out.clone()
        for call, wrong in (
            ("write_latent_cache", (latents[:, :575], cache, slots, None)),
            ("write_latent_cache", (latents, cache, slots[:-1], None)),
            ("write_latent_cache", (latents, cache, slots.int(), None)),
            ("write_latent_cache", (latents, cache, slots.cpu(), None)),
            ("write_latent_cache", (latents.float(), cache, slots, None)),
            ("write_latent_cache", (latents, cache, slots, torch.ones(1, device="cuda"))),
            ("write_latent_cache", (latents, cache, slots, 1.0)),
            ("write_latent_cache", (None, cache, slots, None)),
            ("write_latent_cache", (latents, cache.transpose(1, 2), slots, None)),
            ("concat_k", (k_nope, k_pe[:-1], out)),
            ("concat_k", (k_nope, k_pe[:, :-1], out)),
            ("concat_k", (k_nope[:, :1], k_pe, out)),
            ("concat_k", (k_nope[:, 0], k_pe, out)),
            ("concat_k", (k_nope, k_pe, out.float())),
            ("concat_k", (k_nope, k_pe.cpu(), out)),
            ("concat_k", (k_nope.mT, k_pe, out)),
            ("concat_k", (k_nope, None, out)),
        ):
            assert getattr(native.direct, call)(*wrong) is False
        assert same_bits(cache, before)
        assert same_bits(out, out_before)

    def test_modes_and_gradients_see_the_op(self, refused):
        latents, cache, slots = numbers(20, 576), numbers(7, 4, 576), torch.arange(20, device="cuda")
        packed, parts = torch.empty_like(latents), (latents[:, :512], latents[:, 512:])
        with Seen() as seen:
            write_latent_cache(latents, cache, slots)
            pack_latents(*parts, packed)
            concat_k(parts[0][:, None], parts[1], out=packed[:, None])
        assert seen.names == ["write_latent_cache", "concat_k", "concat_k"]
        assert refused.calls == refused.count == 3
        with torch.inference_mode(False), torch.enable_grad():
            copies = [x.clone() for x in (latents, cache, slots)]
            write_latent_cache(*copies)
            pack_latents(copies[0][:, :512], copies[0][:, 512:], torch.empty_like(copies[0]))
            kv_up_project(*(x.clone() for x in projection()[:3]), DIMS)
        assert refused.calls == refused.count == 6
        with FakeTensorMode():
            fake = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in (latents, cache, slots)]
            write_latent_cache(*fake)
            pack_latents(fake[0][:, :512], fake[0][:, 512:], torch.empty_like(fake[0]))
        assert refused.calls == refused.count == 8

    def test_a_weight_of_another_class(self, refused):
        class Quantised(torch.nn.Parameter):
            pass

        latents, rows, weight, k, v = projection()
        assert not native.direct.kv_up_project(latents, rows, torch.Tensor._make_subclass(Quantised, weight), None, k, v, None)
        assert k.isnan().all()
        assert v.isnan().all()
        assert refused.calls == refused.count == 1


def test_capture_on_a_side_stream():
    latents, rows, weight, k, v = projection()
    cache, slots, packed = torch.zeros(10, 5, 192, device="cuda").bfloat16(), torch.arange(50, device="cuda"), numbers(50, 192)
    parts = [x.contiguous() for x in latents.flatten(0, 1).split([128, 64], 1)]
    kv_up_project(latents, rows, weight, DIMS, k_out=k, v_out=v)  # Triton compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        pack_latents(*parts, packed)
        write_latent_cache(packed, cache, slots)
        kv_up_project(cache, rows, weight, DIMS, k_out=k, v_out=v)
    assert not cache.any()
    parts[0].mul_(2)
    graph.replay()
    latents[..., :128].mul_(2)
    wanted = kv_up_project(latents, rows, weight, DIMS)
    assert same_bits(cache, latents)
    assert same_bits(k, wanted[0])
    assert same_bits(v, wanted[1])
