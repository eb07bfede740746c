"""DeepSeek's calls between special tokens: V3 and R1 with a fenced block of JSON, V3.1 with the JSON alone."""

from __future__ import annotations

import re

from server.tools.reader import Broken, Reader, Wait, arguments, head, literal, until

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
HEAD = re.compile(r"\s*(?:function<｜tool▁sep｜>([\w.\-]+)\s*```json\s*|([\w.\-]+)<｜tool▁sep｜>\s*)(?=\{)")


def read(r: Reader) -> Wait[None]:
    """Both forms."""
    while (yield from until(r, BEGIN)) is not None:
        try:
            mark = yield from literal(r, CALL)
            if not mark:
                raise Broken
            while mark == CALL:
                found = yield from head(r, HEAD)
                r.begin(found[1] or found[2])
                yield from arguments(r)
                yield from literal(r, "```")
                yield from literal(r, CALL_END)
                mark = yield from literal(r, CALL, END)
                r.settle()
        except Broken:
            r.unread()
