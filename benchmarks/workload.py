"""What a load test sends: prompts, lengths and arrival times, all drawn from one seed.

Knows no HTTP. Lengths are tokens of the server's tokenizer, approximately: prompts are made of common English words,
which most vocabularies hold as one token each; the report shows the counts that the server states in `usage`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

COMMON = (
    "the of and to in is that it was for on are with as his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know"
)
WORDS = COMMON.split()


@dataclass(frozen=True)
class Lengths:
    """A fixed length, or one drawn from low to high (inclusive), in tokens: uniformly or lognormally."""

    low: int
    high: int
    median: float | None = None
    sigma: float = 1.0  # of the logarithm

    @staticmethod
    def parse(text: str) -> Lengths:
        """From "128", "64-512", "~200" (lognormal, sigma 1) or "~200/0.5". Raises ValueError."""
        if text.startswith("~"):
            median, _, sigma = text[1:].partition("/")
            lengths = Lengths.lognormal(float(median), float(sigma or 1))
        else:
            low, _, high = text.partition("-")
            lengths = Lengths(int(low), int(high or low))
        if not 1 <= lengths.low <= lengths.high or not lengths.sigma > 0 or lengths.median == 0:
            raise ValueError(f"{text!r} is not a length such as 128, 64-512 or ~200")
        return lengths

    @staticmethod
    def lognormal(median: float, sigma: float = 1.0) -> Lengths:
        """Cut off where one in some thousands would be longer."""
        return Lengths(1, math.ceil(median * math.exp(3.5 * sigma)), median, sigma)

    @staticmethod
    def of_mean(mean: float, sigma: float = 1.0) -> Lengths:
        """Lognormal with this mean."""
        return Lengths.lognormal(mean / math.exp(sigma**2 / 2), sigma)

    def scaled(self, factor: float) -> Lengths:
        """The same shape, so many times as long."""
        low, high = (max(1, round(factor * length)) for length in (self.low, self.high))
        return replace(self, low=low, high=high, median=self.median and factor * self.median)

    @property
    def typical(self) -> int:
        """The mean, rounded."""
        if self.median is None:
            return (self.low + self.high + 1) // 2
        return round(self.median * math.exp(self.sigma**2 / 2))

    def draw(self, rng: random.Random) -> int:
        """One length."""
        if self.median is None:
            return rng.randint(self.low, self.high)
        return min(max(round(rng.lognormvariate(math.log(self.median), self.sigma)), self.low), self.high)

    def __str__(self) -> str:
        if self.median is None:
            return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"
        return f"~{self.median:.0f}/{self.sigma:g}"


# (prompt, answer) lengths of public traces: the published means or medians; the spread (sigma 1) is our assumption.
# ShareGPT: means in Kwon et al. 2023, arXiv 2309.06180. Azure 2023: medians in Patel et al. 2024, arXiv 2311.18677.
TRACES = {
    "sharegpt": (Lengths.of_mean(161), Lengths.of_mean(338)),
    "alpaca": (Lengths.of_mean(19), Lengths.of_mean(58)),
    "azure-conversation": (Lengths.lognormal(1020), Lengths.lognormal(129)),
    "azure-code": (Lengths.lognormal(1500), Lengths.lognormal(13)),
}


@dataclass(frozen=True)
class Job:
    """One conversation: its turns are sent one after the other, each after the answer to the last."""

    at: float  # seconds after the start; 0 in a closed loop
    turns: list[str]
    max_tokens: list[int] = field(default_factory=list)


def prompt(rng: random.Random, tokens: int) -> str:
    """Text of about so many tokens that no other draw repeats. It begins with a space, as each of its words does."""
    return "".join(f" {rng.choice(WORDS)}" for _ in range(tokens))


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
        texts[0] = prefix + texts[0]
        jobs.append(Job(next(times), texts, [output_len.draw(rng) for _ in texts]))
    return jobs
