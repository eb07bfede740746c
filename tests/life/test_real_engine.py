"""The whole engine on a small checkpoint, in its own process: killed, stopped, poisoned, left."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.messages import EngineOptions, SamplingParams, Submit
from server.engine_client import EngineClient
from server.supervisor import ENGINE_COMMAND, Supervisor
from tests.engine.tiny import make_checkpoint
from tests.life.faulty_worker import NAN, RAISE
from tests.life.serving import Answer, num_fds, read, serving, until

FAULTY_COMMAND = (sys.executable, "-P", "-m", "tests.life.faulty_worker")
TOKENS = 40  # of each answer
OPTIONS: dict[str, Any] = {"device": "cpu", "threads": 1, "kv_cache_bytes": 8 << 20}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("life") / "tiny", "LlamaForCausalLM", 11, tokenizer=True)


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return random.Random(seed)


def real(checkpoint: Path, command: tuple[str, ...] = ENGINE_COMMAND, progress_limit: float = 60.0):
    return serving(str(checkpoint), command=command, options=OPTIONS, progress_limit=progress_limit)


def requests(rng: random.Random, count: int, tokens: int) -> list[list[Submit]]:
    """Half greedy, half seeded with all the sampling there is; every fourth asks for two answers and logprobs."""
    made = []
    for i in range(count):
        prompt = [rng.randrange(NAN) for _ in range(rng.randrange(2, 80))]
        params: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
        params["bad_words"] = [[NAN], [RAISE]]  # orders for the faulty worker, not to be given by the model
        if i % 2:
            params |= {"temperature": 1.0, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1}
        if i % 4 == 3:
            params |= {"logprobs": 2, "prompt_logprobs": 1}
        made.append([one(prompt, params | {"seed": rng.randrange(1 << 62)}, n) for n in range(1 + (i % 4 == 3))])
    return made


def one(prompt: list[int], params: dict[str, Any], n: int) -> Submit:
    leader = 0 if n else None
    return Submit(id=n, prompt=prompt, params=SamplingParams(**params), arrival=time.monotonic(), leader=leader)


def same(got: list[Answer], want: list[Answer]) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a.tokens, a.finish, a.error) == (b.tokens, b.finish, b.error)
        assert [(x.token, x.rank) for x in a.logprobs] == [(x.token, x.rank) for x in b.logprobs]
        assert [x.logprob for x in a.logprobs] == pytest.approx([x.logprob for x in b.logprobs], abs=1e-4)
        assert len(a.prompt_logprobs) == len(b.prompt_logprobs) <= 1


async def kills_change_no_answer(checkpoint: Path, rng: random.Random, kills: int) -> None:
    """Sixteen requests again and again, the engine killed somewhere in each round."""
    async with real(checkpoint) as (client, supervisor):
        asks = requests(rng, 16, TOKENS)
        total = sum(TOKENS * len(group) for group in asks)
        undisturbed = await asyncio.gather(*(read(client, group) for group in asks))
        assert all(len(answer.tokens) == TOKENS for group in undisturbed for answer in group)
        for round in range(kills):
            came, when = 0, rng.randrange(1, total)

            def seen(tokens: int, when: int = when) -> None:
                nonlocal came
                if came < when <= came + tokens:
                    os.kill(supervisor.pid, signal.SIGKILL)
                came += tokens

            answers = await asyncio.gather(*(read(client, group, seen) for group in asks))
            for got, want in zip(answers, undisturbed, strict=True):
                same(got, want)
            # a kill with the very last token is noticed only now; the next round must not be in flight in it
            await until(lambda round=round: client.restarts == round + 1)
        assert client.num_open() == 0
        await until(lambda: client.stats.running == client.stats.used_blocks == 0)


@pytest.mark.timeout(900)
async def test_twenty_kills_under_sixteen_streams_change_no_answer(checkpoint: Path, rng: random.Random) -> None:
    """Two servers side by side, since the time goes into imports on one core."""
    fds = num_fds()
    await asyncio.gather(*(kills_change_no_answer(checkpoint, rng, 10) for _ in range(2)))
    assert num_fds() == fds


async def test_stopped_for_longer_than_the_limit_the_engine_is_replaced_and_no_answer_changes(
    checkpoint: Path, rng: random.Random
) -> None:
    async with real(checkpoint, progress_limit=3.0) as (client, supervisor):
        asks = requests(rng, 8, 80)
        undisturbed = await asyncio.gather(*(read(client, group) for group in asks))
        steps = client.stats.steps
        reading = asyncio.gather(*(read(client, group) for group in asks))
        await until(lambda: client.stats.steps > steps + 10)
        os.kill(supervisor.pid, signal.SIGSTOP)
        await until(lambda: not client.healthy(), 3.0)
        for got, want in zip(await reading, undisturbed, strict=True):
            same(got, want)
        assert client.restarts == 1
        assert client.healthy()


async def test_a_row_of_nan_is_one_failed_request_and_a_step_that_raises_is_no_dead_engine(
    checkpoint: Path, rng: random.Random
) -> None:
    async with real(checkpoint, FAULTY_COMMAND) as (client, supervisor):
        pid, asks = supervisor.pid, requests(rng, 8, 40)
        undisturbed = await asyncio.gather(*(read(client, group) for group in asks))
        reading = asyncio.gather(*(read(client, group) for group in asks))
        greedy = SamplingParams(max_tokens=9, temperature=0.0)
        with_rows = SamplingParams(max_tokens=9, prompt_logprobs=2)
        poisons = [Submit(id=0, prompt=[7, 8, NAN, 9], params=params) for params in (greedy, with_rows)]
        for (bad,) in await asyncio.gather(*(read(client, [poison]) for poison in poisons)):
            assert (bad.tokens, bad.finish, bad.error) == ([], "error", "model_produced_nan")
        for got, want in zip(await reading, undisturbed, strict=True):
            same(got, want)

        # and a step that raises costs those in it, which here is one; the process lives on
        (bad,) = await read(client, [Submit(id=0, prompt=[7, RAISE], params=greedy)])
        assert (bad.finish, bad.error) == ("error", "internal_error")
        for got, want in zip(await asyncio.gather(*(read(client, group) for group in asks)), undisturbed, strict=True):
            same(got, want)
        assert (supervisor.pid, client.restarts) == (pid, 0)
        await until(lambda: client.stats.running == client.stats.used_blocks == 0)


async def test_a_client_that_leaves_frees_its_blocks_and_the_engine_opens_no_port(
    checkpoint: Path, rng: random.Random
) -> None:
    async with real(checkpoint) as (client, supervisor):
        for _ in range(10):
            (group,) = requests(rng, 1, 400)
            async with client.open(group) as stream:
                for _ in range(rng.randrange(4)):
                    await anext(stream)
            await until(lambda: client.stats.running == client.stats.waiting == client.stats.used_blocks == 0, 2.0)
        engine = psutil.Process(supervisor.pid)
        assert [c for c in engine.net_connections("inet") if c.status == psutil.CONN_LISTEN] == []
        assert engine.children(recursive=True) == []


async def test_the_engine_does_not_outlive_its_api_at_any_moment_of_loading(
    checkpoint: Path, rng: random.Random
) -> None:
    """Our end of the socket is closed, as by an API that dies, while torch is imported and weights are read."""
    for _ in range(4):
        client = EngineClient()
        supervisor = Supervisor(client, EngineOptions(model_dir=str(checkpoint), **OPTIONS))
        supervisor.start()
        await until(lambda client=client: client.progress is not None)
        process = supervisor._process
        await asyncio.sleep(rng.random() * 1.5)
        supervisor._link._transport.abort()
        status = await asyncio.wait_for(asyncio.to_thread(process.wait), 5)
        assert status in (1, -signal.SIGKILL)  # by its own watch, or by the supervisor a second later
        await supervisor.stop()
