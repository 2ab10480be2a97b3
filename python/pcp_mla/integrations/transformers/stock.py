"""What of transformers is used, or an error that says what to install."""

from __future__ import annotations

try:
    from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
    from transformers.cache_utils import DynamicCache, DynamicLayer
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
except ImportError as error:
    raise ImportError(f'transformers 5 with DeepSeek-V2 and V3 is needed: pip install "pcp-mla[demo]" ({error})') from error

__all__ = ["CausalLMOutputWithPast", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DynamicCache", "DynamicLayer", "v2", "v3"]
