"""The stop scanner against its definition, at every cut."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text_scan import StopScanner

letters = st.text("ab<", max_size=12)
stop_lists = st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """(end, stop): the stop string that is complete first; of several, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return end, max(complete, key=len)
    return None


def run(scanner: StopScanner, pushes: list[str]) -> tuple[str, str | None]:
    shown = ""
    for i, push in enumerate(pushes):
        text, stop = scanner.push(push, final=i + 1 == len(pushes))
        shown += text
        if stop is not None:
            return shown, stop
    return shown, None


@settings(max_examples=250, deadline=None)
@given(letters, stop_lists, st.booleans(), st.data())
def test_any_cut_gives_the_text_before_the_first_completed_stop(text, stops, include_stop, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pushes = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    expected = (text, None)
    if (found := first_stop(text, stops)) is not None:
        end, stop = found
        expected = (text[: end if include_stop else end - len(stop)], stop)
    assert run(StopScanner(stops, include_stop), pushes) == expected


@settings(max_examples=120, deadline=None)
@given(letters, stop_lists)
def test_only_what_can_become_a_stop_is_held_back(text, stops):
    if first_stop(text, stops) is not None:
        return
    scanner, shown = StopScanner(stops), ""
    for i, char in enumerate(text):
        shown += scanner.push(char)[0]
        seen = text[: i + 1]
        held = max((n for s in stops for n in range(len(s)) if n <= len(seen) and seen.endswith(s[:n])), default=0)
        assert len(seen) - len(shown) == held


def test_without_stops_everything_passes_at_once():
    assert StopScanner([]).push("a <|") == ("a <|", None)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopScanner(["a", ""])


def test_time_is_linear_for_text_that_nearly_matches():
    def seconds(n: int) -> float:
        scanner = StopScanner(["a" * (n // 2) + "b", "a" * 50 + "c"])
        began = time.thread_time()
        for _ in range(n // 10):
            scanner.push("aaaaaaaaaa")
        scanner.push("", final=True)
        return time.thread_time() - began

    # sixteen times the text: 16 if linear, 256 if quadratic; 2.5 for a busy machine
    assert min(seconds(64_000) for _ in range(2)) <= 2.5 * 16 * min(seconds(4_000) for _ in range(3))
