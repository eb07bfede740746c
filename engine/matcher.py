"""Matchers of llguidance: a vocabulary's trie, and grammars compiled over it within fixed bounds.

Knows bytes and ids; imports nothing of ours but messages, and llguidance only when called, so that the engine and the
server's check at admission (server/grammar_worker.py) compile alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.messages import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class GrammarError(Exception):
    """A matcher that gave up: its grammar cannot be compiled, cannot go on, or has become too complex."""


class _Tokens:
    """The vocabulary as llguidance wants to see it. Where a grammar forces text, the longest tokens spell it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, size: int) -> None:
        tokens = vocabulary.tokens[:size]
        self.tokens = tokens + [b""] * (size - len(tokens))
        self.special_token_ids = [id for id in vocabulary.special if id < size]
        self.eos_token_id = vocabulary.ends[0]
        self.tokenizer: LLTokenizer | None = None

    def __call__(self, text: bytes | str) -> list[int]:
        assert self.tokenizer is not None
        return self.tokenizer.greedy_tokenize(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def build_tokenizer(vocabulary: Vocabulary, size: int) -> LLTokenizer:
    """llguidance's trie over the first `size` ids; some 0.3 s for 100,000."""
    from llguidance import LLTokenizer

    tokens = _Tokens(vocabulary, size)
    ends = [id for id in vocabulary.ends if id < size]
    tokens.tokenizer = LLTokenizer(tokens, n_vocab=size, eos_token=ends)  # type: ignore[arg-type]
    return tokens.tokenizer


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the start of the grammar. Raises GrammarError."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(  # no ordinary grammar comes near; they bound a matcher's memory and what one mask costs
        max_items_in_row=5000, step_max_items=200_000, max_lexer_states=30_000, verbose_errors=False
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise GrammarError(matcher.get_error())
    return matcher
