"""The load that `penstock bench serve` sends and the figures it makes of the answers."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from pathlib import Path

import numpy as np
import pytest

from benchmarks.report import Outcome, percentile, plot, summarise, table, write_json
from benchmarks.serve import read_events
from benchmarks.workload import Lengths, arrivals, make_jobs


def test_the_same_seed_sends_the_same_load_and_another_seed_another() -> None:
    options = {"count": 5, "input_len": Lengths(3, 9), "output_len": Lengths(2, 4), "turns": 2, "rate": 3.0}
    assert make_jobs(seed=1, **options) == make_jobs(seed=1, **options)
    assert make_jobs(seed=1, **options) != make_jobs(seed=2, **options)


def test_prompts_share_only_the_asked_prefix() -> None:
    jobs = make_jobs(count=8, seed=0, input_len=Lengths(40, 40), output_len=Lengths(1, 1), shared_prefix=16)
    words = [job.turns[0].split() for job in jobs]
    assert all(len(one) == 40 for one in words)
    assert len({tuple(one[:16]) for one in words}) == 1
    assert len({tuple(one[16:]) for one in words}) == 8


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_asked_mean_and_spread(burstiness: float) -> None:
    stream = arrivals(random.Random(7), rate=10.0, burstiness=burstiness)
    times = [next(stream) for _ in range(20001)]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.05)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(1 / math.sqrt(burstiness), rel=0.1)


@pytest.mark.parametrize("text", ["0", "-3", "9-3", "a"])
def test_an_impossible_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Lengths.parse(text)


def test_percentiles_are_numpys() -> None:
    values = [random.Random(3).random() for _ in range(101)]
    for share in (0.0, 0.37, 0.5, 0.99, 1.0):
        assert percentile(values, share) == pytest.approx(float(np.percentile(values, share * 100)))


def test_events_cut_anywhere_give_the_same_outcome() -> None:
    stream = (
        b"".join(
            b"data: " + json.dumps(event).encode() + b"\n\n"
            for event in [
                {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
                {"choices": [{"delta": {"content": "a"}}]},
                {"choices": [{"delta": {"content": "b"}}]},
                {
                    "choices": [],
                    "usage": {
                        "prompt_tokens": 9,
                        "completion_tokens": 2,
                        "prompt_tokens_details": {"cached_tokens": 4},
                    },
                },
            ]
        )
        + b"data: [DONE]\n\n"
    )
    for cut in range(1, len(stream)):
        outcome = Outcome(sent=0.0)
        assert read_events([(1.0, stream[:cut]), (2.0, stream[cut:])], outcome) == "ab"
        assert (outcome.prompt_tokens, outcome.output_tokens, outcome.cached_tokens) == (9, 2, 4)
        assert outcome.error is None


def test_a_run_is_reported_in_table_json_and_plot(tmp_path: Path) -> None:
    outcomes = [
        Outcome(0.0, [0.5, 0.6, 0.7], 0.8, 10, 5, 3),
        Outcome(0.1, [3.0, 3.5], 3.6, 10, 0, 2),
        Outcome(0.2, error="x"),
    ]
    figures = summarise(outcomes, 4.0, ttft_bound=1.0, itl_bound=0.2)
    assert figures["errors"] == 1
    assert figures["output_tok_per_s"] == pytest.approx(5 / 4)
    assert figures["goodput_per_s"] == pytest.approx(1 / 4)
    assert figures["cached_share"] == pytest.approx(0.25)
    assert "TTFT" in table(figures)
    write_json(tmp_path / "r.json", {"a": "b"}, figures, outcomes)
    assert json.loads((tmp_path / "r.json").read_text())["figures"]["errors"] == 1
    plot(tmp_path / "r.png", "title", outcomes)
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
