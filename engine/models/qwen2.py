"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, whose upper layers may see a window.

Yang et al. 2024, arXiv 2407.10671.
"""

from __future__ import annotations

from engine.layers.attention import PagedAttention
from engine.layers.weights import Weights
from engine.models.llama import Attention, LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """The biases are the family's, not the config's."""

    def attention(self, weights: Weights, attend: PagedAttention) -> Attention:
        return Attention(self.config, weights, attend, qkv_bias=True, out_bias=False)
