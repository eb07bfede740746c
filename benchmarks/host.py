"""What the host costs: the real engine around no model (--model-runner null), on this machine.

    python benchmarks/host.py steps              steps per second, and the host's share of an H100's step of an 8B model
    python benchmarks/host.py scheduler          schedule and update per sequence, prefix hashing, admission
    python benchmarks/host.py trace              requests as people send them, at the pace of that GPU
    python benchmarks/host.py soak               200,000 short requests: memory, latency and garbage collections
    python benchmarks/host.py soak --http        the same through the whole server (10 minutes and more)
    ... --save                                   also to benchmarks/results/host-COMMAND-DATE.txt

Microseconds here vary twofold with a machine's neighbours; the calibration loop before and after tells how fast the
machine was (gpu-perf: a fast quiet core takes about 60 ns).
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.engine import PARTS, Stopwatch
from benchmarks.report import percentile
from benchmarks.workload import TRACES, Lengths, arrivals
from engine.engine import Engine
from engine.load import load_engine
from engine.messages import EngineOptions, SamplingParams, Submit, encode
from engine.null import STEP_TIMES
from engine.worker import spare_the_collector

MODEL = Path(__file__).parent / "configs" / "llama-3.1-8b"
BATCHES = (1, 8, 64, 256, 1024)
CONTEXT = {1024: 256}  # tokens of each prompt; 512 at other batches, which 80 GB would not hold at 1024
SHORT = (Lengths(8, 24), Lengths(4, 12))
CACHE_BYTES = 2 << 30  # in a soak: 1,024 blocks, so that the cache is soon full and stays so
VOCABULARY = 32000

lines: list[str] = []


def say(text: str) -> None:
    print(text, flush=True)
    lines.append(text)


def calibrate() -> float:
    """Nanoseconds of an iteration of two dictionary operations, the least of a few runs."""
    best = float("inf")
    for _ in range(5):
        table: dict[int, int] = {}
        start = time.perf_counter()
        for i in range(20000):
            table[i & 255] = table.get(i & 127, 0) + 1
        best = min(best, time.perf_counter() - start)
    return best / 20000 * 1e9


def null_engine(runner: str = "null", **options: Any) -> Engine:
    """An 8B model's engine without the model, and the collector as it is in the engine process."""
    given = EngineOptions(model_dir=str(MODEL), model_runner=runner, **options)
    engine = load_engine(given, lambda progress: None)[0]
    spare_the_collector()
    return engine


def ask(id: int, rng: random.Random, prompt: int, output: int, at: float = 0.0) -> Submit:
    """A request of our own words: as the engine gets it, lengths in tokens."""
    ids = [rng.randrange(VOCABULARY) for _ in range(prompt)]
    params = SamplingParams(max_tokens=output, temperature=0.8, ignore_eos=True, seed=id)
    return Submit(id=id, prompt=ids, params=params, arrival=at)


# How many steps per second


def decoding(engine: Engine, batch: int, output: int) -> None:
    """Bring `batch` sequences to where each step draws one token of each."""
    rng = random.Random(batch)
    for id in range(batch):
        engine.add(ask(id, rng, CONTEXT.get(batch, 512), output))
    while any(seq.num_computed < seq.prompt_len for seq in engine.scheduler.sequences.values()):
        engine.step()


