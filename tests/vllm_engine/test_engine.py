"""vLLM's real engine on the CPU: the same tokens with and without the plug-in, by one rank and by two, and what ran on which rank.

Judged by the model of transformers in float64 on each whole text. Requests arrive among decodes, prompts are prefilled in pieces,
and some begin as others do, which is cached: see ``engine.waves``.
"""

import pytest
import torch
from engine import TOKENS, waves
from model import LAYERS

PROMPTS = {name: prompt for wave in waves() for name, (_, prompt) in wave.items()}
CACHED = {"shared": 160, "late too": 160, "cached": 320, "again": 64}
ALL = ["exchange", "prefill", "planner"]
PHASES = (
    {},
    {"workspace": 64},  # several calls a layer
    {"switch": []},
    {"switch": ["exchange"]},
    {"switch": ["prefill"]},
    {"switch": ["exchange", "prefill"]},
    {"switch": ALL},
    {"damage": "swap"},
    {"damage": "drop"},
)
HEADS = ",".join([*ALL, "heads"])
SPLIT = (
    {},
    {"split": "heads"},
    {"split": "heads", "workspace": 64},
    {"split": "heads", "switch": ALL},
    {"split": "heads", "switch": [*ALL, "heads"], "damage": "swap"},
)


@pytest.fixture(scope="module")
def truth(model):
    """Of each prompt: its tokens, and the log-probabilities of all tokens at each of them, in float64."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    found = {}
    with torch.no_grad():
        for name, prompt in PROMPTS.items():
            text, rows = list(prompt), []
            for _ in range(TOKENS):
                rows.append(stock(torch.tensor([text]), use_cache=False).logits[0, -1].log_softmax(-1))
                text.append(int(rows[-1].argmax()))
            found[name] = text[len(prompt) :], torch.stack(rows)
    return found


def error(outputs, truth):
    """The largest one of a log-probability."""
    return max(
        abs(truth[name][1][at, int(token)].item() - value)
        for name, output in outputs.items()
        for at, row in enumerate(output["logprobs"])
        for token, value in row.items()
    )


@pytest.fixture(scope="module")
def room(run, truth):
    """Twice the error of vLLM's own float32 on one rank."""
    (phase,), _ = run(1, "0")
    return 2 * error(phase["outputs"], truth)


def check(phase, truth, room):
    outputs = phase["outputs"]
    assert {name: output["tokens"] for name, output in outputs.items()} == {name: tokens for name, (tokens, _) in truth.items()}
    assert error(outputs, truth) <= room
    assert {name: output["cached"] for name, output in outputs.items() if output["cached"]} == CACHED


def ran(phase):
    """The counters of each rank, those of calls in a layer for each layer."""
    found = []
    for number, rank in enumerate(phase["ranks"]):
        assert rank["rank"] == number
        assert not rank["refused"]
        assert not rank["driver"]
        found.append({name: count if name in ("rows", "plan") else count / LAYERS for name, count in rank["counts"].items()})
    return found


def test_the_model_has_teeth(truth, room):
    """No choice between tokens is as close as what rounding does, and the most likely one is not all but certain."""
    assert 0 < room < 1e-3
    for tokens, logprobs in truth.values():
        best = logprobs.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 2 * room
        assert best[:, 0].max() < -0.05
        assert len(set(tokens)) > 2


@pytest.mark.parametrize("parts", ["0", None])
def test_one_rank_is_vllms(parts, run, truth, room):
    (phase,), log = run(1, parts)
    check(phase, truth, room)
    assert ran(phase) == [{}]
    assert phase["ranks"][0]["layers"] == {}
    assert "pcp-mla" not in log


def test_switched_off_by_the_environment(run, truth, room):
    (phase,), log = run(2, "0")
    check(phase, truth, room)
    assert ran(phase) == [{}, {}]
    assert "pcp-mla" not in log


@pytest.fixture(scope="module")
def both(run):
    return run(2, None, PHASES)


def everything(phase):
    """The parts ran on both ranks: in each layer as often as in any other, and no step was left out."""
    first, second = ran(phase)
    assert first["exchange"] == first["cache_write"] == second["exchange"] == second["cache_write"] > 0
    assert {name: second[name] for name in second if name in ("rows", "plan")} == {
        name: first[name] for name in first if name in ("rows", "plan")
    }
    assert first["prefill"] == first["rows"] + first.get("plan", 0)
    assert second["prefill"] == first["prefill"] - 1  # of the prompt of one token it has none
    return first


@pytest.mark.parametrize("number", [0, 1, 5, 6])
def test_the_plug_in(number, both, truth, room):
    phase = both[0][number]
    check(phase, truth, room)
    assert ("plan" in everything(phase)) is (number != 5)


def test_one_line_of_each_rank_says_what_runs(both):
    lines = [line for line in both[1].splitlines() if "pcp-mla" in line]
    assert len(lines) == 2
    assert all(line.endswith("takes the place of vLLM's exchange, prefill, planner") for line in lines)


@pytest.mark.parametrize(("number", "names"), [(2, []), (3, ["exchange"]), (4, ["prefill"])])
def test_switched_in_one_engine(number, names, both, truth, room):
    phase, whole = both[0][number], everything(both[0][5])
    check(phase, truth, room)
    only_some(phase, names, whole)


def only_some(phase, names, whole):
    kept = {"exchange": ("exchange", "cache_write"), "prefill": ("prefill", "rows")}
    kept = {counter for name in names for counter in kept[name]}
    first, second = ran(phase)
    assert first == {counter: count for counter, count in whole.items() if counter in kept}
    assert second.keys() == first.keys()


@pytest.mark.parametrize("part", ["exchange", "prefill"])
def test_one_part_by_the_environment(part, run, both, truth, room):
    (phase,), log = run(2, part)
    check(phase, truth, room)
    only_some(phase, [part], everything(both[0][5]))
    others = "; ".join(f"{other} not: PCP_MLA_VLLM leaves it out" for other in ALL if other != part)
    assert f"takes the place of vLLM's {part}; {others}" in log


@pytest.fixture(scope="module")
def split(run):
    return run(2, HEADS, SPLIT)


def test_heads_are_shared_out(split, truth, room):
    """In every step that is planned here, on both ranks, also on one without tokens; on a CPU if that is asked for."""
    assert "takes the place of vLLM's exchange, prefill, planner, heads\n" in split[1]
    by_tokens = everything(split[0][0])
    assert "heads" not in by_tokens
    for phase in split[0][1:3]:
        check(phase, truth, room)
        first, second = ran(phase)
        assert first == second == by_tokens | {"heads": by_tokens["plan"]}
    for number in (0, 3):
        check(split[0][number], truth, room)
        assert everything(split[0][number]) == by_tokens
    damaged = split[0][4]
    assert all(rank["heads"] == by_tokens["plan"] for rank in ran(damaged))
    assert error(damaged["outputs"], truth) > 1000 * room
    assert {name for name, output in damaged["outputs"].items() if output["tokens"] != truth[name][0]} >= {"shared", "chunked"}


@pytest.mark.parametrize(
    ("number", "seen"), [(7, {"shared", "chunked"}), (8, {"shared", "chunked", "late too", "cached", "again"})]
)
def test_damage_is_seen(number, seen, both, truth, room):
    """Two keys that change places, or context that is left out, change tokens; so equal tokens mean something."""
    outputs = both[0][number]["outputs"]
    everything(both[0][number])
    assert error(outputs, truth) > 1000 * room
    assert seen <= {name for name, output in outputs.items() if output["tokens"] != truth[name][0]}
    assert outputs["one token"]["tokens"] == truth["one token"][0]
