"""`penstock bench serve`: load any OpenAI-compatible server and report what its clients felt.

Closed loop (`--concurrency`) or open loop (`--rate`, Gamma arrivals). Chunks are only time-stamped during the run and
parsed after it, so that the client takes little of the machine it may share with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.report import Outcome, plot, summarise, table, write_json
from benchmarks.workload import Job, Lengths, make_jobs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `penstock bench serve`."""
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server, without /v1")
    add("--model", default=None, help="model name; default: the first of /v1/models")
    add("--api-key", default=None, help="bearer token")
    add("--api", choices=("completions", "chat"), default="completions")
    add("--requests", type=int, default=64, help="conversations to send")
    add("--concurrency", type=int, default=8, help="conversations open at once (closed loop)")
    add("--rate", type=float, default=None, help="conversations per second (open loop) instead of --concurrency")
    add("--burstiness", type=float, default=1.0, help="shape of the Gamma gaps: 1 is Poisson, below 1 is bursty")
    add("--input-len", type=Lengths.parse, default=Lengths(128, 128), help="prompt tokens, e.g. 128 or 64-512")
    add("--output-len", type=Lengths.parse, default=Lengths(64, 64), help="answer tokens, e.g. 64 or 16-256")
    add("--shared-prefix", type=int, default=0, help="tokens at the start that all prompts share")
    add("--turns", type=int, default=1, help="turns of each conversation, every one with the whole history (chat)")
    add("--temperature", type=float, default=0.0)
    add("--no-ignore-eos", action="store_true", help="let the model end early (servers that refuse ignore_eos)")
    add("--ttft-bound", type=float, default=2000.0, help="goodput: TTFT at most, ms")
    add("--itl-bound", type=float, default=200.0, help="goodput: p99 of a request's ITL at most, ms")
    add("--warmup", type=int, default=2, help="requests sent before and not counted")
    add("--seed", type=int, default=0)
    add("--json", type=Path, default=None, help="write everything there")
    add("--plot", type=Path, default=None, help="write a PNG there")
    add("--quiet", action="store_true", help="no progress bar")


def body_of(args: argparse.Namespace, model: str, history: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
    """One request's JSON."""
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": args.temperature,
        "max_tokens": max_tokens,
    }
    if args.api == "chat":
        body["messages"] = history
    else:
        body["prompt"] = "\n".join(message["content"] for message in history)
    if not args.no_ignore_eos:
        body["ignore_eos"] = True
    return body


async def send(client: httpx.AsyncClient, path: str, body: dict[str, Any], start: float) -> tuple[Outcome, str]:
    """Stream one request; its times and the text of the answer."""
    outcome = Outcome(sent=time.perf_counter() - start)
    raw: list[tuple[float, bytes]] = []
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                detail = (await response.aread()).decode("utf-8", "replace")[:300]
                outcome.error = f"HTTP {response.status_code}: {detail}"
                return outcome, ""
            async for chunk in response.aiter_raw():
                raw.append((time.perf_counter() - start, chunk))
    except httpx.HTTPError as error:
        outcome.error = f"{type(error).__name__}: {error}"
        return outcome, ""
    outcome.done = time.perf_counter() - start
    return outcome, read_events(raw, outcome)


def read_events(raw: list[tuple[float, bytes]], outcome: Outcome) -> str:
    """Fill in the outcome from time-stamped bytes of an SSE stream; returns the answer's text."""
    rest, text = b"", []
    for at, chunk in raw:
        *lines, rest = (rest + chunk).split(b"\n")
        said = False
        for line in lines:
            if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[5:])
            if "error" in event:
                outcome.error = str(event["error"])[:300]
                continue
            usage = event.get("usage") or {}
            outcome.prompt_tokens = usage.get("prompt_tokens", outcome.prompt_tokens)
            outcome.output_tokens = usage.get("completion_tokens", outcome.output_tokens)
            outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            for choice in event.get("choices", []):
                piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                said = said or bool(piece)
                text.append(piece)
        if said:
            outcome.chunk_times.append(at)
    if outcome.error is None and not outcome.chunk_times:
        outcome.error = "no text came"
    return "".join(text)


