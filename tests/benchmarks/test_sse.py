"""The load on the API process: what it prints of a few streams."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.sse import measure
from server.tokenizer import load_tokenizer
from tests.server.fake_engine import write_byte_tokenizer


async def test_streams_whose_engine_waits_for_them_get_one_event_per_token(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    samples: Counter[str] = Counter()
    line = await measure(tmp_path, load_tokenizer(tmp_path), 3, 1, 0.1, samples)
    streams, per_event, calls, microseconds, rate = (float(cell.replace(",", "")) for cell in line.split())
    assert streams == 3
    assert per_event == 1.0
    assert calls > 0
    assert rate == pytest.approx(1e6 / microseconds, rel=0.05)
    assert samples.total() > 0
