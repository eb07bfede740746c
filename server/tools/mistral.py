"""[TOOL_CALLS]name[ARGS]{...} for each call: Mistral from version 11 on; before it [TOOL_CALLS][{"name": ...}, ...]."""

from __future__ import annotations

import re

from server.tools.reader import Broken, Reader, Wait, arguments, blanks, head, json_calls, until

HEAD = re.compile(r"\s*([\w.\-]+)\s*(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")


def read(r: Reader) -> Wait[None]:
    """Both forms."""
    while (yield from until(r, "[TOOL_CALLS]")) is not None:
        try:
            if (yield from blanks(r)) in ("[", "{"):
                yield from json_calls(r)
            else:
                r.begin((yield from head(r, HEAD))[1])
                yield from arguments(r)
        except Broken:
            r.unread()
