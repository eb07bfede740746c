"""The answer is nothing but calls as JSON: Llama 3's, after <|python_tag|> or not, and whatever else writes it so."""

from __future__ import annotations

from server.tools.reader import Broken, Reader, Wait, blanks, json_calls, literal


def read(r: Reader) -> Wait[None]:
    """Calls from the start of the answer on, separated by ; or nothing; the first thing that is none ends them."""
    opening = yield from literal(r, "<|python_tag|>", "```json", "```")
    try:
        while True:
            yield from json_calls(r)
            yield from literal(r, ";")
            r.settle()
            if (yield from blanks(r)) not in ("{", "["):
                break
    except Broken:
        r.unread()
    if opening.startswith("`"):
        yield from literal(r, "```")
        r.settle()