async def converse(
    client: httpx.AsyncClient, args: argparse.Namespace, model: str, job: Job, start: float
) -> list[Outcome]:
    """All turns of one conversation, one after the other."""
    path = "/v1/chat/completions" if args.api == "chat" else "/v1/completions"
    history: list[dict[str, str]] = []
    outcomes = []
    for text, max_tokens in zip(job.turns, job.max_tokens, strict=True):
        history.append({"role": "user", "content": text})
        outcome, answer = await send(client, path, body_of(args, model, history, max_tokens), start)
        outcomes.append(outcome)
        if outcome.error is not None:
            break
        history.append({"role": "assistant", "content": answer})
    return outcomes


async def run(args: argparse.Namespace) -> tuple[list[Outcome], float, str]:
    """Warm up, then send all jobs; (outcomes, seconds, model)."""
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(base_url=args.url, headers=headers, timeout=None, limits=limits) as client:
        model = args.model or (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        lengths = {"input_len": args.input_len, "output_len": args.output_len}
        for job in make_jobs(count=args.warmup, seed=args.seed + 1, **lengths):
            await converse(client, args, model, job, time.perf_counter())
        jobs = make_jobs(
            count=args.requests,
            seed=args.seed,
            shared_prefix=args.shared_prefix,
            turns=args.turns,
            rate=args.rate,
            burstiness=args.burstiness,
            **lengths,
        )
        gate = asyncio.Semaphore(args.concurrency if args.rate is None else len(jobs))
        start = time.perf_counter()

        async def one(job: Job) -> list[Outcome]:
            await asyncio.sleep(max(0.0, job.at - (time.perf_counter() - start)))
            async with gate:
                return await converse(client, args, model, job, start)

        outcomes = await _with_progress([asyncio.create_task(one(job)) for job in jobs], args.quiet)
        return outcomes, time.perf_counter() - start, model


async def _with_progress(tasks: Sequence[asyncio.Task[list[Outcome]]], quiet: bool) -> list[Outcome]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    outcomes: list[Outcome] = []
    with Progress(*columns, disable=quiet or not sys.stderr.isatty(), transient=True) as bar:
        row = bar.add_task("requests", total=len(tasks), note="")
        for finished in asyncio.as_completed(tasks):
            outcomes += await finished
            errors = sum(o.error is not None for o in outcomes)
            bar.update(row, advance=1, note=f"{errors} errors" if errors else "")
    return outcomes


def main(args: argparse.Namespace) -> int:
    """Run, print the table, write what was asked for; 1 when a request failed."""
    try:
        outcomes, seconds, model = asyncio.run(run(args))
    except httpx.HTTPError as error:
        print(
            f"{args.url} does not answer as an OpenAI server does ({error}).\nStart one: penstock serve",
            file=sys.stderr,
        )
        return 1
    figures = summarise(outcomes, seconds, args.ttft_bound / 1e3, args.itl_bound / 1e3)
    load = f"rate {args.rate}/s" if args.rate else f"concurrency {args.concurrency}"
    setup = {key: str(value) for key, value in vars(args).items() if key not in ("api_key", "run")}
    print(
        f"{model} at {args.url}, {load}, {args.input_len.low}-{args.input_len.high} tokens in, "
        f"{args.output_len.low}-{args.output_len.high} out"
    )
    print(table(figures))
    for message in sorted({o.error for o in outcomes if o.error})[:3]:
        print(f"error: {message}")
    if args.json:
        write_json(args.json, setup, figures, outcomes)
    if args.plot:
        plot(args.plot, f"{model}, {load}", outcomes)
    return 1 if figures["errors"] else 0
