"""OLMoE: Llama with norms over all of q and of k, and experts in place of each MLP.

Muennighoff et al. 2024, arXiv 2409.02060.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from engine.config_fields import Fields
from engine.mixture_config import MixtureConfig, read_mixture
from engine.model_config import read_decoder
from engine.models.llama import Attention, LlamaForCausalLM
from kernels.mixture import Routing

if TYPE_CHECKING:
    from torch import Tensor

    from engine.layers.attention import PagedAttention
    from engine.layers.experts import RoutedExperts
    from engine.layers.weights import Weights

# T tokens in the step, D hidden, H query heads, K kv heads, E head dim


@dataclass(frozen=True, kw_only=True)
class OlmoeConfig(MixtureConfig):
    clip_qkv: float  # the largest magnitude of q, k and v; 0: they are left as they are


class OlmoeAttention(Attention):
    """Attention with one RMSNorm over all heads' q and one over all heads' k, before they are rotated."""

    def __init__(self, config: OlmoeConfig, weights: Weights, attend: PagedAttention):
        super().__init__(config, weights, attend)
        e, h, k = config.head_dim, config.num_heads, config.num_kv_heads
        self.q_norm = weights.norm("q_norm", h * e, config.norm_eps)
        self.k_norm = weights.norm("k_norm", k * e, config.norm_eps)
        self.sizes, self.clip = (h * e, k * e, k * e), config.clip_qkv

    def qkv(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv_proj(x_TD).split_with_sizes(self.sizes, dim=1)
        parts = [self.q_norm(q), self.k_norm(k), v]
        if self.clip:
            parts = [part.clamp_(-self.clip, self.clip) for part in parts]
        q_THE, k_TKE, v_TKE = (part.view(-1, h, self.all_heads[2]) for part, h in zip(parts, self.heads, strict=True))
        return q_THE, k_TKE, v_TKE


class OlmoeForCausalLM(LlamaForCausalLM):
    """Weights are shares of all experts, as a rule not normalised."""

    config: OlmoeConfig
    ABSENT: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    }

    @staticmethod
    def read_config(fields: Fields) -> OlmoeConfig:
        decoder, bias = read_decoder(fields), fields.flag("attention_bias", default=False)
        routing = Routing(0, normalise=fields.flag("norm_topk_prob", default=False))
        decoder = replace(decoder, qkv_bias=bias, out_bias=bias)
        mixture = read_mixture(decoder, fields, routing)
        return OlmoeConfig(**vars(mixture), clip_qkv=fields.number("clip_qkv", 0, 1e9, default=0.0))

    def attention(self, weights: Weights, attend: PagedAttention) -> OlmoeAttention:
        return OlmoeAttention(self.config, weights, attend)

    def mlp(self, index: int, weights: Weights) -> RoutedExperts:
        return weights.at("mlp").separate_experts(self.config)
