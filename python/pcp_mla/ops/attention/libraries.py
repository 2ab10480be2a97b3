"""How attention libraries are found and called.

They are looked up when somebody asks, and once. The order of an op's arguments differs from version to version: they are placed by
the names in its schema.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

BF16_FP16 = (torch.bfloat16, torch.float16)


class Rows(NamedTuple):
    """The rows of one call: row i's queries are ``cu_seqlens_q[i]`` to ``[i + 1]``, its keys ``seqused_k[i]`` from
    ``cu_seqlens_k[i]`` on."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    seqused_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool


@dataclass(frozen=True, eq=False)  # one of a kind: a key of what is worked out once for each
class Library:
    """A function of an attention library.

    Attributes:
        parameters: their names, False where one must be given.
        dtypes: that it is built for.
        flash2: V must be as wide as q, and a row without keys has an LSE of +inf.
        positional: of an op: what takes its arguments in order, faster, and their defaults.
    """

    call: Callable[..., Any]
    parameters: Mapping[str, bool]
    dtypes: tuple[torch.dtype, ...] = BF16_FP16
    flash2: bool = False
    positional: tuple[Callable[..., Any], Mapping[str, Any]] | None = None

    @property
    def shares_starts(self) -> bool:
        """Whether key starts and key lengths are two arguments."""
        return "seqused_k" in self.parameters


# What libraries call the things that we pass, and values that leave out what we do not want.
_NAMES = {
    "q": ("q", "query"),
    "k": ("k", "key"),
    "v": ("v", "value"),
    "out": ("out", "out_"),
    "cu_seqlens_q": ("cu_seqlens_q", "cum_seq_q"),
    "cu_seqlens_k": ("cu_seqlens_k", "cum_seq_k"),
    "seqused_k": ("seqused_k",),
    "max_seqlen_q": ("max_seqlen_q", "max_q"),
    "max_seqlen_k": ("max_seqlen_k", "max_k"),
    "softmax_scale": ("softmax_scale", "scale"),
    "causal": ("causal", "is_causal"),
}
_NEUTRAL = {
    "dropout_p": 0.0,
    "p_dropout": 0.0,
    "softcap": 0.0,
    "window_size_left": -1,
    "window_size_right": -1,
    "attention_chunk": 0,
    "is_rotary_interleaved": True,
    "num_splits": 1,
    "sm_margin": 0,
    "cp_world_size": 1,
    "cp_rank": 0,
    "return_softmax": False,
    "return_debug_mask": False,
    "zero_tensors": False,
    "return_lse": True,
}


def of_op(op: Any) -> Library:
    """A dispatched op. An optional argument without a default is None where it is not given."""
    defaults = {a.name: a.has_default_value() for a in op._schema.arguments}
    absent = {a.name: None for a in op._schema.arguments if isinstance(a.type, torch.OptionalType) and not defaults[a.name]}
    return Library(
        lambda **given: op(**absent | given),
        {name: known or name in absent for name, known in defaults.items()},
        positional=(op, {a.name: a.default_value if defaults[a.name] else None for a in op._schema.arguments}),
    )


def of_function(function: Callable[..., Any]) -> Library:
    parameters = inspect.signature(function).parameters.values()
    return Library(function, {p.name: p.default is not inspect.Parameter.empty for p in parameters})


@functools.cache
def _placement(library: Library, names: tuple[str, ...]) -> tuple[tuple[tuple[str, str], ...], dict[str, Any]]:
    """The library's name for each of ``names`` that it has, and what it insists on beside them. Errors as :func:`arguments`."""
    places = []
    for name in names:
        known = [other for other in _NAMES[name] if other in library.parameters]
        if known:
            places.append((known[0], name))
        elif name not in ("out", "max_seqlen_q", "max_seqlen_k"):
            raise NotImplementedError(f"pcp_attention: this version of the library has no argument {name}")
    given, constants = {place for place, _ in places}, {}
    for name, optional in library.parameters.items():
        if name in given or (optional and name not in ("return_lse", "num_splits")):
            continue
        if name not in _NEUTRAL:
            raise NotImplementedError(f"pcp_attention: this version of the library wants {name}, which is not known here")
        constants[name] = _NEUTRAL[name]
    return tuple(places), constants


@functools.cache
def check_placement(library: Library) -> None:
    """Raise NotImplementedError if :func:`call` could not call it."""
    _placement(library, tuple(name for name in _NAMES if name != "seqused_k" or library.shares_starts))


