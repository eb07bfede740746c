"""A process that compiles grammars to see whether they can be, so that a hostile one can be killed.

Started by server.helper_pool. Knows the vocabulary, which comes as its first frame, and llguidance. In: a byte (g an
llguidance grammar, e EBNF in GBNF's dialect to be turned into one), UTF-8 text. Out: a byte (+ it is good, - it is not,
* limit), the grammar or the reason.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec

from engine.matcher import GrammarError, build_tokenizer, compile_grammar
from engine.messages import Vocabulary
from server.helper_process import answer_frames, read_frame, set_limits

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MEMORY_BYTES = 1 << 30
CPU_SECONDS = 3
STEPS = 4  # tokens that a grammar must get beyond its start; some fail only there


def _from_ebnf(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except Exception as error:
        raise GrammarError(str(error)) from None


def walk(matcher: LLMatcher, ends: list[int]) -> None:
    """Mask after mask along the first token that each allows. Raises GrammarError where no text could go on."""
    for _ in range(STEPS):
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        allowed = (8 * i + bit for i, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1)
        token = next((id for id in allowed if id not in ends), None)
        if token is None:
            return
        if not matcher.consume_token(token):
            raise GrammarError(matcher.get_error())


def _answer(tokenizer: LLTokenizer, frame: bytes) -> bytes:
    grammar = frame[1:].decode()
    try:
        if frame.startswith(b"e"):
            grammar = _from_ebnf(grammar)
        else:
            walk(compile_grammar(tokenizer, grammar), tokenizer.eos_tokens)
    except MemoryError:
        return b"*it needed more memory than it may have"
    except RecursionError:
        return b"-it is nested too deeply"
    except GrammarError as error:
        return b"-" + str(error).encode("utf-8", "replace")
    return b"+" + grammar.encode()


def main() -> None:
    """Answer frames until stdin closes."""
    set_limits(MEMORY_BYTES)
    vocabulary = msgspec.msgpack.decode(read_frame(), type=Vocabulary)
    tokenizer = build_tokenizer(vocabulary, len(vocabulary.tokens))
    walk(compile_grammar(tokenizer, 'start: "a"'), tokenizer.eos_tokens)  # what is loaded late is loaded now
    answer_frames(partial(_answer, tokenizer), CPU_SECONDS)
