"""transformers' own DeepSeek models under PCP give the logits and the text that they give without it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import transformers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from pcp_mla import PCPPlanner
from pcp_mla.integrations.transformers import copy_sharing_weights, decode, disable_pcp, enable_pcp, extend, generate, prefill
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play

VOCABULARY = 50
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}
# Lengths around 2P for P = 2 and 4, and some shorter than 2P.
LENGTHS = [13, 1, 30, 8, 3, 4, 9]


def build(name: str, **changes: Any) -> Any:
    """A small model whose logits depend strongly on what attention reads."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 20,
        "q_lora_rank": 28,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "initializer_range": 0.3,
    }
    torch.manual_seed(3)
    if name.startswith("glm"):
        return transformers.Glm4MoeLiteForCausalLM(transformers.Glm4MoeLiteConfig(**(common | changes))).eval()
    if name.startswith("v2"):
        return DeepseekV2ForCausalLM(DeepseekV2Config(**(common | changes))).eval()
    return DeepseekV3ForCausalLM(DeepseekV3Config(**(common | changes))).eval()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    # Each played rank is a thread with a pool of its own, and tiny products gain nothing from a second core.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CASES = {
    "v3": {},
    "v3 yarn": {"rope_parameters": YARN},
    "v3 rope halves": {"rope_interleave": False},
    "v2": {"q_lora_rank": None},
    "v2 yarn": {"rope_parameters": YARN, "topk_method": "group_limited_greedy"},
}
if hasattr(transformers, "Glm4MoeLiteForCausalLM"):  # GLM-4.7-Flash, whose heads are wider for values than for keys
    CASES["glm"] = {"num_attention_heads": 5, "num_key_value_heads": 5, "v_head_dim": 24}


@pytest.fixture(scope="module", params=list(CASES))
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param, **CASES[request.param])


