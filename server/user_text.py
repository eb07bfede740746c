"""Keeps what users wrote apart from the template's own text while a chat template is rendered.

Each special token's spelling inside a string of the request becomes one rare character that occurs nowhere in it; so
does the first or last character of a string that could complete a spelling together with its neighbour. After
rendering these are put back, as user text. Templates see strings that behave the same (one character stands for a
special token), and requests that spell none are rendered as they are.

Two limits. In assistant messages the marks of reasoning stay as they are, because templates split the text there. And
a template that builds tokens from strings ('<|' + role + '|>') relies on the caller's list of roles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from server.errors import RequestError
from server.tokenizer import Segment, any_of, is_guarded

STAND_INS = range(0x20000, 0x2A6DE)  # CJK Extension B: no case, not white space, and not escaped by repr or JSON
REASONING_MARKS = frozenset({"<think>", "</think>", "[THINK]", "[/THINK]"})
NONE: frozenset[str] = frozenset()
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
MAX_DEPTH = 64

Replace = Callable[[str, frozenset[str]], str]  # a string, spellings that stay -> the string for the template


class Hidden(NamedTuple):
    """What the rare characters in one request stand for."""

    originals: Mapping[str, str]

    def segments(self, rendered: str) -> list[Segment]:
        """The rendered text with the originals put back, as user text."""
        if not self.originals:
            return [Segment(rendered, False)]
        parts = re.split(f"([{''.join(self.originals)}])", rendered)
        known = self.originals
        return [Segment(known.get(part, part), part in known) for part in parts if part]


class UserText:
    """Hides the spellings of one model's special tokens in requests."""

    def __init__(self, special: Iterable[str]) -> None:
        spellings = [spelling for spelling in special if is_guarded(spelling)]
        self._pattern = re.compile(any_of(spellings)) if spellings else None
        self._starts = {spelling[:cut] for spelling in spellings for cut in range(1, len(spelling))}
        self._ends = {spelling[cut:] for spelling in spellings for cut in range(1, len(spelling))}
        self._longest = max(map(len, spellings), default=0) - 1

    def hide(self, variables: dict[str, Any], template: str) -> tuple[dict[str, Any], Hidden]:
        """(the variables as the template may see them, what was hidden). `variables` itself is not changed.

        Raises RequestError.
        """
        texts: list[str] = []

        def note(text: str, keep: frozenset[str]) -> str:
            texts.append(text)
            return text

        copied = _mapped(variables, note)
        if self._pattern is None or not any(self._must_hide(text) for text in texts):
            return copied, Hidden({})
        free = _unused_characters([template, *texts])
        names: dict[str, str] = {}

        def name(original: str) -> str:
            if original not in names:
                names[original] = next(free)
            return names[original]

        changed = _mapped(variables, lambda text, keep: self._hidden(text, keep, name))
        return changed, Hidden({char: original for original, char in names.items()})

    def _must_hide(self, text: str) -> bool:
        assert self._pattern is not None
        return self._ends_a_spelling(text) or self._starts_a_spelling(text) or bool(self._pattern.search(text))

    def _ends_a_spelling(self, text: str) -> bool:
        """Whether its beginning could end a spelling that began in the text before it."""
        return any(text[:n] in self._ends for n in range(1, min(self._longest, len(text)) + 1))

    def _starts_a_spelling(self, text: str) -> bool:
        """Whether its end could begin a spelling that goes on in the text after it."""
        return any(text[-n:] in self._starts for n in range(1, min(self._longest, len(text)) + 1))

    def _hidden(self, text: str, keep: frozenset[str], name: Callable[[str], str]) -> str:
        assert self._pattern is not None
        text = self._pattern.sub(lambda match: match[0] if match[0] in keep else name(match[0]), text)
        if self._starts_a_spelling(text):
            text = text[:-1] + name(text[-1])
        if self._ends_a_spelling(text):
            text = name(text[0]) + text[1:]
        return text


def _unused_characters(texts: Iterable[str]) -> Iterator[str]:
    used = set().union(*map(set, texts))
    yield from (chr(code) for code in STAND_INS if chr(code) not in used)
    raise RequestError(400, code="chat_template_error", message="The text uses too many different characters.")


def _mapped(value: Any, replace: Replace, keep: frozenset[str] = NONE, depth: int = 0) -> Any:
    """A copy of JSON data with every string replaced, keys too, but not the names of roles."""
    if isinstance(value, str):
        return value if value in ROLES else replace(value, keep)
    if depth > MAX_DEPTH:
        raise RequestError(400, code="invalid_request", message=f"The request nests deeper than {MAX_DEPTH} levels.")
    if isinstance(value, Mapping):
        if value.get("role") == "assistant":
            keep = REASONING_MARKS
        return {replace(key, keep): _mapped(item, replace, keep, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, replace, keep, depth + 1) for item in value]
    return value
