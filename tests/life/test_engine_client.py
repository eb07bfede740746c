"""server.engine_client alone: what it tells an engine and what its streams give; a list stands for the socket."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

from engine.messages import (
    Abort,
    Delta,
    Ping,
    Pong,
    Progress,
    Ready,
    SamplingParams,
    Stats,
    StepOutput,
    Submit,
    ToEngine,
    TokenLogprob,
)
from server.engine_client import EngineClient, Stream

READY = Ready(
    vocab_size=9, max_context=99, cache_tokens=99, max_sequences=9, max_batch_tokens=9, decisions=[], ledger={}
)


class Wire:
    """What the client said to the engine, and the engine's voice."""

    def __init__(self) -> None:
        self.client = EngineClient(progress_limit=10.0)
        self.sent: list[ToEngine] = []

    def up(self) -> None:
        self.client.connect(self.sent.append, READY)

    def step(self, *deltas: Delta, **stats: int) -> None:
        self.client.receive(StepOutput(list(deltas), Stats(**stats)))

    def take(self) -> list[ToEngine]:
        sent, self.sent[:] = list(self.sent), []
        return sent

    def submitted(self) -> list[Submit]:
        return [message for message in self.take() if isinstance(message, Submit)]


@pytest.fixture
def wire() -> Wire:
    wire = Wire()
    wire.up()
    return wire


def ask(id: int = 0, leader: int | None = None, **params: int) -> Submit:
    return Submit(
        id=id, prompt=[1, 2], params=SamplingParams(**({"max_tokens": 8} | params)), arrival=5.0, leader=leader
    )


async def drained(stream: Stream) -> list[tuple[int, Delta]]:
    return [item async for batch in stream for item in batch]


async def test_ids_are_the_clients_own_and_never_used_twice(wire: Wire) -> None:
    streams = [wire.client.open([ask(0), ask(1, leader=0)]) for _ in range(3)]
    submits = wire.submitted()
    assert len({submit.id for submit in submits}) == 6
    assert [submit.leader for submit in submits] == [None, submits[0].id, None, submits[2].id, None, submits[4].id]
    for stream in streams:
        stream.close()
    wire.client.open([ask()])
    (again,) = wire.submitted()
    assert again.id not in {submit.id for submit in submits}


async def test_a_stream_gives_local_indexes_and_ends_when_all_have_finished(wire: Wire) -> None:
    async with wire.client.open([ask(0), ask(1)]) as stream:
        first, second = (submit.id for submit in wire.submitted())
        wire.step(Delta(first, [3], cached=0), Delta(second, [4]))
        assert [(i, d.id, d.tokens) for i, d in await anext(stream)] == [(0, 0, [3]), (1, 1, [4])]
        wire.step(Delta(second, [5], finish="stop", stop_token=5), Delta(first, [6], finish="length"))
        assert {i: d.finish for i, d in await anext(stream)} == {0: "length", 1: "stop"}
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    assert wire.client.num_open() == 0
    assert wire.take() == []  # nothing was left to abort


async def test_a_slow_reader_gets_everything_merged_and_blocks_nobody(wire: Wire) -> None:
    slow, quick = wire.client.open([ask(max_tokens=1000, logprobs=0)]), wire.client.open([ask()])
    slow_id, quick_id = (submit.id for submit in wire.submitted())
    for n in range(1000):
        last = "length" if n == 999 else None
        first = {"cached": 2, "scheduled": 1.5} if n == 0 else {}
        wire.step(Delta(slow_id, [n], logprobs=[TokenLogprob(n, -1.0, 1)], finish=last, **first))
    wire.step(Delta(quick_id, [1], finish="stop"))
    assert len(await drained(quick)) == 1
    ((index, delta),) = await drained(slow)
    assert (index, delta.tokens, delta.finish) == (0, list(range(1000)), "length")
    assert delta.logprobs == [TokenLogprob(n, -1.0, 1) for n in range(1000)]
    assert (delta.cached, delta.scheduled) == (2, 1.5)


async def test_leaving_a_stream_aborts_what_is_unfinished_and_asks_for_the_gauges(wire: Wire) -> None:
    async with wire.client.open([ask(0), ask(1), ask(2)]) as stream:
        ids = [submit.id for submit in wire.submitted()]
        wire.step(Delta(ids[1], [3], finish="stop"))
        await anext(stream)
    abort, ping = wire.take()
    assert isinstance(abort, Abort)
    assert sorted(abort.ids) == [ids[0], ids[2]]
    assert isinstance(ping, Ping)
    wire.client.receive(Pong(0, Stats(num_blocks=7), [[], [2, 3]]))
    assert wire.client.stats == Stats(num_blocks=7)
    wire.client.receive(Pong(0, Stats()))
    assert wire.client.expert_tokens == [[], [2, 3]], "most answers leave them out"


