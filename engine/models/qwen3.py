"""Qwen3: Llama with a norm on each head's query and key. Yang et al. 2025, arXiv 2505.09388."""

from __future__ import annotations

from torch import Tensor

from engine.layers.attention import PagedAttention
from engine.layers.weights import Weights
from engine.model_config import ModelConfig
from engine.models.llama import Attention, LlamaForCausalLM

# T tokens in the step, D hidden, H query heads, K kv heads, E head dim


class NormedAttention(Attention):
    """Attention with RMSNorm over E of q and k, one weight for all heads, before they are rotated."""

    def __init__(self, config: ModelConfig, weights: Weights, attend: PagedAttention):
        super().__init__(config, weights, attend, qkv_bias=config.attention_bias, out_bias=config.attention_bias)
        self.q_norm = weights.norm("q_norm", config.head_dim, config.rms_norm_eps)
        self.k_norm = weights.norm("k_norm", config.head_dim, config.rms_norm_eps)

    def qkv(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_THE, k_TKE, v_TKE = super().qkv(x_TD)
        return self.q_norm(q_THE), self.k_norm(k_TKE), v_TKE


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Upper layers may see a window, as in Qwen2."""

    def attention(self, weights: Weights, attend: PagedAttention) -> Attention:
        return NormedAttention(self.config, weights, attend)
