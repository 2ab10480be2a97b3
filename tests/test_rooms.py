"""The rooms of the package: imports go down only, and in no circle."""

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import pcp_mla  # noqa: F401

PACKAGE = Path(__file__).resolve().parents[1] / "python" / "pcp_mla"

# From the ground up: a room imports from the floors below its own.
FLOORS = (
    {"checks"},
    {"plan"},
    {"reference"},
    {"ops"},
    {"triton", "groups"},
    {"exchange", "planner", "testing"},
    {"layer"},
    {"compare", "integrations"},
    {"demo"},
    {"evaluation"},
    {""},
    {"cli"},
    {"__main__"},
)
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in PACKAGE.rglob("*.py")
}


def imported(module: str) -> set[str]:
    """Modules of the package that ``module`` imports, wherever in it."""
    path, found = MODULES[module], set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            for name in node.names:
                whole = ".".join(filter(None, (*base, name.name)))
                found.add(whole if whole in MODULES else ".".join(filter(None, base)))
    return found - {module}


def floor(module: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if module.split(".")[0] in rooms)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    room = module.split(".")[0]
    up = [other for other in imported(module) if other.split(".")[0] != room and floor(other) >= floor(module)]
    assert up == []


def test_no_circle() -> None:
    graph = {module: imported(module) - {""} for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES) > 80


def test_every_room_says_what_it_is() -> None:
    for module, path in MODULES.items():
        assert ast.get_docstring(ast.parse(path.read_text())), module


# What users import, and what the pages show: none of these may go.
PUBLIC = {
    "pcp_mla": (
        "GatheredRows LatentExchange MLADims MLAPrefill PCPMetadata PCPPlanner Partition RowOp concat_k cp_correct_out cp_lse_a2a "
        "cp_lse_ag_out_ar cp_lse_ag_out_rs flat_cp_group gather_latents kv_up_project merge_attn_states merge_n_attn_states "
        "partition pcp_attention pcp_fused_gather pcp_fused_restore write_latent_cache __version__"
    ),
    "pcp_mla.testing": "PlayedGroup RankError play run_distributed",
    "pcp_mla.integrations.transformers": (
        "PCPCache PCPContext capture_graphs copy_sharing_weights decode disable_pcp enable_pcp extend generate greedy_steps prefill"
    ),
    "torch.ops.pcp_mla": (
        "attention concat_k cp_correct_out fused_gather fused_gather_out fused_restore fused_restore_out gather_latents "
        "kv_up_project kv_up_project_wgmma merge_attn_states merge_attn_states_out merge_n_attn_states merge_n_attn_states_out "
        "plan_expand plan_rank_rows plan_shard_rows write_latent_cache"
    ),
}


@pytest.mark.parametrize("place", PUBLIC)
def test_public_names(place: str) -> None:
    if "transformers" in place:
        pytest.importorskip("transformers", minversion="5")
    holder = torch.ops.pcp_mla if place.startswith("torch") else importlib.import_module(place)
    assert [name for name in PUBLIC[place].split() if not hasattr(holder, name)] == []
