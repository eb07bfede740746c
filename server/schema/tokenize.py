"""The bodies of POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from server.schema.chat import Kwargs, Messages
from server.schema.common import MAX_MODEL_CHARS, Body, TokenId

MAX_IDS = 2**20


class TokenizeRequest(Body):
    """Either a prompt or messages."""

    model: Annotated[str, Field(max_length=MAX_MODEL_CHARS)] | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Kwargs | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of_two", "The body must have either `prompt` or `messages`.")
        return self


class DetokenizeRequest(Body):
    """Token ids to turn back into text, special tokens included."""

    model: Annotated[str, Field(max_length=MAX_MODEL_CHARS)] | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_IDS, fail_fast=True)]
