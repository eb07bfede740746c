"""Kimi K2's calls between special tokens; a call's id, functions.name:number, holds its name."""

from __future__ import annotations

import re

from server.tools.reader import Broken, Reader, Wait, arguments, head, literal, until

BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
HEAD = re.compile(r"\s*(?:functions\.)?([\w.\-]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*(?=\{)")


def read(r: Reader) -> Wait[None]:
    """Sections of calls."""
    while (yield from until(r, BEGIN)) is not None:
        try:
            mark = yield from literal(r, CALL)
            if not mark:
                raise Broken
            while mark == CALL:
                r.begin((yield from head(r, HEAD))[1])
                yield from arguments(r)
                yield from literal(r, CALL_END)
                mark = yield from literal(r, CALL, END)
                r.settle()
        except Broken:
            r.unread()
