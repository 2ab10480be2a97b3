"""What the plug-in takes of a vLLM, and what it leaves: environment, versions, layers."""

import inspect
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fake_vllm import MLA_ATTENTION, PCP_MANAGER, modules, write_vllm
from pcp_mla.integrations.vllm import finder, parts, register, switch
from pcp_mla.integrations.vllm.prefill import LayerPrefill

ALL = ["exchange", "prefill", "planner"]

# What is asked for.


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, ("exchange", "prefill", "planner")),
        ("", ("exchange", "prefill", "planner")),
        (" 1 ", ("exchange", "prefill", "planner")),
        ("0", ()),
        ("prefill", ("prefill",)),
        (" prefill , exchange,", ("prefill", "exchange")),
    ],
)
def test_the_variable(value, names, vllm, monkeypatch):
    assert parts.wanted(value) == names
    if value is not None:
        monkeypatch.setenv(parts.VARIABLE, value)
    assert parts.from_environment() == names


def test_the_variable_names_a_part_that_there_is_not(vllm, monkeypatch):
    vllm()
    monkeypatch.setenv(parts.VARIABLE, "prefill,decode")
    with pytest.raises(ValueError, match="PCP_MLA_VLLM must be 0, 1 or some of exchange, prefill, planner, heads, got 'decode'"):
        register()
    assert not finders()


def test_switch(vllm):
    switch(["prefill", "exchange"])
    assert parts.enabled == {"prefill", "exchange"}
    parts.refuse("exchange", "no place")
    assert parts.enabled == {"prefill"}
    switch(["exchange"])
    assert parts.enabled == set()
    switch({"prefill"})
    with pytest.raises(ValueError, match="switch: names must be some of exchange, prefill, planner, heads, got decode"):
        switch(["decode", "prefill"])
    assert parts.enabled == {"prefill"}


def test_the_first_reason_stays(vllm):
    parts.refuse("prefill", "")
    assert not parts.refused
    parts.refuse("prefill", "first")
    parts.refuse("prefill", "second")
    assert parts.refused == {"prefill": "first"}


def test_parameters_are():
    def looked_at(self, a, b=1, extra=None):
        pass

    assert parts.parameters_are(looked_at, "self", "a", "b", "extra") == ""
    assert parts.parameters_are(looked_at, "self", "a", "b", more=("extra",)) == ""
    assert parts.parameters_are(looked_at, "self", "a", "b", "extra", more=("later",)) == ""
    for names, more in ((("self", "a", "b"), ()), (("self", "b", "a"), ("extra",)), (("self", "a", "b"), ("later",))):
        why = parts.parameters_are(looked_at, *names, more=more)
        assert why.endswith(f"looked_at takes (self, a, b, extra), not ({', '.join((*names, *more))})")
    assert "takes (self, a, b, extra), not" in parts.parameters_are(looked_at, "self", "a", "b", "extra", "c")


@pytest.mark.parametrize(
    ("names", "refused", "layers", "line"),
    [
        (ALL, {}, {}, "exchange, prefill, planner"),
        (["exchange", "planner"], {}, {}, "exchange; prefill not: OUT PLANNER"),
        (
            ["planner"],
            {"exchange": "odd"},
            {},
            "nothing; exchange not: odd; prefill not: OUT PLANNER",
        ),
        (ALL, {}, {"prefill": {"a": "LoRA", "b": "LoRA"}}, "exchange; prefill not: LoRA PLANNER"),
        (
            ALL,
            {},
            {"prefill": {"a": "LoRA", "b": ""}},
            "exchange; prefill not: LoRA in 1 of 2 layers PLANNER",
        ),
        (ALL, dict.fromkeys(ALL, "odd"), {}, "nothing; exchange not: odd; prefill not: odd; planner not: odd"),
    ],
)
def test_summary(names, refused, layers, line, vllm):
    parts.refused.update(refused)
    parts.layers.update(layers)
    switch(names)
    line = line.replace(" PLANNER", "; planner not: it needs prefill").replace("OUT", "PCP_MLA_VLLM leaves it out")
    assert parts.summary() == f"takes the place of vLLM's {line}"


# Into which modules.


def finders():
    return [found for found in sys.meta_path if isinstance(found, finder._Finder)]


def changed(module):
    return {
        name for name in ("maybe_gather_mla_latent_cache_inputs", "build_mla_chunked_context_metadata") if wrapped(module, name)
    }


def is_ours(layer):
    calls = layer.impl.forward_mha, getattr(layer.forward_impl, "__wrapped__", None)
    return all(isinstance(getattr(call, "__self__", None), LayerPrefill) for call in calls)


