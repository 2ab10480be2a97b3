"""When vLLM is changed: each module right after vLLM itself imported it, in whatever process that is.

The plug-in's function runs before vLLM's workers are forked, where importing vLLM's layers would be slow, and waking the GPU's
driver would break the workers. So nothing is imported: a finder waits for the modules.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from . import parts
from .hooks import HOOKS
from .parts import logger


def _change(module: ModuleType) -> None:
    """Change a module of vLLM, once; an unknown version of it disables what does not fit."""
    if getattr(module, "pcp_mla_changed", False):
        return
    module.pcp_mla_changed = True  # type: ignore[attr-defined]
    known, asked = set(parts.refused), set(parts.enabled)
    try:
        HOOKS[module.__name__](module)
    except AttributeError as error:
        for part in parts.PARTS:
            parts.refuse(part, f"this vLLM is not known ({error})")
    for part, why in parts.refused.items():
        if part not in known and part in asked:
            logger.warning("pcp-mla: %s stays vLLM's own: %s", part, why)


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _change(module)

    def __getattr__(self, name: str) -> Any:  # sources, for inspect and torch.compile
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in HOOKS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """See :func:`pcp_mla.integrations.vllm.register`."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    names = parts.from_environment()
    if not names or importlib.util.find_spec("vllm") is None:
        return
    parts.switch(names)
    sys.meta_path.insert(0, _Finder())
    for name in HOOKS:
        if name in sys.modules:
            _change(sys.modules[name])
