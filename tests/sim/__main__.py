"""Replay one seed: `python -m tests.sim --seed N`; or look for a failing one: `python -m tests.sim --from A --to B`."""

from __future__ import annotations

import argparse
import logging
import time

from tests.sim.world import World


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sim")
    parser.add_argument("--seed", type=int, help="replay this one, with the engine's log")
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--to", dest="last", type=int, default=1000)
    parser.add_argument("--ticks", type=int, default=40, help="length of each world")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO if arguments.seed is not None else logging.CRITICAL)
    seeds = range(arguments.first, arguments.last) if arguments.seed is None else [arguments.seed]
    totals = {"seeds": 0, "sequences": 0, "steps": 0, "preemptions": 0, "cache hits": 0, "kills": 0}
    started = time.perf_counter()
    for seed in seeds:
        world = World(seed, arguments.ticks).run()
        counts = (1, len(world.asks), world.steps, world.preemptions, world.hits, world.kills)
        totals = {name: total + count for (name, total), count in zip(totals.items(), counts, strict=True)}
    print(", ".join(f"{total} {name}" for name, total in totals.items()), f"in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
