"""The plug-in's part heads: the same outputs as by tokens, in steps that all ranks choose alike."""

import threading
from types import SimpleNamespace

import pytest
import torch

from fake_vllm import modules
from pcp_mla.exchange.heads import HeadExchange, heads_of
from pcp_mla.groups import ExchangingHandle
from pcp_mla.integrations.vllm import heads, hooks, parts, prefill, register, switch
from pcp_mla.integrations.vllm.communicator import Communicator
from pcp_mla.integrations.vllm.heads import StepHeads, refusal
from pcp_mla.integrations.vllm.planner import StepPlanner
from pcp_mla.integrations.vllm.prefill import LayerPrefill
from pcp_mla.integrations.vllm.state import State
from pcp_mla.plan.dims import MLADims
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play
from test_vllm_latents import coordinator
from test_vllm_planner import BLOCK, BLOCKS, REQUESTS, batch_of, manager
from test_vllm_rows import ColumnParallelLinear, Impl, Layer, Metadata

NOPE, ROPE, V, RANK = 8, 4, 6, 12
ALL = ["exchange", "prefill", "planner", "heads"]

# The collective.


class Pynccl:
    """vLLM's communicator of a played rank."""

    disabled = False

    def __init__(self, group):
        self.group = group

    def all_gather(self, gathered, rows):
        gathered.copy_(self.group.all_gather(rows))

    def group_start(self):
        self.sent, self.into = {}, {}

    def send(self, tensor, dst):
        self.sent[dst] = tensor

    def recv(self, tensor, src):
        self.into[src] = tensor

    def group_end(self):
        sent, into = ([of[rank] for rank in range(self.group.world_size)] for of in (self.sent, self.into))
        whole = torch.empty(sum(map(len, into)), dtype=torch.uint8)
        self.group.all_to_all_into(whole, torch.cat(sent), list(map(len, into)), list(map(len, sent)))
        for part, found in zip(into, whole.split(list(map(len, into))), strict=True):
            part.copy_(found)


def played(group):
    pynccl = SimpleNamespace(pynccl_comm=Pynccl(group))
    return SimpleNamespace(rank_in_group=group.rank, world_size=group.world_size, device_communicator=pynccl, device_group=None)


def exchanged(group, make):
    """A block of r + 1 bytes for each rank r, which say from whom and for whom they are."""
    communicator = Communicator(make(group))
    assert isinstance(communicator, ExchangingHandle)
    me, world = communicator.rank, communicator.world_size
    sent = torch.tensor([10 * me + to for to in range(world) for _ in range(to + 1)], dtype=torch.uint8)
    received = torch.zeros(world * (me + 1), dtype=torch.uint8)
    communicator.all_to_all_into(received, sent, [me + 1] * world, [to + 1 for to in range(world)])
    return received.tolist()


