"""Models under PCP with a float8 cache, against stock ones whose latents go through float8 before they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from pcp_mla.integrations.transformers import (
    capture_graphs,
    copy_sharing_weights,
    decode,
    disable_pcp,
    enable_pcp,
    extend,
    generate,
    prefill,
)
from pcp_mla.testing.played import play
from test_integration_transformers import build, check_close, prompts, stock_logits, stock_text

FLOAT8, SCALE = torch.float8_e4m3fn, 0.0173
NAMES = ((modeling_deepseek_v3, "apply_rotary_pos_emb_interleave"), (modeling_deepseek_v2, "apply_rotary_emb"))


def through_float8(x: torch.Tensor) -> torch.Tensor:
    scale = torch.tensor(SCALE, device=x.device)
    return ((x.float() / scale).clamp(-448, 448).to(FLOAT8).float() * scale).to(x.dtype)


def rounding(rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def call(*given: Any, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = rotate(*given, **how)
        return q, through_float8(k)

    return call


@pytest.fixture(scope="module", params=["v3", "v2"])
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param, **({"q_lora_rank": None} if request.param == "v2" else {}))


@contextmanager
def latents_rounded(model: Any) -> Iterator[None]:
    """The stock model computes with latents that go through float8."""
    hooks = [
        layer.self_attn.kv_a_layernorm.register_forward_hook(lambda module, given, result: through_float8(result))
        for layer in model.model.layers
    ]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in NAMES:
            patch.setattr(module, name, rounding(getattr(module, name)))
        yield
    for hook in hooks:
        hook.remove()


def under_pcp(model: Any, group: Any = None, **how: Any) -> Any:
    mine = copy_sharing_weights(model)
    enable_pcp(mine, group, cache_dtype=FLOAT8, cache_scale=SCALE, **how)
    return mine


def answers(mine: Any) -> dict[str, Any]:
    """All ways to the logits of these texts."""
    texts = prompts([21, 3, 40])
    whole = prefill(mine, texts)
    got = {"whole": whole, "chunks": prefill(mine, texts, chunk_tokens=9)}
    got["prefix"] = prefill(mine, [texts[0][:5], texts[2]], prefix=[(2, 19), (0, 8)])  # blocks filled in part are copied
    prefill(mine, [text[:-2] for text in texts])
    got["decode"] = decode(mine, [text[-2] for text in texts])
    got["extend"] = extend(mine, [text[-1:] for text in texts])
    prefix, drafts = [(0, 18), (2, 37)], [texts[0][18:], texts[2][37:]]
    beside = {"prefix": [prefix[0], None, prefix[1]], "decodes": [True, False, True]}
    got["drafts"] = prefill(mine, [drafts[0], texts[1], drafts[1]], **beside)
    got["drafts alone"] = prefill(mine, drafts, prefix=prefix, decodes=[True, True])
    got["text"] = generate(mine, [texts[2]], 4)
    return got


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_way_to_the_logits(model: Any, world: int) -> None:
    texts, ends = prompts([21, 3, 40]), torch.tensor([20, 23, 63])
    with latents_rounded(model):
        wanted = stock_logits(model, texts)
        behind = [stock_logits(model, [texts[2][:19] + texts[0][:5]])[19:], stock_logits(model, [texts[0][:8] + texts[2]])[8:]]
        text = stock_text(model, texts[2], 4)
    for got in play(world, lambda group: answers(under_pcp(model, group))):
        check_close(got["whole"], wanted)
        check_close(got["chunks"], wanted)
        check_close(got["prefix"], torch.cat(behind))
        check_close(got["decode"], wanted[ends - 1])
        check_close(got["extend"], wanted[ends])
        drafts = wanted[18:21], wanted[21:24], wanted[61:]
        check_close(got["drafts"], torch.cat(drafts))
        check_close(got["drafts alone"], torch.cat(drafts[::2]))
        assert got["text"] == [text]


def test_it_makes_a_difference(model: Any) -> None:
    """More than the tests allow, and not everything."""
    texts = prompts([21, 3, 40])
    plain = stock_logits(model, texts)
    change = (prefill(under_pcp(model), texts) - plain).abs().mean() / plain.abs().mean()
    assert 1e-3 < change < 0.5


def test_keys_through_a_module_that_is_called(model: Any) -> None:
    """Whose hook makes a decode step expand its keys."""
    texts = prompts([21, 3])
    with latents_rounded(model):
        wanted = stock_logits(model, texts)
    mine = copy_sharing_weights(model)
    for layer in mine.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda *_: None)
    enable_pcp(mine, cache_dtype=FLOAT8, cache_scale=SCALE)
    prefill(mine, [text[:-1] for text in texts])
    check_close(decode(mine, [text[-1] for text in texts]), wanted[[20, 23]])


def test_calls_of_the_model(model: Any) -> None:
    """transformers' own generate, and a cache that is cropped."""
    mine, text = under_pcp(model), prompts([21])
    with latents_rounded(model):
        wanted, logits = stock_text(model, text[0], 5), stock_logits(model, text)
    mine.generation_config.eos_token_id = None
    got = mine.generate(torch.tensor(text), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert got[0, 21:].tolist() == wanted
    result = mine(torch.tensor(text))
    cache = getattr(result, "cache", None) or result.past_key_values
    cache.crop(13)
    name = "cache" if hasattr(result, "cache") else "past_key_values"
    check_close(mine(torch.tensor([text[0][13:]]), **{name: cache}).logits[0], logits[13:])


@pytest.mark.parametrize(("given", "scales"), [(None, [1.0] * 3), (2, [2.0] * 3), ([0.5, 1, 4e-5], [0.5, 1.0, 4e-5])])
def test_scales_of_layers(model: Any, given: Any, scales: list[float]) -> None:
    caches = []
    for how in ({}, {"cache_dtype": FLOAT8, "cache_scale": given}):
        mine = copy_sharing_weights(model)
        blocks = enable_pcp(mine, **how).blocks
        prefill(mine, prompts([16]))
        caches.append(blocks.cache)
        assert [scale if scale is None else scale.item() for _, scale in map(blocks.layer, range(3))] == pytest.approx(
            scales if how else [None] * 3
        )
    plain, held = caches
    assert held.dtype == FLOAT8
    assert 4 * held.nbytes == plain.nbytes
    # The first layer's latents depend on no cache.
    assert torch.equal(held[0, 0].float(), (plain[0, 0] / scales[0]).clamp(-448, 448).to(FLOAT8).float())
    assert (held[2, 0].float().abs() == 448).any() == (scales[2] < 1e-3)


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"cache_dtype": torch.float8_e5m2}, ValueError, "cache_dtype must be None or torch.float8_e4m3fn, got torch.float8_e5m2"),
        ({"cache_dtype": "fp8"}, ValueError, "cache_dtype must be None or torch.float8_e4m3fn, got 'fp8'"),
        ({"cache_scale": 0.5}, ValueError, "cache_scale must come with cache_dtype=torch.float8_e4m3fn, got 0.5"),
        ({"cache_dtype": FLOAT8, "cache_scale": 0}, ValueError, "cache_scale must be positive, got 0"),
        ({"cache_dtype": FLOAT8, "cache_scale": float("nan")}, ValueError, "cache_scale must be positive, got nan"),
        ({"cache_dtype": FLOAT8, "cache_scale": [1, -1.0, 1]}, ValueError, "cache_scale must be positive, got -1.0"),
        (
            {"cache_dtype": FLOAT8, "cache_scale": [1.0]},
            ValueError,
            "cache_scale must be one number, or one for each of 3 layers, got 1",
        ),
        ({"cache_dtype": FLOAT8, "cache_scale": "1"}, TypeError, "cache_scale must be a number, or one for each layer, got '1'"),
        ({"cache_dtype": FLOAT8, "cache_scale": [1, 1, True]}, TypeError, "cache_scale must be a number, .* got True"),
    ],
)
def test_errors(model: Any, how: dict[str, Any], error: type[Exception], words: str) -> None:
    mine = copy_sharing_weights(model)
    with pytest.raises(error, match=f"enable_pcp: {words}"):
        enable_pcp(mine, **how)
    enable_pcp(mine)
    disable_pcp(mine)


