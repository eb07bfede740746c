"""What request bodies have in common: strict types, bounded sizes, closed lists of names.

Knows shapes and limits; not what the values do. Every size a client can choose has its bound in this file or in
`Settings`. Nothing is coerced: "3" and true are not numbers. A null is as good as an absent field.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.errors import safe_name

INT32 = 2**31 - 1
INT64 = 2**63 - 1
MAX_N = 2**16  # the bound that counts is --max-n
MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_CHARS = 64, 1024
MAX_TOKEN_IDS = 2**18  # in allowed_token_ids
MAX_STOP_TOKEN_IDS = 256
MAX_BIASES = 1024
MAX_BAD_WORDS, MAX_BAD_WORD_CHARS = 256, 256
MAX_SALT_CHARS = 1024
MAX_LABEL_CHARS = 512  # user, safety_identifier and the like
MAX_METADATA = 16
MAX_MODEL_CHARS = 512
SMALLEST_TEMPERATURE = 1e-9


@dataclass(frozen=True)
class Refused:
    """A field that would change the answer and is not built: which values are harmless, and the way out."""

    harmless: Callable[[Any, Mapping[str, Any]], bool]
    way_out: str


def only(*values: Any) -> Callable[[Any, Mapping[str, Any]], bool]:
    """Harmless is null or one of `values`."""
    return lambda value, body: value is None or any(value == known and type(value) is type(known) for known in values)


def refuse(way_out: str, *harmless: Any) -> Refused:
    """The usual entry: refused unless null or one of `harmless`."""
    return Refused(only(*harmless), way_out)


class Body(BaseModel):
    """A JSON object with a closed list of names; `refused` are the known ones that are answered with a way out."""

    model_config = ConfigDict(strict=True, frozen=True, protected_namespaces=())
    refused: ClassVar[Mapping[str, Refused]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, value in data.items():
            entry = cls.refused.get(name)
            if entry is not None and not entry.harmless(value, data):
                raise PydanticCustomError("unsupported_parameter", entry.way_out, {"name": name})
            if entry is None and name not in cls.model_fields:
                raise PydanticCustomError("unknown_parameter", "unknown", {"name": name, "close": cls._closest(name)})
        return {name: value for name, value in data.items() if name in cls.model_fields and value is not None}

    @classmethod
    def _closest(cls, name: str) -> str:
        known = [*cls.model_fields, *cls.refused]
        close = difflib.get_close_matches(name, known, n=1) if safe_name(name) else []
        return close[0] if close else ""


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _bias_ids(value: Any) -> Any:
    """JSON's keys are text; these are token ids in decimal."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("too_many", f"must have at most {MAX_BIASES} entries")
    if not all(key.isascii() and key.isdigit() and len(key) <= 10 for key in value):
        raise PydanticCustomError("bad_key", 'must have token ids as keys, such as "50256"')
    return {int(key): bias for key, bias in value.items()}


def _temperature(value: Any) -> Any:
    if isinstance(value, float) and 0 < value < SMALLEST_TEMPERATURE:
        raise PydanticCustomError("tiny", f"must be 0 (greedy) or between {SMALLEST_TEMPERATURE} and 100")
    return value


Label = Annotated[str, Field(max_length=MAX_LABEL_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=INT32)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True), BeforeValidator(_one_or_many)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
Biases = Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_bias_ids)]
Metadata = Annotated[dict[Label, Label], Field(max_length=MAX_METADATA)]
Temperature = Annotated[float, Field(ge=0, le=100), BeforeValidator(_temperature)]


def tag_of(value: Any) -> str:
    """Which side of `text or list` a value is on; tags in <> are left out of a param's name."""
    return "<text>" if isinstance(value, str) else "<list>"


class StreamOptions(Body):
    """OpenAI's stream_options. Obfuscation is padding that a client must ignore, and none is sent."""

    include_usage: bool = False
    include_obfuscation: bool = False


NOT_HERE = "it is not supported here; leave it out"

COMMON_REFUSED: dict[str, Refused] = {
    "store": refuse("answers are not stored; leave it out or send false", False),
    "prompt_embeds": refuse("prompts are text or token ids"),
    "use_beam_search": refuse("beam search is not built; use n with sampling", False),
    "length_penalty": refuse("it belongs to beam search, which is not built; leave it out", 1.0, 1),
    "response_format": refuse(
        'structured output is not built yet; send {"type": "text"} or leave it out', {"type": "text"}
    ),
    "structured_outputs": refuse("structured output is not built yet; leave it out", {}),
    "guided_json": refuse("structured output is not built yet; leave it out"),
    "guided_regex": refuse("structured output is not built yet; leave it out"),
    "guided_choice": refuse("structured output is not built yet; leave it out"),
    "guided_grammar": refuse("structured output is not built yet; leave it out"),
    "truncate_prompt_tokens": refuse("prompts are never cut; shorten it yourself"),
    "truncation_side": refuse("prompts are never cut; leave it out"),
    "thinking_token_budget": refuse("reasoning is not split off yet; leave it out"),
    "spaces_between_special_tokens": refuse("special tokens are not spaced out here; leave it out", True),
    "logprob_token_ids": refuse("ask for `top_logprobs` or `logprobs`"),
    "repetition_detection": refuse("use `repetition_penalty` or `stop`"),
    "return_tokens_as_token_ids": refuse("use `return_token_ids`", False),
    "return_token_offsets": refuse(NOT_HERE, False),
    "return_prompt_text": refuse("the completions route has `echo`", False),
    "return_weight_versions": refuse(NOT_HERE, False),
    "kv_transfer_params": refuse(NOT_HERE),
    "ec_transfer_params": refuse(NOT_HERE),
    "vllm_xargs": refuse(NOT_HERE, {}),
    "logits_processors": refuse("logits processors of the client are not run; use `logit_bias`", []),
}


class Generation(Body):
    """The fields of both generating routes: OpenAI's names, then vLLM's."""

    model: Annotated[str, Field(max_length=MAX_MODEL_CHARS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=INT32)] | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases | None = None
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    stop: Stops | None = None

    top_k: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = None
    allowed_token_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKEN_IDS, fail_fast=True)] | None
    ) = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = None
    prompt_logprobs: Logprobs | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-INT32, le=INT32)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = None

    # Accepted and without effect on the answer.
    user: Label | None = None
    request_id: Label | None = None
    session_id: Label | None = None
    service_tier: Label | None = None
    metadata: Metadata | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    stream_interval: Annotated[int, Field(ge=1, le=INT32)] | None = None