async def test_cancelling_a_waiting_reader_aborts_too(wire: Wire) -> None:
    async def reader() -> None:
        async with wire.client.open([ask()]) as stream:
            await anext(stream)

    task = asyncio.create_task(reader())
    await asyncio.sleep(0)
    (submit,) = wire.submitted()
    task.cancel()
    await asyncio.wait([task])
    assert wire.take()[0] == Abort([submit.id])
    assert wire.client.num_open() == 0


async def test_finish_aborts_one_alone_and_nothing_more_comes_for_it(wire: Wire) -> None:
    async with wire.client.open([ask(0), ask(1)]) as stream:
        first, second = (submit.id for submit in wire.submitted())
        wire.step(Delta(first, [3]), Delta(second, [4]))
        stream.finish(0)
        assert wire.take() == [Abort([first])]
        wire.step(Delta(first, [5]), Delta(second, [6], finish="length"))
        assert [(i, d.tokens) for i, d in await drained(stream)] == [(1, [4, 6])]
        stream.finish(0)
        stream.finish(1)
        assert wire.take() == []


async def test_finishing_the_last_one_wakes_a_waiting_reader(wire: Wire) -> None:
    stream = wire.client.open([ask()])
    reader = asyncio.create_task(drained(stream))
    await asyncio.sleep(0)
    stream.finish(0)
    assert await asyncio.wait_for(reader, 1) == []


async def test_late_and_unknown_deltas_are_ignored(wire: Wire) -> None:
    stream = wire.client.open([ask()])
    (submit,) = wire.submitted()
    stream.close()
    wire.step(Delta(submit.id, [3]), Delta(12345, [4], finish="stop"))
    assert await drained(stream) == []


async def test_after_a_crash_each_sequence_goes_on_from_its_last_token(wire: Wire) -> None:
    stream = wire.client.open([ask(0, prompt_logprobs=0), ask(1, leader=0, prompt_logprobs=0), ask(2, leader=0)])
    before = wire.submitted()
    prompt_rows = [None, TokenLogprob(2, -1.0, 1)]
    wire.step(Delta(before[0].id, [3], cached=0, scheduled=1.0, prompt_logprobs=prompt_rows))
    wire.step(Delta(before[0].id, [4]))
    wire.client.engine_lost()
    assert wire.client.state == "restarting"
    assert not wire.client.healthy()
    wire.up()
    after = wire.submitted()
    assert [s.output for s in after] == [[3, 4], [], []]
    assert [s.params.prompt_logprobs for s in after] == [None, 0, None]  # delivered ones are not asked for again
    for old, new in zip(before, after, strict=True):
        assert (new.id, new.prompt, new.arrival, new.leader) == (old.id, old.prompt, old.arrival, old.leader)
    wire.step(Delta(before[0].id, [5], cached=2, scheduled=9.0))
    ((_, delta),) = await anext(stream)
    assert (delta.tokens, delta.cached, delta.scheduled) == ([3, 4, 5], 0, 1.0)
    assert delta.prompt_logprobs == prompt_rows


async def test_once_only_fields_come_once_even_to_a_quick_reader(wire: Wire) -> None:
    stream = wire.client.open([ask()])
    (submit,) = wire.submitted()
    wire.step(Delta(submit.id, [3], cached=0, scheduled=1.0))
    await anext(stream)
    wire.client.engine_lost()
    wire.up()
    wire.step(Delta(submit.id, [4], cached=2, scheduled=9.0))
    ((_, delta),) = await anext(stream)
    assert (delta.tokens, delta.cached, delta.scheduled) == ([4], None, None)


async def test_a_finished_leader_is_not_named_to_the_next_engine(wire: Wire) -> None:
    stream = wire.client.open([ask(0), ask(1, leader=0)])
    leader, _ = wire.submitted()
    wire.step(Delta(leader.id, [3], finish="stop"))
    wire.client.engine_lost()
    wire.up()
    (follower,) = wire.submitted()
    assert follower.leader is None
    stream.close()


async def test_output_that_came_with_the_ask_is_kept_in_front(wire: Wire) -> None:
    wire.client.open([Submit(id=0, prompt=[1], params=SamplingParams(max_tokens=9), output=[5, 6])])
    (submit,) = wire.submitted()
    wire.step(Delta(submit.id, [7]))
    wire.client.engine_lost()
    wire.up()
    assert wire.submitted()[0].output == [5, 6, 7]