def check_exchanged(results):
    for me, found in enumerate(results):
        assert found == [10 * of + me for of in range(len(results)) for _ in range(me + 1)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_blocks_by_sends_of_vllms_communicator(world):
    check_exchanged(play(world, lambda group: exchanged(group, played)))


def test_blocks_over_a_group_without_one():
    check_exchanged(run_distributed(2, exchanged, coordinator))


# A layer.


def layer_of(num_heads, cache_dtype="auto"):
    generator = torch.Generator().manual_seed(num_heads)
    impl = Impl(ColumnParallelLinear(torch.randn(num_heads * (NOPE + V), RANK, generator=generator) / RANK**0.5))
    impl.num_heads, impl.kv_cache_dtype = num_heads, cache_dtype
    return LayerPrefill(Layer(impl, torch.tensor([0.5])))


def cache_of(dtype):
    cache = torch.randn(REQUESTS * BLOCKS, BLOCK, RANK + ROPE, generator=torch.Generator().manual_seed(0))
    return cache if dtype == "auto" else (2 * cache).to(torch.float8_e4m3fn).view(torch.uint8)


def both_ways(group, new, computed, limit, num_heads, cache_dtype):
    """Outputs of a rank's tokens and pads by tokens, and by heads, in the layers of two steps."""
    layer, communicator = layer_of(num_heads, cache_dtype), Communicator(played(group))
    planner = StepPlanner(manager(group.world_size, group.rank), limit, communicator)
    shared = StepHeads(communicator, 200, layer.dims, torch.zeros(1))
    shared.split, cache = "heads", cache_of(cache_dtype)
    results = []
    for turn in range(2):
        local = planner.partition(batch_of(new, computed, [(turn + 2 * i) % REQUESTS for i in range(len(new))]))
        rows, padded = planner.plan.rows, local.num_tokens_after_padding
        generator = torch.Generator().manual_seed(10 * turn + group.rank)
        q = torch.randn(padded, num_heads, NOPE + ROPE, generator=generator)
        q[local.num_tokens :] = torch.nan
        outputs = []
        for of in (rows, rows._replace(heads=shared.of(planner.plan.meta))):
            assert (len(of.chunks) > 1) == (limit < 1000)
            for _ in range(2):  # layers
                output = torch.full((padded, num_heads * V), torch.nan)
                assert layer.forward_impl(q, 1, 2, cache, Metadata(of, local.num_tokens), output) is output
            assert not output[local.num_tokens :].any()
            outputs.append(output)
        results.append(outputs)
    return results


MIXED, ONE_TOKEN = ([13, 1, 30], [5, 0, 37]), ([1], [9])


@pytest.mark.parametrize(("world", "num_heads"), [(1, 2), (2, 2), (2, 5), (3, 5), (4, 4)])
@pytest.mark.parametrize(
    ("batch", "limit", "cache_dtype"),
    [
        (MIXED, 1000, "auto"),
        (MIXED, 44, "auto"),  # keys in windows
        (MIXED, 1000, "fp8"),
        (MIXED, 44, "fp8"),
        (ONE_TOKEN, 1000, "auto"),  # other ranks have none
        (ONE_TOKEN, 4, "auto"),
        (([64], [0]), 1000, "auto"),
    ],
)
def test_outputs_are_those_by_tokens(batch, limit, cache_dtype, world, num_heads, vllm):
    """Of a head nothing else is computed, but by a product of other widths, which may round otherwise."""
    for rank, steps in enumerate(play(world, lambda group: both_ways(group, *batch, limit, num_heads, cache_dtype))):
        for by_tokens, by_heads in steps:
            assert by_tokens.any() or (rank > 0 and batch is ONE_TOKEN)
            torch.testing.assert_close(by_heads, by_tokens, rtol=1e-6, atol=1e-6)
    assert parts.counts["heads"] == 2 * 2 * world


def test_a_rank_expands_its_heads_alone(vllm, monkeypatch):
    widths, own = [], prefill.expand_into

    def expand_into(latents, rows, weight, k, v):
        widths.append((weight.shape[0] // (NOPE + V), k.shape[1], v.shape[1]))
        own(latents, rows, weight, k, v)

    monkeypatch.setattr(prefill, "expand_into", expand_into)
    play(2, lambda group: both_ways(group, [30], [8], 1000, 5, "auto"))
    assert sorted(widths) == [(2,) * 3] * 4 + [(3,) * 3] * 4 + [(5,) * 3] * 8
    assert [heads_of(5, 2, rank) for rank in range(2)] == [(0, 3), (3, 5)]


def test_a_module_that_changed_is_not_read_as_a_weight(vllm):
    layer = layer_of(2)
    planner = StepPlanner(manager(1, 0), 1000, None)
    local = planner.partition(batch_of([5], [0], [1]))
    layer._linear.register_forward_hook(print)
    rows = planner.plan.rows._replace(heads=SimpleNamespace(exchange=None))
    q, output = torch.zeros(5, 2, NOPE + ROPE), torch.zeros(5, 2 * V)
    with pytest.raises(RuntimeError, match="kv_b_proj must stay plain, as the layer was made: set PCP_MLA_VLLM without heads"):
        layer.forward_impl(q, 1, 2, cache_of("auto"), Metadata(rows, local.num_tokens), output)


# In which steps.

DIMS = MLADims(4, NOPE, ROPE, V, RANK)


def chosen(group, make):
    """Of short and long steps, fresh and behind context, those that go by heads."""
    made = make(group)
    planner = StepPlanner(manager(group.world_size, group.rank), 1000, None)
    found = []
    for new, computed in (([8], [0]), ([100], [0]), ([100], [50]), ([8], [100]), ([40, 40], [9, 9])):
        planner.partition(batch_of(new, computed, list(range(len(new)))))
        found.append(made.of(planner.plan.meta) is not None)
    return found


def made(group, split="auto", room=200):
    found = StepHeads(Communicator(played(group)), room, DIMS, torch.zeros(1))
    assert isinstance(found.exchange, HeadExchange)
    found.split = split
    return found


def test_what_costs_less_is_chosen(vllm, monkeypatch):
    def heads_pay(exchange, dims, dtype, meta):
        assert isinstance(exchange, HeadExchange)
        assert (dims, dtype) == (DIMS, torch.float32)
        return meta.num_kv_tokens > 100

    monkeypatch.setattr(heads, "heads_pay", heads_pay)
    assert play(2, lambda group: chosen(group, made)) == [[False, False, True, True, False]] * 2


def test_gpus_of_several_kinds_come_to_no_costs(vllm, monkeypatch, caplog):
    like = SimpleNamespace(is_cuda=True, device=torch.device("cpu"), dtype=torch.float32)
    monkeypatch.setattr(heads, "heads_pay", lambda *_: True)
    for kinds, wanted in ((("H100", "H100"), True), (("H100", "H200"), False)):
        names = dict(zip(("rank 0", "rank 1"), kinds, strict=True))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, names=names: names[threading.current_thread().name])
        caplog.clear()
        results = play(2, lambda group: chosen(group, lambda g: StepHeads(Communicator(played(g)), 200, DIMS, like)))
        assert results == [[wanted] * 5] * 2
        words = "pcp-mla: heads are not shared out: ranks have GPUs of several kinds, H100, H200"
        assert [record.getMessage() for record in caplog.records] == ([] if wanted else [words] * 2)


def test_on_a_cpu_only_if_it_is_asked_for(vllm):
    assert play(2, lambda group: chosen(group, made)) == [[False] * 5] * 2
    assert play(2, lambda group: chosen(group, lambda g: made(g, "heads"))) == [[True] * 5] * 2


def test_steps_that_there_is_no_room_for(vllm):
    """The second and the third have 50 rows on each rank, the last one 40."""
    assert play(2, lambda group: chosen(group, lambda g: made(g, "heads", 49))) == [[True, False, False, True, True]] * 2


@pytest.fixture
def planned(vllm):
    """vLLM's manager with a planner, and what plans a step."""

    def start(names):
        vllm()
        register()
        made = modules()[1].PCPManager()
        parts.layers.update({part: {"one": ""} for part in ALL})
        switch(names)
        State.planner, State.heads = StepPlanner(manager(2, 0), 1000, None), SimpleNamespace(of=lambda meta: ("heads of", meta))
        made.partition_batch(batch_of([9], [3], [0]))
        return State.planner.plan

    return start


def test_a_planned_step_is_shared_out(planned):
    plan = planned(ALL)
    assert plan.rows.heads == ("heads of", plan.meta)


@pytest.mark.parametrize("names", [ALL[:3], ["prefill", "planner", "heads"]])
def test_steps_without_the_part_or_one_that_it_needs(names, planned):
    assert planned(names).rows.heads is None


# Of which layers, and when its exchange is made.


@pytest.mark.parametrize(
    ("world", "widths", "plain", "why"),
    [
        (2, (4, NOPE), True, ""),
        (4, (4, NOPE), True, ""),
        (5, (4, NOPE), True, "4 heads for 5 ranks"),
        (2, (4, NOPE), False, "a kv_b_proj that is more than a product with its weight"),
        (2, (4, NOPE + 8), True, "layers of several widths"),
    ],
)
def test_layers(world, widths, plain, why):
    layer = layer_of(4)
    other = SimpleNamespace(dims=MLADims(widths[0], widths[1], ROPE, V, RANK))
    linear = ColumnParallelLinear(torch.zeros(1, 1), quantised=not plain)
    assert refusal(layer, [layer, other], linear, world) == why


def make_layers(vllm, monkeypatch, asked):
    vllm()
    if asked is not None:
        monkeypatch.setenv(parts.VARIABLE, asked)
    register()
    attention, _ = modules()
    monkeypatch.setattr(prefill, "WORKSPACE", prefill.Workspace())
    monkeypatch.setattr(hooks, "WORKSPACE", prefill.WORKSPACE)
    monkeypatch.setattr(State, "communicator", Communicator(played(SimpleNamespace(rank=0, world_size=1))))
    for name in ("one", "two"):
        impl = attention.Impl()
        impl.kv_b_proj = ColumnParallelLinear(torch.zeros(2 * 16, 12))
        layer = attention.MLAAttention(name, impl)
    return layer


def profile_run(layer, monkeypatch):
    made = []
    monkeypatch.setattr(heads, "StepHeads", lambda *args: made.append(args) or "made")
    layer.forward_impl(torch.zeros(5), torch.zeros(5, 12), torch.zeros(5, 1, 4), None, None, output=torch.zeros(5))
    return made


def test_the_profile_run_makes_the_exchange(vllm, monkeypatch):
    layer = make_layers(vllm, monkeypatch, "exchange,prefill,planner,heads")
    assert parts.layers["heads"] == {"one": "", "two": ""}
    ((communicator, room, dims, like),) = profile_run(layer, monkeypatch)
    assert State.heads == "made"
    assert communicator is State.communicator
    assert room == 64 // 2 + 2 * 3  # tokens of a step over the ranks, and what two chunks of a request are rounded up by
    assert dims == MLADims(2, 8, 4, 8, 12)
    assert like.dtype == torch.float32


@pytest.mark.parametrize("asked", [None, "exchange,prefill,planner", "prefill,planner,heads", "exchange,prefill,heads"])
def test_no_exchange_is_made_that_nobody_needs(asked, vllm, monkeypatch):
    """And what was left out at the start cannot be switched on later."""
    layer = make_layers(vllm, monkeypatch, asked)
    assert profile_run(layer, monkeypatch) == []
    assert State.heads is None
    if asked is None:
        switch(ALL)
        parts.made("planner", "manager", "")
        assert not parts.runs("heads")
        assert parts.runs("planner")
        why = "its exchange is made when the engine starts"
        assert parts.summary().endswith(f"exchange, prefill, planner; heads not: {why}")


def test_summary(vllm):
    switch(["exchange", "heads"])
    words = "takes the place of vLLM's exchange; prefill not: {0}; planner not: {0}; heads not: it needs prefill, planner"
    assert parts.summary() == words.format("PCP_MLA_VLLM leaves it out")
    switch(ALL)
    assert parts.summary() == "takes the place of vLLM's exchange, prefill, planner, heads"
    switch(ALL[:3])  # it is off by default, which is not worth a word
    assert parts.summary() == "takes the place of vLLM's exchange, prefill, planner"
