"""Finds stop strings in streamed text and holds back only what can still become one.

Knows strings; not tokens, requests or sequences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Node:
    """A prefix of some stop string (Aho & Corasick 1975)."""

    depth: int = 0  # its length: so many characters must be held back
    next: dict[str, _Node] = field(default_factory=dict)
    fail: _Node | None = None  # the longest proper suffix that is a prefix too
    stop: str | None = None  # the longest stop string that ends here


def _automaton(stops: Sequence[str]) -> _Node:
    root = _Node()
    for stop in stops:
        node = root
        for char in stop:
            node = node.next.setdefault(char, _Node(node.depth + 1))
        node.stop = stop
    queue = deque([root])
    while queue:
        node = queue.popleft()
        for char, child in node.next.items():
            fail = node.fail
            while fail is not None and char not in fail.next:
                fail = fail.fail
            child.fail = fail.next[char] if fail is not None else root
            child.stop = child.stop or child.fail.stop
            queue.append(child)
    return root


class StopScanner:
    """Cuts one stream of text at the stop string that is completed first; of several completed at once, the longest.

    The result does not depend on where the pushes cut the text. Time is linear in text plus stop strings.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self._root = self._node = _automaton(stops)
        self._include_stop = include_stop
        self._held = ""
        self._done = False

    def push(self, text: str, final: bool = False) -> tuple[str, str | None]:
        """(text that can be shown now, the stop string found or None). After a stop or `final` nothing more comes."""
        assert not self._done, "the stream has ended"
        self._done = final
        text = self._held + text
        node = self._node
        for end in range(len(self._held), len(text)):
            node = self._step(node, text[end])
            if node.stop is not None:
                self._done = True
                return text[: end + 1 if self._include_stop else end + 1 - len(node.stop)], node.stop
        cut = len(text) if final else len(text) - node.depth
        self._node, self._held = node, text[cut:]
        return text[:cut], None

    def _step(self, node: _Node, char: str) -> _Node:
        while char not in node.next:
            if node.fail is None:
                return node
            node = node.fail
        return node.next[char]
