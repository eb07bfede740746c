"""The real `openai` client against a running server."""

from __future__ import annotations

import asyncio

import openai
import pytest

from engine.messages import Delta
from server.app import create_app
from tests.server.conftest import make_state, running, until
from tests.server.fake_engine import drawn

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def client(engine):
    state = make_state(engine, keys=("secret",))
    async with (
        running(create_app(state), state.settings) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0) as client,
    ):
        yield client


async def test_a_chat(client):
    answer = await client.chat.completions.create(model="tiny", messages=HI)
    assert answer.choices[0].message.content == "Hello, world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 13
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_a_streamed_chat_with_logprobs_and_usage(client):
    stream = await client.chat.completions.create(
        model="tiny", messages=HI, stream=True, logprobs=True, top_logprobs=2, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello, world"
    assert chunks[1].choices[0].logprobs.content[0].top_logprobs[1].token == "I"
    assert chunks[-1].usage.completion_tokens == 13


async def test_the_streaming_helper_accumulates(client):
    async with client.chat.completions.stream(model="tiny", messages=HI) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello, world"


async def test_completions_whole_and_streamed(client):
    answer = await client.completions.create(model="tiny", prompt=["a", "b"], echo=True, logprobs=2, max_tokens=3)
    assert [choice.text for choice in answer.choices] == ["aHel", "bHel"]
    assert answer.choices[0].logprobs.token_logprobs == [None, -0.25, -0.25, -0.25]
    stream = await client.completions.create(model="tiny", prompt=[97], stream=True, max_tokens=3)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hel"


async def test_models_and_extra_body(client, engine):
    assert [model.id async for model in client.models.list()] == ["tiny", "tiny-alias"]
    assert (await client.models.retrieve("tiny")).owned_by == "penstock"
    extra = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2}
    await client.chat.completions.create(model="tiny", messages=HI, extra_body=extra)
    assert engine.asked[0].params.top_k == 3


async def test_errors_become_the_clients_exceptions(client, engine):
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="tiny", messages=HI, max_tokens=10**6)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="other", messages=HI)
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()
    engine.script = lambda ask: iter([Delta(0, finish="error", error="model_produced_nan")])
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model="tiny", messages=HI)


async def test_an_error_in_the_middle_of_a_stream_is_raised_by_the_client(client, engine):
    engine.script = lambda ask: iter([72, 105, Delta(0, finish="error", error="engine_crashed_twice")])
    stream = await client.chat.completions.create(model="tiny", messages=HI, stream=True)
    text = ""

    async def read() -> None:
        nonlocal text
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""

    with pytest.raises(openai.APIError, match="stopped twice"):
        await read()
    assert text == "Hi"


async def test_closing_a_stream_early_frees_the_sequence(client, engine):
    engine.script = lambda ask: (item for token in drawn(ask) for item in (token, 0.005))
    async with await client.chat.completions.create(model="tiny", messages=HI, stream=True) as stream:
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
    await until(lambda: engine.client.num_open() == 0, 2)


async def test_sixty_four_streams_at_once_are_each_like_alone(client, engine):
    engine.script = drawn

    async def one(seed: int) -> str:
        stream = await client.chat.completions.create(model="tiny", messages=HI, seed=seed, max_tokens=30, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    alone = [await one(seed) for seed in range(8)]
    together = await asyncio.gather(*(one(seed % 8) for seed in range(64)))
    assert list(together) == alone * 8
