"""What a config.json says about a mixture of experts, beside what it says about any decoder. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.config_fields import Fields
from engine.errors import CheckpointError
from engine.model_config import ModelConfig
from kernels.mixture import SILU, Gate, Routing

MAX_EXPERTS = 4096
COUNTS = ("num_local_experts", "n_routed_experts", "num_experts")  # names of one thing; transformers 5 writes the first


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(ModelConfig):
    """A decoder some of whose layers route their tokens to experts."""

    num_experts: int
    expert_size: int  # intermediate features of one expert
    routing: Routing
    gate: Gate = SILU
    shared_size: int = 0  # intermediate features of the expert that sees every token; 0: there is none
    routed: tuple[bool, ...]  # per layer: experts, or one MLP of intermediate_size

    def kernel_sizes(self) -> dict[str, int]:
        experts = {"experts": self.num_experts, "top_k": self.routing.top_k, "expert_inner": self.expert_size}
        return super().kernel_sizes() | experts


def read_mixture(
    decoder: ModelConfig,
    fields: Fields,
    routing: Routing,
    *,
    expert_size: str = "intermediate_size",
    gate: Gate = SILU,
    shared_size: int = 0,
    routed: tuple[bool, ...] = (),
) -> MixtureConfig:
    """A decoder's config with its experts; `routing` without its top_k, which is read here.

    expert_size: the name of the field in this family. routed: by default, all layers are.
    """
    count = next((name for name in COUNTS if fields.has(name)), COUNTS[-1])
    experts = fields.integer(count, 1, MAX_EXPERTS)
    top_k = fields.integer("num_experts_per_tok", 1, experts)
    if experts % routing.groups:
        raise CheckpointError(f"config.json: {count} ({experts}) is not a multiple of n_group ({routing.groups}).")
    in_group = experts // routing.groups
    if routing.groups > 1 and (in_group < routing.group_best or in_group * routing.kept_groups < top_k):
        raise CheckpointError(
            f"config.json: {routing.kept_groups} groups of {in_group} experts are too few to choose {top_k} from."
        )
    return MixtureConfig(
        **vars(decoder),
        num_experts=experts,
        expert_size=fields.integer(expert_size, 1, 2**20),
        routing=replace(routing, top_k=top_k),
        gate=gate,
        shared_size=shared_size,
        routed=routed or (True,) * decoder.num_layers,
    )