def times_of(engine: Engine, steps: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of each step and its message."""
    found = []
    for _ in range(steps):
        start = clock()
        encode(engine.step())
        found.append(clock() - start)
    return found


def steps_table(num_steps: int) -> None:
    """All batches: what the host takes (CPU time, since neighbours take the rest), then steps at the GPU's pace."""
    say(f"calibration {calibrate():.0f} ns")
    say(
        f"{'batch':>5} {'steps/s':>8} {'us/step':>8} {'us/seq':>7} | "
        + " ".join(f"{part:>8}" for part in PARTS)
        + f" us | {'GPU ms':>7} {'host':>5} {'paced ms':>8} {'GPU idle':>8}"
    )
    step_time = STEP_TIMES["null-h100-8b"]
    assert step_time is not None
    for batch in BATCHES:
        options: dict[str, Any] = {"max_sequences": batch, "max_batch_tokens": max(8192, batch), "max_context": 2048}
        engine, paced = null_engine(**options), null_engine("null-h100-8b", **options)
        decoding(engine, batch, 1500)
        host = statistics.median(times_of(engine, num_steps, time.thread_time))
        watch = Stopwatch(engine)
        split = [watch.step(in_parts=True).parts for _ in range(max(5, num_steps // 4))]
        decoding(paced, batch, 1500)
        cached = sum(seq.num_computed for seq in paced.scheduler.sequences.values())
        steps = max(8, num_steps // 8)
        gpu = step_time.seconds(batch, cached + batch * steps // 2)
        real = statistics.median(times_of(paced, steps, time.perf_counter))
        parts = " ".join(f"{statistics.median(one[part] for one in split) * 1e6:8.0f}" for part in PARTS)
        say(
            f"{batch:5} {1 / host:8.0f} {host * 1e6:8.0f} {host / batch * 1e6:7.2f} | {parts}    | {gpu * 1e3:7.2f} "
            f"{host / gpu:5.0%} {real * 1e3:8.2f} {max(0.0, 1 - gpu / real):8.1%}"
        )
    say(f"calibration {calibrate():.0f} ns")


# Requests as they come


class Point(NamedTuple):
    """A process after so many requests."""

    ended: int
    resident: int  # bytes
    cpu: float  # seconds so far, of all its threads


@dataclass
class Run:
    """What a stream of requests met. Its own memory is taken at the start, so that growth is the engine's."""

    latencies: NDArray[np.float64]  # seconds, in the order in which they ended
    firsts: NDArray[np.float64]  # seconds to the first token, in the order in which it came
    ended: int = 0
    begun: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    points: list[Point] = field(default_factory=list)


def timed_requests(
    seed: int, prompts: Lengths, outputs: Lengths, rate: float | None = None, burstiness: float = 1.0
) -> Iterator[tuple[float, Submit]]:
    """(seconds after the start, request) without end; all at once without a rate."""
    rng = random.Random(seed)
    times = arrivals(rng, rate, burstiness) if rate else iter(lambda: 0.0, None)
    for id, at in enumerate(times):
        yield at, ask(id, rng, prompts.draw(rng), outputs.draw(rng), at)


def drive(engine: Engine, requests: Iterator[tuple[float, Submit]], count: int, concurrency: int) -> Run:
    """Feed `count` requests at their times, at most `concurrency` at once, until all are answered."""
    run = Run(np.full(count, np.nan), np.full(count, np.nan))
    open_since: dict[int, float] = {}
    started: set[int] = set()
    pending = islice(requests, count)
    following = next(pending, None)
    begin = time.perf_counter()
    while following is not None or open_since:
        now = time.perf_counter() - begin
        while following is not None and following[0] <= now and len(open_since) < concurrency:
            open_since[following[1].id] = max(now, following[0]) if following[0] else now
            engine.add(following[1])
            following = next(pending, None)
        if not open_since:
            assert following is not None
            time.sleep(max(0.0, following[0] - now))
            continue
        output = engine.step()
        encode(output)
        run.steps += 1
        now = time.perf_counter() - begin
        for delta in output.deltas:
            run.tokens += len(delta.tokens)
            if delta.id not in started:
                started.add(delta.id)
                run.firsts[run.begun] = now - open_since[delta.id]
                run.begun += 1
            if delta.finish is not None:
                assert delta.error is None, delta.error
                run.latencies[run.ended] = now - open_since.pop(delta.id)
                run.ended += 1
                started.discard(delta.id)
                if run.ended % 1000 == 0:
                    run.points.append(look(os.getpid(), run.ended))
    run.seconds = time.perf_counter() - begin
    return run


def look(pid: int, ended: int) -> Point:
    """A process now, after so many requests."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    ticks = int(fields[11]) + int(fields[12])
    return Point(ended, int(fields[21]) * os.sysconf("SC_PAGE_SIZE"), ticks / os.sysconf("SC_CLK_TCK"))


def trace_report(name: str, count: int, rate: float, burstiness: float) -> None:
    """One trace at the modelled GPU's pace: how much of the time the GPU would have waited for the host."""
    engine = null_engine("null-h100-8b", max_context=16384)
    runner: Any = engine.runner
    busy, launch = [0.0], runner.device.launch

    def counting(seconds: float) -> None:
        busy[0] += seconds
        launch(seconds)

    runner.device.launch = counting
    prompts, outputs = TRACES[name]
    run = drive(engine, timed_requests(1, prompts, outputs, rate, burstiness), count, concurrency=count)
    say(f"{name}: prompts {prompts}, answers {outputs} (median/sigma), {rate:g} requests/s, Gamma shape {burstiness:g}")
    say(
        f"{count} requests, {run.tokens} tokens in {run.seconds:.1f} s: {run.tokens / run.seconds:.0f} tok/s, "
        f"{run.steps} steps of {run.tokens / run.steps:.0f} tokens; the GPU would compute {busy[0] / run.seconds:.0%} "
        "of the time; TTFT " + ", ".join(f"p{p} {percentile(list(run.firsts), p / 100) * 1e3:.0f} ms" for p in (50, 99))
    )


# Many requests


def growth(points: list[Point]) -> str:
    """Bytes per 1,000 requests, by least squares over the last third: before, caches and allocators fill up."""
    late = points[-max(3, len(points) // 3) :]
    x_mean, y_mean = (statistics.mean(values) for values in ([p.ended for p in late], [p.resident for p in late]))
    slope = sum((p.ended - x_mean) * (p.resident - y_mean) for p in late)
    slope /= max(1, sum((p.ended - x_mean) ** 2 for p in late))
    return (
        f"{slope:+.2f} kB per 1,000 requests over the last third; {points[0].resident / 1e6:.1f} MB after "
        f"{points[0].ended} requests, {points[-1].resident / 1e6:.1f} MB at the end"
    )


def cpu_tenths(points: list[Point]) -> str:
    """CPU time of a request in the first and the last tenth: of a neighbour it feels no more than the lost caches."""
    step = max(1, len(points) // 10)
    first, last = (
        (after.cpu - before.cpu) / (after.ended - before.ended) * 1e6
        for before, after in ((points[0], points[step]), (points[-1 - step], points[-1]))
    )
    ratio = f" ({last / first:.2f} times)" if first else ""
    return f"CPU time of a request in the first tenth {first:.0f} us, in the last {last:.0f} us{ratio}"


def tenths(latencies: Sequence[float] | NDArray[np.float64]) -> str:
    """Median latency of the first and the last tenth."""
    tenth = max(1, len(latencies) // 10)
    first, last = np.median(latencies[:tenth]), np.median(latencies[-tenth:])
    return (
        f"latency of the first tenth {first * 1e3:.2f} ms, of the last {last * 1e3:.2f} ms ({last / first:.2f} times)"
    )


def soak(count: int, concurrency: int) -> None:
    """Through the engine alone, in this process."""
    engine = null_engine(max_sequences=concurrency, kv_cache_bytes=CACHE_BYTES)
    before = [generation["collections"] for generation in gc.get_stats()]
    run = drive(engine, timed_requests(2, *SHORT), count, concurrency)
    collections = [generation["collections"] - old for generation, old in zip(gc.get_stats(), before, strict=True)]
    say(f"{count} requests of {SHORT[0]} tokens in and {SHORT[1]} out, {concurrency} at once, the engine alone")
    say(f"{count / run.seconds:.0f} requests/s, {run.steps} steps, {run.tokens} tokens in {run.seconds:.0f} s")
    say(f"memory {growth(run.points)}")
    say(cpu_tenths(run.points))
    say(tenths(run.latencies))
    say(f"garbage collections of generations 0, 1, 2: {collections}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("steps", "scheduler", "trace", "soak"))
    parser.add_argument("--steps", type=int, default=200, help="steps timed at each batch")
    parser.add_argument("--requests", type=int, default=None, help="default: 400 for trace, 200000 for soak")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at once (soak)")
    parser.add_argument("--trace", choices=tuple(TRACES), default="sharegpt")
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second (trace)")
    parser.add_argument("--burstiness", type=float, default=0.25, help="shape of the Gamma gaps (trace); CV is 1/sqrt")
    parser.add_argument("--http", action="store_true", help="soak the whole server")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/host-COMMAND-DATE.txt")
    options = parser.parse_args()
    say(f"{date.today()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}, load {os.getloadavg()[0]:.1f}")
    if options.command == "steps":
        steps_table(options.steps)
    elif options.command == "scheduler":
        from benchmarks import scheduler

        batch_tokens = scheduler.ADMITTED * scheduler.PROMPT
        engine = null_engine(max_batch_tokens=batch_tokens, max_sequences=scheduler.ADMITTED, max_context=2048)
        say(f"calibration {calibrate():.0f} ns")
        for line in (*scheduler.decode_report(options.steps), *scheduler.admission_report(engine)):
            say(line)
        say(f"calibration {calibrate():.0f} ns")
    elif options.command == "trace":
        trace_report(options.trace, options.requests or 400, options.rate, options.burstiness)
    elif options.http:
        from benchmarks.soak import soak_server

        for line in soak_server(options.requests or 200_000, options.concurrency):
            say(line)
    else:
        soak(options.requests or 200_000, options.concurrency)
    if options.save:
        name = f"host-{options.command}{'-http' * options.http}-{date.today()}.txt"
        path = Path(__file__).parent / "results" / name
        path.write_text("\n".join([f"$ python benchmarks/host.py {' '.join(sys.argv[1:])}", *lines]) + "\n")
        print(f"written to {path}")
    gc.unfreeze()  # or Triton reports its own objects as leaked


if __name__ == "__main__":
    main()
