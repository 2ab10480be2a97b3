"""The rooms of the package: imports go down only, and in no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

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
