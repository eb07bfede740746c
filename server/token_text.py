"""How tokens with their logprobs look in answers: OpenAI's chat shape, its legacy shape, and vLLM's for prompts.

Knows the shapes; not when they are sent.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from engine.messages import TokenLogprob
from server.sampling import json_logprob
from server.tokenizer import Tokenizer


def spelled(tokenizer: Tokenizer, id: int) -> str:
    """One token as text; bytes that are not a whole character show as U+FFFD."""
    return tokenizer.token_bytes(id).decode("utf-8", "replace")


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob], num_top: int) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat choice."""
    return [
        _chat_token(tokenizer, entry.token, entry.logprob)
        | {"top_logprobs": [_chat_token(tokenizer, id, logprob) for id, logprob in entry.top[:num_top]]}
        for entry in entries
    ]


def _chat_token(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(id)
    return {"token": data.decode("utf-8", "replace"), "logprob": json_logprob(logprob), "bytes": list(data)}


def prompt_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each prompt token null or an object by token id."""
    shown: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            shown.append(None)
            continue
        ranked = [(id, logprob, rank) for rank, (id, logprob) in enumerate(entry.top, 1) if id != entry.token]
        shown.append(
            {
                str(id): {"logprob": json_logprob(logprob), "rank": rank, "decoded_token": spelled(tokenizer, id)}
                for id, logprob, rank in [(entry.token, entry.logprob, entry.rank), *ranked]
            }
        )
    return shown


class LegacyLogprobs:
    """The legacy shape of one choice, piece by piece; `text_offset` goes on from piece to piece."""

    def __init__(self, tokenizer: Tokenizer, num_top: int, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._hidden = tokenizer.special_ids if skip_special else frozenset()
        self._offset = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> dict[str, list[Any]]:
        """Of the next tokens; an entry is None for the very first token of a prompt."""
        shape: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for id, entry in zip(ids, entries, strict=True):
            shape["text_offset"].append(self._offset)
            shape["tokens"].append(spelled(self._tokenizer, id))
            shape["token_logprobs"].append(None if entry is None else json_logprob(entry.logprob))
            shape["top_logprobs"].append(None if entry is None else self._top(entry))
            if id not in self._hidden:
                self._offset += len(self._utf8.decode(self._tokenizer.token_bytes(id)))
        return shape

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest and the drawn token by spelling; where two are spelled alike the likelier counts."""
        pairs = [*entry.top[: self._num_top], (entry.token, entry.logprob)]
        return {spelled(self._tokenizer, id): json_logprob(logprob) for id, logprob in reversed(pairs)}