async def test_what_arrives_while_there_is_no_engine_waits_for_the_next(wire: Wire) -> None:
    wire.client.engine_lost()
    kept, left = wire.client.open([ask()]), wire.client.open([ask()])
    assert wire.client.num_open() == 2
    left.close()
    assert wire.take() == []
    wire.up()
    (submit,) = wire.submitted()
    wire.client.engine_lost()
    wire.up()  # the first crash it was part of
    wire.step(Delta(submit.id, [3], finish="stop"))
    assert [d.finish for _, d in await drained(kept)] == ["stop"]


async def test_in_flight_in_two_crashes_is_an_error_that_keeps_the_unread_tokens(wire: Wire) -> None:
    twice = wire.client.open([ask()])
    (submit,) = wire.submitted()
    wire.step(Delta(submit.id, [3]))
    wire.client.engine_lost()
    wire.up()
    wire.step(Delta(submit.id, [4]))
    once = wire.client.open([ask()])
    wire.take()
    wire.client.engine_lost()
    ((_, delta),) = await drained(twice)
    assert (delta.tokens, delta.finish, delta.error) == ([3, 4], "error", "engine_crashed_twice")
    wire.up()
    (again,) = wire.submitted()
    wire.step(Delta(again.id, [5], finish="stop"))
    assert [d.finish for _, d in await drained(once)] == ["stop"]


async def test_a_crash_is_charged_to_the_newcomers_that_had_produced_nothing(wire: Wire) -> None:
    """Thirty streams run, a poisonous request comes: only it is in both crashes' guilt."""
    running = [wire.client.open([ask()]) for _ in range(30)]
    ids = [submit.id for submit in wire.submitted()]
    wire.step(*[Delta(id, [3]) for id in ids])
    poison = wire.client.open([ask()])
    wire.client.engine_lost()
    wire.up()
    wire.client.engine_lost()  # at once, when all of them are back and the poison runs again
    ((_, delta),) = await drained(poison)
    assert delta.error == "engine_crashed_twice"
    wire.up()
    assert wire.client.num_open() == 30
    wire.step(*[Delta(id, [4], finish="stop") for id in ids])
    for stream in running:
        assert [(d.tokens, d.finish) for _, d in await drained(stream)] == [([3, 4], "stop")]


@pytest.mark.parametrize("state", ["failed", "stopping"])
async def test_without_hope_of_an_engine_streams_end_with_an_error(wire: Wire, state: str) -> None:
    before = wire.client.open([ask()])
    wire.client.close(state)  # type: ignore[arg-type]
    after = wire.client.open([ask(0), ask(1)])
    for stream, count in ((before, 1), (after, 2)):
        deltas = [delta for _, delta in await drained(stream)]
        assert [(d.finish, d.error) for d in deltas] == [("error", "engine_unavailable")] * count
    assert wire.client.num_open() == 0
    assert not wire.client.healthy()


async def test_health_follows_the_state_and_the_progress(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    assert EngineClient().healthy()  # nothing to complain of while the first load runs
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    wire.up()
    now += 6  # more than half the limit of ten seconds without a word
    assert not wire.client.healthy()
    wire.client.receive(Pong(0, Stats()))
    assert wire.client.healthy()
    wire.client.open([ask()])
    now += 6
    wire.client.receive(Pong(0, Stats()))
    wire.step(running=0, waiting=1)
    assert not wire.client.healthy(), "a loop that turns while work waits and gets nothing done is not healthy"
    wire.step(running=1, step_tokens=16)
    assert wire.client.healthy()


async def test_settled_waits_through_loading_and_restarting() -> None:
    wire = Wire()
    waiting = asyncio.create_task(wire.client.settled())
    await asyncio.sleep(0)
    wire.client.receive(Progress("read", 1, 2))
    assert wire.client.progress == Progress("read", 1, 2)
    assert not waiting.done()
    wire.up()
    assert await waiting == "ready"
    assert wire.client.progress is None
    wire.client.engine_lost()
    waiting = asyncio.create_task(wire.client.settled())
    await asyncio.sleep(0)
    assert not waiting.done()
    wire.client.close("failed")
    assert await waiting == "failed"


def test_the_client_and_the_supervisor_import_nothing_heavy() -> None:
    code = (
        "import sys, server.engine_client, server.supervisor\n"
        "heavy = {'torch', 'numpy', 'transformers', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
