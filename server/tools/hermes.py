"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen 2.5 and 3, and our own prompt."""

from __future__ import annotations

from server.tools.reader import Broken, Reader, Wait, json_calls, literal, until


def read(r: Reader) -> Wait[None]:
    """Each section holds one call, or a list of them as SmolLM2 1.7B writes it."""
    while (yield from until(r, "<tool_call>")) is not None:
        try:
            yield from json_calls(r)
            yield from literal(r, "</tool_call>")
            r.settle()
        except Broken:
            r.unread()
