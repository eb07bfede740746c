"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen 2.5 and 3, our own prompt, and like-minded."""

from __future__ import annotations

from server.tools.reader import Broken, Reader, Wait, json_calls, literal, until

# What begins a section and what ends it: Hermes's, Nemotron's, Apriel's, Granite's and Phi 4's.
SECTIONS = {
    "<tool_call>": "</tool_call>",
    "<TOOLCALL>": "</TOOLCALL>",
    "<tool_calls>": "</tool_calls>",
    "<|tool_call|>": "<|/tool_call|>",
}
TOKENS = (*SECTIONS, *SECTIONS.values())


def read(r: Reader) -> Wait[None]:
    """Each section holds one call or a list of them."""
    while (begin := (yield from until(r, *SECTIONS))) is not None:
        try:
            yield from json_calls(r)
            yield from literal(r, SECTIONS[begin])
            r.settle()
        except Broken:
            r.unread()
