"""Whether a model is one whose tokens can be cut over ranks and whose attention is MLA: by what it is made of, not by its class.

What cannot be taken is refused when PCP is enabled. A module that is not known might look at other tokens or change what attention
does, so none may be there; and every attention's own forward is followed once, with numbers in the place of what its projections
give, to see that its K and V are what the layer makes of latents.
"""

from __future__ import annotations

from typing import Any

import torch

from ...plan.dims import MLADims
from .stand_in import AttentionStandIn
from .stock import PreTrainedModel

_WIDTHS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
_LATENTS = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
_QUERIES = ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj")
_BODY = ("embed_tokens", "layers", "norm", "rotary_emb")
# These change the frequencies with the longest position in the input, which differs from rank to rank.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def _bare(module: Any) -> Any:
    """The module itself, of one that ``torch.compile`` returned for it."""
    return getattr(module, "_modules", {}).get("_orig_mod", module)


def attentions_of(model: Any) -> list[Any]:
    """The attention modules of all layers, in their order."""
    return [_bare(_bare(layer).self_attn) for layer in _bare(model.model).layers]


def model_dims(model: Any) -> MLADims:
    """Widths of the model's attention."""
    return MLADims(model.config.num_attention_heads, *(getattr(attentions_of(model)[0], name) for name in _WIDTHS))


