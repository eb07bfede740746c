"""Which sequences run in a step, and how many tokens of each.

Knows token counts, order and blocks; not tensors, not messages' transport, not text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from engine.messages import TokenLogprob
from engine.sequence import Sequence


@dataclass(slots=True)
class StepPlan:
    """One step: so many tokens of each sequence, from its `num_computed` on; order is the order of the batch."""

    num_tokens: dict[Sequence, int] = field(default_factory=dict)
    preempted: list[Sequence] = field(default_factory=list)  # lost their blocks; never also in num_tokens


@dataclass(slots=True)
class StepResult:
    """What a step brought. A sequence is drawn from iff the step reached its last known token."""

    tokens: dict[Sequence, int] = field(default_factory=dict)  # the drawn id
    logprobs: dict[Sequence, TokenLogprob] = field(default_factory=dict)  # of the drawn id, where asked for
    # Where `seq.prompt_logprobs is not None`: entry i is about the token at position num_computed + 1 + i, and there
    # is one for each position below prompt_len that the step's rows predict.
    prompt_logprobs: dict[Sequence, list[TokenLogprob]] = field(default_factory=dict)
    failed: dict[Sequence, str] = field(default_factory=dict)  # error code, e.g. model_produced_nan; needs no token


class Runner(Protocol):
    """Tensors in, drawn ids out."""

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step; reads the sequences, never writes to them. May raise: then the step did not happen."""
        ...

    def release(self, seq: Sequence) -> None:
        """What is kept for this sequence may go (finished, preempted, or its step failed); unknown ones are fine.

        A released sequence may come back in a later plan, with any num_computed: its row is then built afresh.
        """
        ...