def wrapped(owner, name):
    return hasattr(getattr(owner, name), "__wrapped__")


def test_modules_are_changed_when_vllm_imports_them(vllm):
    vllm()
    register()
    assert not any(name.startswith("vllm") for name in sys.modules)
    attention, manager = modules()
    assert len(changed(attention)) == 2
    assert wrapped(attention.MLAAttention, "__init__")
    assert wrapped(attention.MLACommonMetadataBuilder, "build")
    assert wrapped(manager.PCPManager, "partition_batch")
    # what vLLM and torch.compile read of a module is still its own
    gather = attention.maybe_gather_mla_latent_cache_inputs
    assert "Vanilla gather" in inspect.getsource(gather)
    assert inspect.getsource(attention).strip().startswith("from types import")
    assert parts.parameters_are(gather, "kv_c_normed", "k_pe", "slot_mapping", "num_decode_tokens", "use_pcp", more=("x",))


def test_modules_that_are_there_already_are_changed_too(vllm):
    vllm()
    attention, manager = modules()
    assert not changed(attention)
    register()
    assert len(changed(attention)) == 2
    assert wrapped(manager.PCPManager, "partition_batch")


def test_everything_is_changed_once(vllm):
    vllm()
    register()
    register()
    attention, manager = modules()
    register()
    assert len(finders()) == 1
    for owner, name in (
        (attention, "maybe_gather_mla_latent_cache_inputs"),
        (attention, "build_mla_chunked_context_metadata"),
        (attention.MLAAttention, "__init__"),
        (attention.MLACommonMetadataBuilder, "build"),
        (manager.PCPManager, "partition_batch"),
        (manager.PCPManager, "prepare_attn"),
        (manager.PCPManager, "restore_hidden_states"),
    ):
        assert not hasattr(getattr(owner, name).__wrapped__, "__wrapped__"), name


@pytest.mark.parametrize("value", ["0", " 0 "])
def test_0_changes_nothing(value, vllm, monkeypatch):
    vllm()
    monkeypatch.setenv(parts.VARIABLE, value)
    register()
    assert not finders()
    assert not changed(modules()[0])


def test_without_vllm_nothing_happens(vllm, monkeypatch):
    monkeypatch.setattr(finder.importlib.util, "find_spec", lambda name: None)
    register()
    assert not finders()
    assert not parts.enabled


@pytest.mark.parametrize(
    ("old", "new", "part", "why"),
    [
        ("use_pcp, SHARDED", "use_pcp, scale", "exchange", "maybe_gather_mla_latent_cache_inputs takes"),
        ("kv_cache_dtype, k_scale)", "kv_cache_dtype)", "exchange", "do_kv_cache_update takes"),
        ("attn_metadata, k_scale, output", "attn_metadata, output", "prefill", "forward_mha takes"),
        ("fast_build=False", "for_graphs=False", "prefill", "build takes"),
    ],
)
def test_an_unknown_signature_disables_its_part_with_one_warning(old, new, part, why, vllm, caplog):
    assert old in MLA_ATTENTION
    vllm(attention=MLA_ATTENTION.replace(old, new))
    with caplog.at_level(logging.INFO):
        register()
        attention, _ = modules()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"pcp-mla: {part} stays vLLM's own: " in record.message
    assert why in record.message
    other = {"exchange": "prefill", "prefill": "exchange"}[part]
    assert parts.enabled == {other, "planner"}
    mine = {"exchange": "maybe_gather_mla_latent_cache_inputs", "prefill": "build_mla_chunked_context_metadata"}
    assert changed(attention) == {mine[other]}
    layer = attention.MLAAttention()
    assert is_ours(layer) is (part == "exchange")
    assert wrapped(layer.impl, "do_kv_cache_update") is (part == "prefill")


@pytest.mark.parametrize("missing", ["maybe_gather_mla_latent_cache_inputs", "class MLAAttention", "partition_batch", "def build("])
def test_a_missing_name_disables_all(missing, vllm, caplog):
    vllm(
        attention=MLA_ATTENTION.replace(
            missing, missing.replace("MLAAtt", "Att").replace("maybe", "may").replace("build(", "make(")
        ),
        manager=PCP_MANAGER.replace(missing, "other"),
    )
    register()
    attention, _ = modules()
    assert sorted(record.message.split(" ")[1] for record in caplog.records) == sorted(ALL)
    assert all(
        "this vLLM is not known (" in record.message and missing.split(" ")[-1].strip("(") in record.message
        for record in caplog.records
    )
    assert not parts.enabled
    if missing == "partition_batch":  # the other module was changed before, to no effect
        assert attention.maybe_gather_mla_latent_cache_inputs(0, 1, 2, 0, True) == (0, 1, 2)
        assert attention.build_mla_chunked_context_metadata(context_lens_cpu=None) == "chunks"


