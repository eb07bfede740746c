"""Mistral: Llama whose tokens see a window of positions. Jiang et al. 2023, arXiv 2310.06825."""

from __future__ import annotations

from engine.layers.attention import PagedAttention
from engine.layers.weights import Weights
from engine.models.llama import Attention, LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """The window comes with the config, per layer. No biases anywhere."""

    def attention(self, weights: Weights, attend: PagedAttention) -> Attention:
        return Attention(self.config, weights, attend, qkv_bias=False, out_bias=False)