def test_a_model_that_kernels_do_not_quantise() -> None:
    with pytest.raises(TypeError, match=r"model must be bfloat16, float16 or float32 for a float8 cache, got torch\.float64"):
        enable_pcp(build("v3").double(), cache_dtype=FLOAT8)


def test_ranks_with_other_caches(model: Any) -> None:
    def call(group: Any) -> str:
        mine = copy_sharing_weights(model)
        with pytest.raises(ValueError, match="enable_pcp: cache_dtype and cache_scale must be the same on all ranks"):
            enable_pcp(mine, group, cache_dtype=FLOAT8, cache_scale=1.0 + group.rank)
        enable_pcp(mine, group, cache_dtype=FLOAT8)
        return "done"

    assert play(2, call) == ["done"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("world", [1, 2])
def test_a_gpu_gives_what_a_cpu_does(world: int) -> None:
    """On average: sums in another order may round a latent to the next number of eight bits."""
    stock = build("v3")
    wanted = answers(under_pcp(stock))
    stock.cuda()
    for got in play(world, lambda group: answers(under_pcp(stock, group))):
        for name in ("whole", "chunks", "prefix", "decode", "extend"):
            assert (got[name].cpu() - wanted[name]).abs().mean() < 2e-3 * wanted[name].abs().mean()


@pytest.mark.gpu
@pytest.mark.parametrize("world", [1, 2])
def test_graphs(world: int) -> None:
    model = build("v3", first_k_dense_replace=3).cuda()

    def call(group: Any) -> None:
        texts, results = prompts([21, 3, 40]), []
        for capture in (False, True):
            mine = under_pcp(model, group)
            if capture:
                capture_graphs(mine, prefill_sizes=[(80, 200)], decode_sizes=[(3, 200)])
            results.append((prefill(mine, texts), decode(mine, [1, 2, 3]), generate(mine, texts, 4)))
        (whole, step, text), (whole_again, step_again, text_again) = results
        check_close(whole_again, whole)
        check_close(step_again, step)
        assert text_again == text

    play(world, call)
