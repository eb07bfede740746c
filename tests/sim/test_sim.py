"""Worlds by the hundred, and the proof that they would notice: bugs are planted, and each is found."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import pytest

from tests.sim.mutations import MUTATIONS
from tests.sim.world import Violation, World

SEEDS = int(os.environ.get("PENSTOCK_SIM_SEEDS", "300"))
CHUNKS = 4
SEEDS_TO_FIND_A_BUG = 500


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "penstock.engine")  # thousands of injected faults


@pytest.mark.timeout(0)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_sequence_gets_its_solo_answer_and_nothing_is_left_behind(chunk: int) -> None:
    preemptions = hits = kills = 0
    for seed in range(chunk, SEEDS, CHUNKS):
        try:
            world = World(seed).run()
        except Violation as violation:
            pytest.fail(f"{violation}\nreplay: python -m tests.sim --seed {seed}")
        preemptions, hits, kills = preemptions + world.preemptions, hits + world.hits, kills + world.kills
    assert SEEDS < 100 or min(preemptions, hits, kills) > 4, "the worlds have become too quiet to prove anything"


def test_a_seed_decides_everything() -> None:
    def history(world: World) -> list[object]:
        return [(ask.submit, ask.tokens, ask.closed, ask.heard) for ask in world.asks.values()]

    first, second = World(5).run(), World(5).run()
    assert history(first) == history(second)
    assert (first.steps, first.now) == (second.steps, second.now)


@pytest.mark.parametrize("plant", MUTATIONS, ids=lambda plant: plant.__name__)
def test_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for seed in range(SEEDS_TO_FIND_A_BUG):
        try:
            World(seed).run()
        except Exception:  # a Violation, or the planted bug breaks the world itself
            return
    pytest.fail(f"{plant.__name__} lives through {SEEDS_TO_FIND_A_BUG} worlds")