def prompts(lengths: list[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def stock_logits(model: Any, requests: list[list[int]]) -> torch.Tensor:
    """Each request on its own."""
    return torch.cat([model(torch.tensor([request]), use_cache=False).logits[0] for request in requests if request])


def stock_text(model: Any, prompt: list[int], n: int) -> list[int]:
    """Greedy, without a cache: nothing here is shared with the code under test."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(stock_logits(model, [tokens])[-1].argmax()))
    return tokens[len(prompt) :]


def check_close(logits: torch.Tensor, wanted: torch.Tensor) -> None:
    # Orders of summation differ, nothing else: far below the differences that a wrong row makes (see the next test).
    assert logits.shape == wanted.shape
    assert float((logits - wanted).abs().max()) < 2e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_prefill_logits(model: Any, world_size: int, layout: str) -> None:
    requests = prompts()

    def rank(group: Any) -> torch.Tensor:
        mine = copy_sharing_weights(model)
        enable_pcp(mine, group, layout)
        return prefill(mine, requests)

    wanted = stock_logits(model, requests)
    for logits in play(world_size, rank):
        check_close(logits, wanted)


def test_logits_depend_on_what_attention_reads(model: Any) -> None:
    prompt = prompts([30])[0]
    other = [prompt[1], prompt[0], *prompt[2:]]
    difference = (stock_logits(model, [prompt]) - stock_logits(model, [other]))[2:].abs().amax(dim=1)
    # All later tokens tell two swapped ones apart, most of them by far more than check_close allows.
    assert float(difference.median()) > 1e-3 * float(stock_logits(model, [prompt]).abs().max())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_generate(model: Any, world_size: int) -> None:
    requests = prompts([13, 1, 6])

    def rank(group: Any) -> list[list[int]]:
        mine = copy_sharing_weights(model)
        enable_pcp(mine, group)
        return generate(mine, requests, 6)

    wanted = [stock_text(model, prompt, 6) for prompt in requests]
    assert play(world_size, rank) == [wanted] * world_size
    assert len({token for text in wanted for token in text}) > 3  # else equality says little


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
def test_prefill_in_chunks_then_decode(model: Any, layout: str) -> None:
    requests = prompts([19, 2, 0, 11])
    chunks = [[r[:7] for r in requests], [r[7:8] for r in requests], [r[8:] for r in requests]]
    token_after = [5, 6, 7, 8]

    def rank(group: Any) -> list[torch.Tensor]:
        mine = copy_sharing_weights(model)
        enable_pcp(mine, group, layout)
        first = prefill(mine, chunks[0])
        return [first, extend(mine, chunks[1]), extend(mine, chunks[2]), decode(mine, token_after)]

    def rows(upto: int, new: list[list[int]]) -> torch.Tensor:
        """Stock logits of each request's new tokens, after its first ``upto``."""
        picked = [stock_logits(model, [r[:upto] + n])[-len(n) :] for r, n in zip(requests, new, strict=True) if n]
        return torch.cat(picked)

    for first, second, third, fourth in play(2, rank):
        check_close(first, rows(0, chunks[0]))
        check_close(second, rows(7, chunks[1]))
        check_close(third, rows(8, chunks[2]))
        check_close(fourth, rows(19, [[token] for token in token_after]))


def stock_rows(model: Any, prefixes: list[list[int]], new: list[list[int]]) -> torch.Tensor:
    """Stock logits of each request's new tokens, in one pass over the whole request."""
    return torch.cat([stock_logits(model, [old + n])[-len(n) :] for old, n in zip(prefixes, new, strict=True) if n])


def chunked_then_shared(model: Any, group: Any, layout: str = "unpadded", split: str = "auto") -> list[torch.Tensor]:
    """A prefill in steps; requests that share its first one's prefix, up to within a block; a decode; an extension in steps."""
    first, new = prompts([43, 5]), prompts([0, 6, 9, 4])
    enable_pcp(model, group, layout, split)
    logits = [prefill(model, first, chunk_tokens=10)]
    logits.append(prefill(model, new, chunk_tokens=7, prefix=[(0, 43), (0, 21), (0, 32), None]))
    logits.append(decode(model, [1, 2, 3, 4]))
    logits.append(extend(model, [[5], [], [6, 7, 8], [9]]))
    logits.append(prefill(model, [[], [7, 8]], prefix=[(1, 16), (1, 16)]))
    return logits


def check_chunked_then_shared(model: Any, logits: list[torch.Tensor]) -> None:
    first, new = prompts([43, 5]), prompts([0, 6, 9, 4])
    check_close(logits[0], stock_logits(model, first))
    texts = [first[0], first[0][:21], first[0][:32], []]
    further = [new, [[1], [2], [3], [4]], [[5], [], [6, 7, 8], [9]]]
    for rows, step in zip(logits[1:], further, strict=False):
        check_close(rows, stock_rows(model, texts, step))
        texts = [old + n for old, n in zip(texts, step, strict=True)]
    check_close(logits[4], stock_rows(model, [texts[1][:16]], [[7, 8]]))


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_chunked_prefill_and_shared_prefix(model: Any, world_size: int, layout: str) -> None:
    for logits in play(world_size, lambda group: chunked_then_shared(copy_sharing_weights(model), group, layout)):
        check_chunked_then_shared(model, logits)


def test_one_plan_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plans = build("v3"), []
    plan = PCPPlanner.plan
    monkeypatch.setattr(PCPPlanner, "plan", lambda self, lengths, *rest: plans.append(lengths) or plan(self, lengths, *rest))
    enable_pcp(model)
    prefill(model, prompts([9, 0, 4]), chunk_tokens=6)
    decode(model, [1, 2, 3])
    assert plans == [[6], [3, 3], [1], [1, 1, 1]]  # of requests that have tokens in the step


def test_rank_without_tokens(model: Any) -> None:
    # Two tokens over four ranks: ranks 2 and 3 have none.
    def rank(group: Any) -> torch.Tensor:
        mine = copy_sharing_weights(model)
        enable_pcp(mine, group)
        return prefill(mine, [[7], [9]])

    for logits in play(4, rank):
        check_close(logits, stock_logits(model, [[7], [9]]))


def in_process(group: Any) -> list[torch.Tensor]:
    return chunked_then_shared(build("v3"), group)


def test_processes() -> None:
    for logits in run_distributed(2, in_process):
        check_chunked_then_shared(build("v3"), logits)


def test_disable_restores_the_model(model: Any) -> None:
    mine = copy.deepcopy(model)
    requests = prompts([9])
    before = stock_logits(mine, requests)
    enable_pcp(mine)
    prefill(mine, requests)
    disable_pcp(mine)
    assert torch.equal(stock_logits(mine, requests), before)
    with pytest.raises(ValueError, match="prefill: model must be under PCP, call enable_pcp first"):
        prefill(mine, requests)


def test_copy_shares_weights_and_nothing_else(model: Any) -> None:
    other = copy_sharing_weights(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    enable_pcp(other)
    stock_logits(model, prompts([3]))  # the original is not under PCP


@pytest.mark.parametrize(
    ("failing", "step"),
    [
        pytest.param(1, lambda model: decode(model, [1]), id="decode"),
        pytest.param(1, lambda model: extend(model, [[1, 2, 3]]), id="extend"),
        pytest.param(2, lambda model: prefill(model, prompts([30]), chunk_tokens=20), id="second chunk"),
        pytest.param(2, lambda model: prefill(model, prompts([30]), chunk_tokens=20, prefix=[(0, 19)]), id="shared prefix"),
        pytest.param(1, lambda model: generate(model, [[1, 2]], 2), id="generate"),
    ],
)
def test_failed_step_leaves_the_cache(failing: int, step: Any) -> None:
    model, runs = build("v3"), []
    context = enable_pcp(model)
    prefill(model, prompts([21]))

    def break_down(*_: Any) -> None:
        runs.append(None)
        if len(runs) == failing:
            raise KeyError("broken")

    handle = model.model.layers[2].mlp.register_forward_pre_hook(break_down)
    with pytest.raises(KeyError, match="broken"):
        step(model)
    handle.remove()
    assert context.requests.lengths == [21]
    assert len(context.blocks._free) == context.blocks.cache.shape[1] - len(context.requests.blocks[0])
    logits = decode(model, [1])
    disable_pcp(model)
    check_close(logits, stock_logits(model, [[*prompts([21])[0], 1]])[-1:])


def test_no_quadratic_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("v3")
    enable_pcp(model)
    widest = []
    monkeypatch.setattr(
        model.model.layers[0], "forward", lambda hidden, attention_mask=None, **_: widest.append(attention_mask.numel()) or hidden
    )
    prefill(model, prompts())
    assert widest == [1]


# Bad input.


def test_wrong_model() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
        )
    )
    for call in (enable_pcp, disable_pcp, lambda m: prefill(m, [[1]])):
        missing = "LlamaAttention in layer 0, without kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj, qk_nope_head_dim"
        with pytest.raises(TypeError, match=f"MLA as self_attn in every layer, got a LlamaForCausalLM with a {missing}"):
            call(llama)
        with pytest.raises(TypeError, match=r"must be a causal language model .*, got a str"):
            call("model")


def test_length_dependent_rope() -> None:
    model = build("v3", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(NotImplementedError, match="rope_type must not be one of dynamic, longrope, got 'dynamic'"):
        enable_pcp(model)


def test_bad_calls() -> None:
    model = build("v3")
    with pytest.raises(ValueError, match="disable_pcp: model must be under PCP"):
        disable_pcp(model)
    with pytest.raises(ValueError, match="layout must be one of unpadded, padded, got 'ragged'"):
        enable_pcp(model, layout="ragged")
    with pytest.raises(TypeError, match="enable_pcp: group must be a ProcessGroup, a PlayedGroup or None, got int"):
        enable_pcp(model, 2)
    enable_pcp(model)
    with pytest.raises(ValueError, match="model must not be under PCP already"):
        enable_pcp(model)
    with pytest.raises(ValueError, match=r"call it as a whole"):
        model.model(torch.tensor([[1]]))
    with pytest.raises(ValueError, match=r"prefill: requests must hold token ids in 0\.\.49, got 50 in request 1"):
        prefill(model, [[1], [2, 50]])
    with pytest.raises(TypeError, match="prefill: requests must be a list with a list of token ids per request, got str"):
        prefill(model, "text")
    with pytest.raises(TypeError, match="requests must be a list"):
        prefill(model, [1, 2])
    with pytest.raises(ValueError, match="requests must hold at least one token, got none"):
        prefill(model, [[], []])
    with pytest.raises(ValueError, match="prefill: chunk_tokens must be at least 1, got 0"):
        prefill(model, [[1]], chunk_tokens=0)
    with pytest.raises(ValueError, match="generate: n must be at least 1, got 0"):
        generate(model, [[1]], 0)
    with pytest.raises(ValueError, match="prompts must not be empty, got no tokens for prompt 1"):
        generate(model, [[1], []], 2)
    prefill(model, [[1], [2]])
    with pytest.raises(
        ValueError, match="decode: tokens must have one entry for each of the 2 requests of the last prefill, got 1"
    ):
        decode(model, [1])
    with pytest.raises(
        ValueError, match="extend: requests must have one entry for each of the 2 requests of the last prefill, got 3"
    ):
        extend(model, [[1], [2], [3]])


@pytest.mark.parametrize(
    ("prefix", "error", "message"),
    [
        (3, TypeError, r"must be a list with a \(request, tokens\) or None for each of the 2 requests, got int"),
        ([None], ValueError, r"must have a \(request, tokens\) or None for each of the 2 requests, got 1"),
        ([None, 3], TypeError, r"must have a \(request, tokens\) or None for each of the 2 requests, got 3"),
        ([None, (0, 1.5)], TypeError, r"must have a .* for each of the 2 requests, got \(0, 1.5\)"),
        ([(2, 0), None], ValueError, "must name one of the 2 requests of the last prefill, got 2"),
        ([(-1, 0), None], ValueError, "must name one of the 2 requests of the last prefill, got -1"),
        ([None, (1, 4)], ValueError, "must have 0 to 3 tokens of request 1, got 4"),
        ([None, (1, -1)], ValueError, "must have 0 to 3 tokens of request 1, got -1"),
    ],
)
def test_bad_prefix(prefix: Any, error: type[Exception], message: str) -> None:
    model = build("v3")
    enable_pcp(model)
    with pytest.raises(ValueError, match="must name one of the 0 requests of the last prefill, got 0"):
        prefill(model, [[1]], prefix=[(0, 0)])
    prefill(model, [[1, 2], [3, 4, 5]])
    with pytest.raises(error, match=f"prefill: prefix {message}"):
        prefill(model, [[1], [2]], prefix=prefix)
    assert model.__dict__["_pcp"].requests.lengths == [2, 3]
    got = prefill(model, [[1], [2]], prefix=[(1, 3), (0, 0)])  # all of a request, and none
    disable_pcp(model)
    check_close(got, stock_logits(model, [[3, 4, 5, 1], [2]])[3:])
