"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from server.admission import check_open
from server.assemble import Answer, Piece
from server.auth import guard
from server.body import parse
from server.errors import RequestError
from server.generate import answer_grammar, check_model, check_together, new_head, open_answer, respond, usage
from server.schema.chat import ChatRequest, Message
from server.sse import event
from server.state import ServerState, server_state, trace_of
from server.token_text import chat_logprobs, prompt_logprobs

router = APIRouter(dependencies=[Depends(guard)])


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    state = server_state(request)
    check_open(state)
    body = await parse(request, ChatRequest)
    check_model(state, body.model)
    check_together(body)
    if body.top_logprobs is not None and not body.logprobs:
        message = "`top_logprobs` needs `logprobs`: true."
        raise RequestError(400, code="invalid_value", param="top_logprobs", message=message)
    grammar = await answer_grammar(state, body)
    prompt = await render(request, state, body)
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    answer = await open_answer(
        request,
        body,
        [prompt],
        param="messages",
        max_tokens=(name, getattr(body, name)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        grammar=grammar,
    )
    chunks = ChatChunks(state, body, answer)
    return await respond(request, answer, bool(body.stream), chunks, chunks.whole)


async def render(request: Request, state: ServerState, body: Any) -> list[int]:
    """Token ids of the messages (of a ChatRequest or TokenizeRequest) in the model's chat template."""
    assert state.templates is not None
    assert state.tokenizer is not None
    messages: list[Message] = body.messages
    go_on = bool(body.continue_final_message)
    if go_on and (body.add_generation_prompt or messages[-1].role != "assistant"):
        message = "It needs an assistant message at the end and no `add_generation_prompt`."
        raise RequestError(400, code="invalid_value", param="continue_final_message", message=message)
    kwargs = dict(body.chat_template_kwargs or {})
    if (effort := getattr(body, "reasoning_effort", None)) is not None:
        kwargs.setdefault("reasoning_effort", effort)
    segments = await state.templates.render(
        [message.for_template() for message in messages],
        add_generation_prompt=not go_on if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=go_on,
        kwargs=kwargs,
    )
    if state.settings.log_prompts:
        trace_of(request).prompt_text = "".join(segment.text for segment in segments)
    ids = await asyncio.to_thread(state.tokenizer.encode_prompt, segments)
    if body.add_special_tokens:  # on top of what the template wrote; templates that write bos need none
        ids = state.tokenizer.encode("", add_special_tokens=True) + ids
    return ids


class ChatChunks:
    """OpenAI's chunk and response objects for one answer. The usual chunk is a prebuilt prefix, a string, a suffix."""

    def __init__(self, state: ServerState, body: ChatRequest, answer: Answer) -> None:
        assert state.tokenizer is not None
        self._tokenizer = state.tokenizer
        self._answer = answer
        self._body = body
        self._head = new_head(state, "chatcmpl", "chat.completion.chunk") | {"service_tier": None}
        self._include_usage = body.stream_options is not None and body.stream_options.include_usage
        self._usage_null = {"usage": None} if self._include_usage else {}
        head = orjson.dumps(self._head)[:-1]
        usage_null = b',"usage":null' if self._include_usage else b""
        numbers = range(len(answer.choices))
        self._prefixes = [b'data: %b,"choices":[{"index":%d,"delta":{"content":' % (head, i) for i in numbers]
        self._suffix = b'},"logprobs":null,"finish_reason":null}]%b}\n\n' % usage_null
        self._detailed_always = bool(body.return_token_ids)
        self._begun: set[int] = set()

    def encode(self, pieces: list[Piece]) -> bytes:
        """Events for these pieces, the role before a choice's first."""
        out = []
        for piece in pieces:
            if piece.index not in self._begun:
                out.append(self._role(piece.index))
            if piece.logprobs is not None or self._detailed_always:
                out.append(self._detailed(piece))
            elif piece.text:
                out += (self._prefixes[piece.index], orjson.dumps(piece.text), self._suffix)
            if piece.finish is not None:
                stop = {"stop_reason": piece.stop_reason} if piece.stop_reason is not None else {}
                out.append(self._event(piece.index, {}, None, piece.finish, stop))
        return b"".join(out)

    def end(self, answer: Answer) -> bytes:
        """The usage chunk, if asked for."""
        return event(self._head | {"choices": [], "usage": usage(answer)}) if self._include_usage else b""

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The chat.completion object."""
        document = self._head | {"object": "chat.completion", "choices": [self._choice(piece) for piece in pieces]}
        document["usage"] = usage(self._answer)
        if self._body.return_token_ids:
            document["prompt_token_ids"] = self._answer.work.prompts[0]
        if (entries := pieces[0].prompt_logprobs) is not None:
            document["prompt_logprobs"] = prompt_logprobs(self._tokenizer, entries)
        return document

    def _choice(self, piece: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None, "annotations": []}
        choice: dict[str, Any] = {"index": piece.index, "message": message, "logprobs": self._logprobs(piece)}
        choice["finish_reason"] = piece.finish
        if piece.stop_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = piece.tokens
        return choice

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if piece.logprobs is None:
            return None
        content = chat_logprobs(self._tokenizer, piece.logprobs, self._body.top_logprobs or 0)
        return {"content": content, "refusal": None}

    def _role(self, index: int) -> bytes:
        self._begun.add(index)
        top = {"prompt_token_ids": self._answer.work.prompts[0]} if self._body.return_token_ids else {}
        return self._event(index, {"role": "assistant", "content": "", "refusal": None}, None, None, {}, top)

    def _detailed(self, piece: Piece) -> bytes:
        extra = {"token_ids": piece.tokens} if self._body.return_token_ids else {}
        return self._event(piece.index, {"content": piece.text}, self._logprobs(piece), None, extra)

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None,
        finish: str | None,
        extra: dict[str, Any],
        top: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish, **extra}
        return event(self._head | {"choices": [choice]} | self._usage_null | (top or {}))
