"""What a load test sends: prompts, lengths and arrival times, all drawn from one seed.

Knows no HTTP. Lengths are tokens of the server's tokenizer, approximately: prompts are made of common English words,
which most vocabularies hold as one token each; the report shows the counts that the server states in `usage`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

COMMON = (
    "the of and to in is that it was for on are with as his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know"
)
WORDS = COMMON.split()


@dataclass(frozen=True)
class Lengths:
    """A fixed length, or one drawn uniformly from low to high (inclusive), in tokens."""

    low: int
    high: int

    @staticmethod
    def parse(text: str) -> Lengths:
        """From "128" or "64-512". Raises ValueError."""
        low, _, high = text.partition("-")
        lengths = Lengths(int(low), int(high or low))
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"{text!r} is not a length such as 128 or 64-512")
        return lengths

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return rng.randint(self.low, self.high)


@dataclass(frozen=True)
class Job:
    """One conversation: its turns are sent one after the other, each after the answer to the last."""

    at: float  # seconds after the start; 0 in a closed loop
    turns: list[str]
    max_tokens: list[int] = field(default_factory=list)


def prompt(rng: random.Random, tokens: int) -> str:
    """Text of about so many tokens that no other draw repeats."""
    return " ".join(rng.choice(WORDS) for _ in range(tokens))


def arrivals(rng: random.Random, rate: float, burstiness: float) -> Iterator[float]:
    """Arrival times in seconds: Gamma gaps of mean 1/rate and shape `burstiness` (1 is Poisson, below 1 is bursty)."""
    now = 0.0
    while True:
        yield now
        now += rng.gammavariate(burstiness, 1.0 / (rate * burstiness))


def make_jobs(
    *,
    count: int,
    seed: int,
    input_len: Lengths,
    output_len: Lengths,
    shared_prefix: int = 0,
    turns: int = 1,
    rate: float | None = None,
    burstiness: float = 1.0,
) -> list[Job]:
    """`count` conversations; without a rate all may start at once and the client's concurrency holds them back."""
    rng = random.Random(seed)
    prefix = prompt(rng, shared_prefix)
    times = arrivals(rng, rate, burstiness) if rate else iter(lambda: 0.0, None)
    jobs = []
    for _ in range(count):
        texts = [prompt(rng, max(1, input_len.draw(rng) - shared_prefix)) for _ in range(turns)]
        texts[0] = f"{prefix} {texts[0]}" if shared_prefix else texts[0]
        jobs.append(Job(next(times), texts, [output_len.draw(rng) for _ in texts]))
    return jobs