def arguments(library: Library, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` under the names that the library has for them, beside what it insists on.

    Raises:
        NotImplementedError: it has no argument for one of them that matters, or wants one that is not known here.
    """
    places, constants = _placement(library, tuple(values))
    return constants | {place: values[name] for place, name in places}


def _op(namespace: str, name: str, *modules: str) -> Library | str:
    """The op, after importing the modules that define it if it is not there yet; else why there is none."""
    reasons = []
    for module in ("", *modules):
        try:
            if module:
                importlib.import_module(module)
        except Exception as error:  # a library for another GPU or another torch may raise anything
            reasons.append(f"{module}: {error}")
            continue
        if hasattr(getattr(torch.ops, namespace), name):
            return of_op(getattr(getattr(torch.ops, namespace), name).default)
    return "; ".join(reasons) or f"torch.ops.{namespace}.{name} is not defined"


# Namespaces of FlashAttention 3's op, and what to import for it; vLLM last, which takes seconds.
_FA3 = {"fa3_fwd": "fa3_fwd", "flash_attn_3": "flash_attn_interface", "_vllm_fa3_C": "vllm.vllm_flash_attn"}


def _fa3() -> Library | str:
    reasons = []
    loaded = [(namespace, ()) for namespace in _FA3]
    for namespace, modules in [*loaded, *((namespace, (module,)) for namespace, module in _FA3.items())]:
        found = _op(namespace, "fwd", *modules)
        if isinstance(found, Library):
            return replace(found, dtypes=(torch.bfloat16,)) if namespace == "fa3_fwd" else found
        reasons += [found] * len(modules)
    return f"no library ({'; '.join(reasons)}): pip install fa3-fwd"


def _fa4() -> Library | str:
    try:
        return of_function(importlib.import_module("flash_attn.cute").flash_attn_varlen_func)
    except Exception as error:  # as above
        return f"no library (flash_attn.cute: {error}): pip install flash-attn-4"


def _fa2() -> Library | str:
    found = _op("flash_attn", "_flash_attn_varlen_forward", "flash_attn.flash_attn_interface")
    if isinstance(found, Library):
        return replace(found, flash2=True)
    if torch.backends.cuda.is_flash_attention_available():
        return replace(of_op(torch.ops.aten._flash_attention_forward.default), flash2=True)
    return f"no library ({found}), and this torch has no FlashAttention: pip install flash-attn"


LIBRARIES = {"fa3": _fa3, "fa4": _fa4, "fa2": _fa2}


@functools.cache
def find(name: str) -> Library | str:
    """The library of ``fa3``, ``fa4`` or ``fa2``, or why there is none."""
    return LIBRARIES[name]()


def apart(x: torch.Tensor) -> int:
    """0 where rows and heads lie at multiples of 16 bytes, as tensor copies and vector loads want them."""
    strides = x.stride()
    return (x.data_ptr() | (strides[0] | strides[1]) * x.element_size()) & 15


def in_reach(x: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, dim] where a library can read it: ``x``, or a copy. Libraries take that for granted, and a kernel that cannot
    goes down with the whole context."""
    return x.clone(memory_format=torch.contiguous_format) if apart(x) else x


def prepared(library: Library, rows: Rows, scale: float) -> Callable[..., Any] | None:
    """:func:`call` for many layers with the same rows: a function of q, K, V and ``out`` that gives nothing back, and leaves checks
    and copies to whoever made the tensors. None where a library has no such form."""
    if library.positional is None or library.flash2 or not library.shares_starts:
        return None
    op, defaults = library.positional
    values = {"q": "q", "k": "k", "v": "v", "out": "out", "softmax_scale": scale, **rows._asdict()}
    given: dict[str, Any] = {**defaults, **arguments(library, values)}
    places = {value: at for at, value in enumerate(given.values()) if isinstance(value, str)}
    if places.keys() != {"q", "k", "v", "out"}:
        return None
    template, (at_q, at_k, at_v, at_out) = list(given.values()), (places[name] for name in ("q", "k", "v", "out"))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        arguments = template.copy()
        arguments[at_q], arguments[at_k], arguments[at_v], arguments[at_out] = q, k, v, out
        op(*arguments)

    return run


def call(
    library: Library, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, scale: float, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, H, Dv], in ``out`` if the library takes one, and LSE [T, H]; either may be a view. Inputs that it cannot reach are
    copied."""
    width = v.shape[2]
    if library.flash2 and width < q.shape[2]:
        v, out = F.pad(v, (0, q.shape[2] - width)), None
    q, k, v = in_reach(q), in_reach(k), in_reach(v)
    if out is not None and apart(out):
        out = None
    values = {"q": q, "k": k, "v": v, "softmax_scale": scale, "out": out, **rows._asdict()}
    if not library.shares_starts:
        del values["seqused_k"]
    result = library.call(**arguments(library, values))
    lse = result[1].T
    if library.flash2:
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    return result[0][..., :width], lse
