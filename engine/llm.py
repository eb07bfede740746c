"""The engine in the caller's own process, for scripts: token ids in, token ids out.

    llm = LLM("path/to/checkpoint", device="cpu")
    [completion] = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=16, temperature=0))

The same scheduler, cache and model as the server's; knows no text, no HTTP and no other process.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.load import load_engine
from engine.messages import EngineOptions, SamplingParams, Submit, TokenLogprob


@dataclass(slots=True)
class Completion:
    """One prompt's continuation. `finish`: stop | length | error; `error` is then a code such as model_produced_nan."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    stop_token: int | None = None  # the eos or stop id that ended it; it is the last of `tokens`
    error: str | None = None
    cached: int = 0  # prompt tokens found in the cache
    logprobs: list[TokenLogprob] | None = None  # one per token, where asked for
    prompt_logprobs: list[TokenLogprob | None] | None = None  # None for the first token


class LLM:
    """A loaded checkpoint. `options` are the fields of `EngineOptions`; raises CheckpointError or ConfigError."""

    def __init__(self, model_dir: str | Path, **options: Any) -> None:
        self.engine, self.ready = load_engine(EngineOptions(model_dir=str(model_dir), **options), lambda progress: None)
        self._next_id = itertools.count(1)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Continue all prompts in one batch, in order. One SamplingParams serves all (with one seed), or one each.

        ValueError: a prompt that is empty, holds an id outside the vocabulary, or does not fit.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} SamplingParams; give one, or one for each prompt")
        for place, prompt in enumerate(prompts):
            self._check(place, prompt)
        arrival = time.monotonic()
        submits = [
            Submit(id=next(self._next_id), prompt=list(prompt), params=own, arrival=arrival)
            for prompt, own in zip(prompts, each, strict=True)
        ]
        completions = {submit.id: Completion() for submit in submits}
        try:
            for submit in submits:
                self.engine.add(submit)
            while self.engine.has_work():
                self._step(completions)
        finally:
            self.engine.abort(list(completions))  # after an exception or Ctrl-C; else nothing is left
        return [completions[submit.id] for submit in submits]

    def _step(self, completions: dict[int, Completion]) -> None:
        for delta in self.engine.step().deltas:
            completion = completions[delta.id]
            completion.tokens += delta.tokens
            completion.finish, completion.stop_token, completion.error = delta.finish, delta.stop_token, delta.error
            if delta.cached is not None:
                completion.cached = delta.cached
            if delta.prompt_logprobs is not None:
                completion.prompt_logprobs = delta.prompt_logprobs
            if delta.logprobs is not None:
                completion.logprobs = (completion.logprobs or []) + delta.logprobs

    def _check(self, place: int, prompt: Sequence[int]) -> None:
        limit = min(self.ready.max_context, self.ready.cache_tokens)
        if not 0 < len(prompt) <= limit:
            raise ValueError(f"prompt {place} has {len(prompt)} tokens; this model and cache take 1 to {limit}")
        if not all(0 <= token < self.ready.vocab_size for token in prompt):
            raise ValueError(f"prompt {place} holds an id outside 0 to {self.ready.vocab_size - 1}")
