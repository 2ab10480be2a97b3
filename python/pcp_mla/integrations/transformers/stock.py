"""What of transformers is used, or an error that says what to install."""

from __future__ import annotations

try:
    import transformers
    from transformers.cache_utils import DynamicCache, DynamicLayer
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"got transformers {transformers.__version__}")
except ImportError as error:
    raise ImportError(f'transformers 5 is needed: pip install "pcp-mla[demo]" ({error})') from error

__all__ = ["ALL_ATTENTION_FUNCTIONS", "CausalLMOutputWithPast", "DynamicCache", "DynamicLayer", "PreTrainedModel"]