def test_one_line_says_what_runs(vllm, caplog):
    vllm()
    register()
    attention, manager = modules()
    attention.MLAAttention()
    with caplog.at_level(logging.INFO):
        manager.PCPManager()
        manager.PCPManager()
    (record,) = caplog.records
    assert record.name == "vllm.pcp_mla"
    why = "a manager that is not known (it has no _block_tables)"
    assert record.message.endswith(f"takes the place of vLLM's exchange, prefill; planner not: {why}")


LATER = f"""{PCP_MANAGER}
    def set_block_tables(self, block_tables):
        self.given = block_tables
"""


def test_a_manager_that_is_made_before_the_layers(vllm, caplog):
    """As that of 0.33: nothing is said before there are layers, and its batches are not planned here."""
    vllm(manager=LATER)
    with caplog.at_level(logging.INFO):
        register()
        attention, module = modules()
        made = module.PCPManager()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "planner stays vLLM's own: a manager that is made before the layers" in caplog.records[0].message
        attention.MLAAttention()
        made.set_block_tables("tables")
    assert made.given == "tables"
    assert "takes the place of vLLM's exchange, prefill; planner not: a manager that is made" in caplog.records[1].message


QUIET = """
import os, sys, torch

def refuse(*args, **kwargs):
    raise AssertionError("the driver was asked")

for name in ("_lazy_init", "is_available", "device_count", "current_device", "get_device_capability", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
from pcp_mla.integrations.vllm import register
register()
assert not any(name.split(".")[0] in ("vllm", "triton.runtime.jit") for name in sys.modules)
child = os.fork()
if child == 0:  # a worker that never calls the plug-in
    code = 1
    try:
        from vllm.model_executor.layers.attention import mla_attention
        assert hasattr(mla_attention.maybe_gather_mla_latent_cache_inputs, "__wrapped__")
        code = 0
    finally:
        os._exit(code)
assert os.waitpid(child, 0)[1] == 0
assert not torch.cuda.is_initialized()
"""


def test_forked_workers_have_it_and_the_driver_sleeps(tmp_path):
    write_vllm(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{QUIET}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Of which layers.


def change(attention, layer=None, impl=None, **config):
    """A layer with what is changed of it, made under a configuration with what is changed of it."""
    for path, value in config.items():
        owner, _, name = path.rpartition("__")
        setattr(getattr(attention.CONFIG, owner) if owner else attention.CONFIG, name, value)

    class Own(attention.Impl):
        def forward_mha(self, *args):
            pass

    class Inherited(Own):
        pass

    kind = type("Layer", (attention.MLAAttention,), layer or {})
    return kind(impl={"own": Own, "inherited": Inherited, None: attention.Impl}[impl]())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"layer": {"use_sparse": True}}, "sparse MLA"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"lora_config": object()}, "LoRA"),
        ({"layer": {"kv_cache_dtype": "fp8_ds_mla"}}, "a cache of fp8_ds_mla"),
        ({"layer": {"kv_cache_dtype": "fp8_e5m2"}}, "a cache of fp8_e5m2"),
        ({"attention_config__use_prefill_query_quantization": True}, "quantised queries"),
        ({"speculative_config": object()}, "speculative decoding"),
        (
            {"compilation_config__pass_config": SimpleNamespace(fuse_attn_quant=True)},
            "attention fused with the quantisation of its output",
        ),
        ({"impl": "own"}, "Own has a forward_mha of its own"),
        ({"impl": "inherited"}, "Own has a forward_mha of its own"),
        ({"layer": {"kv_cache_dtype": "fp8"}}, ""),
        ({"layer": {"kv_cache_dtype": "fp8_e4m3"}}, ""),
        ({}, ""),
    ],
)
def test_layers(options, why, vllm):
    vllm()
    register()
    attention, _ = modules()
    layer = change(attention, **options)
    assert parts.layers["prefill"] == {"layer": why}
    assert is_ours(layer) is (not why)
    sparse = why == "sparse MLA"
    assert parts.layers["exchange"] == {"layer": why if sparse else ""}
    assert wrapped(layer.impl, "do_kv_cache_update") is (not sparse)


def test_without_pcp_layers_are_left_alone(vllm):
    vllm()
    register()
    attention, _ = modules()
    layer = change(attention, parallel_config__prefill_context_parallel_size=1)
    assert not parts.layers
    assert not vars(layer.impl)
    assert not is_ours(layer)