def check_model(op: str, model: Any) -> None:
    """Raise TypeError unless ``model`` is a causal language model with MLA in every layer."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    found = type(model).__name__
    if isinstance(model, PreTrainedModel) and isinstance(layers, torch.nn.ModuleList) and len(layers) and hasattr(model, "lm_head"):
        for number, layer in enumerate(layers):
            attention = _bare(getattr(layer, "self_attn", None))
            missing = [name for name in (*_LATENTS, *_WIDTHS, "layer_idx") if not hasattr(attention, name)]
            if missing:
                found += f" with a {type(attention).__name__} in layer {number}, without {', '.join(missing)}"
                break
        else:
            return
    raise TypeError(
        f"{op}: model must be a causal language model of transformers with MLA as self_attn in every layer, got a {found}"
    )


def _refuse_modules(module: Any, where: str, known: tuple[str, ...]) -> None:
    own = {name: value for held in (module._modules, module._parameters) for name, value in held.items() if value is not None}
    unknown = [name for name in own if name not in known and not (name.endswith("norm") and "norm" in known)]
    if unknown:
        raise NotImplementedError(
            f"enable_pcp: {where}, a {type(module).__name__}, must have no modules or parameters besides {', '.join(known)}, got "
            f"{', '.join(unknown)}"
        )


def _rope_types(model: Any) -> set[str]:
    """Of the module that rotates, which may have one for each kind of layer, and of the configuration."""
    parameters = getattr(model.config, "rope_parameters", None) or {}
    types = [kind.get("rope_type") for kind in (parameters, *parameters.values()) if isinstance(kind, dict)]
    rotating = getattr(getattr(_bare(model.model), "rotary_emb", None), "rope_type", None)
    types += rotating.values() if isinstance(rotating, dict) else [rotating]
    return {kind for kind in types if kind}


def _refuse_settings(model: Any) -> None:
    config = model.config
    for rope_type in _rope_types(model):
        if any(kind in rope_type for kind in _LENGTH_DEPENDENT_ROPE):
            raise NotImplementedError(
                f"enable_pcp: rope_type must not be one of {', '.join(_LENGTH_DEPENDENT_ROPE)}, got {rope_type!r}"
            )
    other = [kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"]
    if other:
        raise NotImplementedError(f"enable_pcp: layer_types must be full_attention in all layers, got {other[0]!r}")
    for name in ("sliding_window", "attention_chunk_size"):
        width = getattr(config, name, None)
        if width is not None and getattr(config, "use_" + name, True) is not False:
            raise NotImplementedError(f"enable_pcp: {name} must be None, got {width}")


def check_structure(model: Any) -> None:
    """Raise NotImplementedError, with its name, for what such a model may have besides and PCP cannot take; ValueError if layers
    differ in their widths, or share an index."""
    _refuse_settings(model)
    body, attentions = _bare(model.model), attentions_of(model)
    _refuse_modules(body, "model", _BODY)
    widths = [tuple(getattr(attention, name) for name in _WIDTHS) for attention in attentions]
    for number, attention in enumerate(attentions):
        _refuse_modules(_bare(body.layers[number]), f"layer {number}", ("self_attn", "mlp", "norm"))
        _refuse_modules(attention, f"attention of layer {number}", (*_QUERIES, *_LATENTS))
        if widths[number] != widths[0]:
            raise ValueError(f"enable_pcp: widths must be {widths[0]} as in layer 0 ({', '.join(_WIDTHS)}), got {widths[number]}")
    indices, count = [attention.layer_idx for attention in attentions], model.config.num_hidden_layers
    if len(set(indices)) < len(indices) or not set(indices) <= set(range(count)):
        raise ValueError(f"enable_pcp: layer_idx must be another one of 0 to {count - 1} in each layer, got {indices}")


class _Followed(AttentionStandIn):
    """An attention of two heads and three tokens whose projections give random numbers, and whose K and V are looked at."""

    tokens, heads = 3, 2

    def __init__(self, attention: Any, hidden: torch.Tensor) -> None:
        super().__init__(attention, self._attend, None)
        replaced = self.__dict__.pop("expand_kv", None)
        own_expansion = None if replaced is None else self.expand_kv
        self.reached, self.k_pe = False, None
        nope, rope, self.v, rank = (getattr(attention, name) for name in _WIDTHS)
        generator = torch.Generator().manual_seed(0)

        def given(width: int) -> torch.Tensor:
            return torch.randn(1, self.tokens, width, generator=generator).to(hidden.device)

        self.expanded = given(self.heads * (nope + self.v))
        q, latents = given(self.heads * (nope + rope)), given(rank + rope)
        for name in ("q_a_proj", "q_a_layernorm", "o_proj"):
            self.__dict__[name] = lambda x: x
        self.q_proj = self.q_b_proj = lambda _: q
        self.kv_a_proj_with_mqa = lambda _: latents
        self.kv_a_layernorm = lambda x: 2 * x

        def project(kv_c: torch.Tensor) -> torch.Tensor:
            if self.kv_c is not None and not torch.equal(kv_c, self.kv_c):
                raise ValueError("kv_b_proj is not given the latents")
            return self.expanded.view(*kv_c.shape[:-1], -1)

        def expand(kv_c: torch.Tensor, k_pe: torch.Tensor) -> Any:
            self.kv_c, self.k_pe = kv_c, k_pe
            assert own_expansion is not None
            return own_expansion(kv_c, k_pe)

        self.__dict__["kv_b_proj"] = project
        if own_expansion is not None:
            self.__dict__["expand_kv"] = expand

    def latents(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value

    def _attend(self, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: float) -> torch.Tensor:
        nope = self.qk_nope_head_dim
        by_head = self.expanded.view(1, self.tokens, self.heads, -1).transpose(1, 2)
        if q.shape != key.shape or not torch.equal(torch.cat([key[..., :nope], value], -1), by_head):
            raise ValueError("K and V are not what kv_b_proj gives")
        k_pe = key[:, :1, :, nope:]
        if not torch.equal(k_pe.expand_as(key[..., nope:]), key[..., nope:]):
            raise ValueError("k_pe differs from head to head")
        if self.k_pe is not None and not torch.equal(k_pe, self.k_pe):
            raise ValueError("K does not end in k_pe")
        self.reached = True
        return value.transpose(1, 2)


def follow_attention(model: Any, device: torch.device) -> None:
    """Raise NotImplementedError for an attention whose forward does more than it can do under PCP. Weights are not looked at."""
    tokens = _Followed.tokens
    hidden, positions = torch.zeros(1, tokens, 1, device=device), torch.arange(tokens, device=device)[None]
    rotary = getattr(_bare(model.model), "rotary_emb", None)
    with torch.no_grad():
        for number, attention in enumerate(attentions_of(model)):
            followed, problem = _Followed(attention, hidden), "it does not come to its attention function"
            try:
                type(attention).forward(
                    followed,
                    hidden,
                    position_embeddings=None if rotary is None else rotary(hidden, position_ids=positions),
                    attention_mask=None,
                    position_ids=positions,
                )
            except Exception as error:
                problem = f"{error}"
            if not followed.reached:
                raise NotImplementedError(
                    f"enable_pcp: attention of layer {number}, a {type(attention).__name__}, cannot be followed by PCP: {problem}"
                )
            if not getattr(attention, "is_causal", True):
                raise NotImplementedError(f"enable_pcp: attention of layer {number} must be causal, got is_causal=False")
