"""A step's plan in, drawn ids out: the flat arrays, the model, the sampler. And how all that comes to be at start.

Knows tensors, rows and blocks; knows no policy (the scheduler's), no text, no socket. A running sequence owns a
persistent row: its block table and its params live there as array entries and are written when they change, so that a
step is array arithmetic over the rows it touches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch, LayerCache
from engine.block_pool import BlockPool
from engine.checkpoint import Checkpoint, count_weights, load_model, open_checkpoint
from engine.config import EngineConfig, Machine, asked_context, cache_budget, look_at_machine, resolve, size_cache
from engine.device import Device, open_device
from engine.engine import Engine
from engine.errors import ConfigError, EngineError
from engine.grammar import Grammars, Mask
from engine.graphs import DecodeGraphs
from engine.logprobs import prompt_logprobs, token_logprobs
from engine.messages import BLOCK_SIZE, Decision, EngineOptions, Progress, Ready, SamplingParams, Submit, Vocabulary
from engine.mixture_config import MixtureConfig
from engine.model_config import ModelConfig
from engine.sampler import Sampler, failures, ids_in_vocabulary
from engine.scheduler import Scheduler, StepPlan, StepResult
from engine.sequence import Sequence
from kernels import Kernels, choose

if TYPE_CHECKING:
    from engine.models.llama import LlamaForCausalLM as CausalLM

# T tokens in the step, S sequences in the step, L of them drawn from, B columns of the block table, V vocabulary


@dataclass(slots=True)
class Step:
    """The sequences of one step, in the order of the batch."""

    seqs: list[Sequence]
    rows: NDArray[np.intp]  # [S] their persistent rows
    starts: NDArray[np.int64]  # [S] tokens computed before the step
    lengths: NDArray[np.int64]  # [S] and after it
    query_start: NDArray[np.int32]  # [S + 1]
    ends: NDArray[np.intp]  # [L] which of them reach their last known token, and so are drawn from
    constrained: list[int]  # which of those must match a grammar, as indices into `ends`
    batch: Batch


class ModelRunner:
    """Implements `engine.scheduler.Runner`."""

    def __init__(
        self,
        model: CausalLM,
        caches: list[LayerCache],
        kernels: Kernels,
        device: Device,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_context: int,
    ) -> None:
        self.model = model
        self.caches = caches
        self.device = device
        self.vocab_size = model.config.vocab_size
        self.sampler = Sampler(kernels, device, max_sequences, self.vocab_size)
        self.grammars = Grammars(self.vocab_size)

        columns = math.ceil(max_context / BLOCK_SIZE)
        self.rows: dict[Sequence, int] = {}
        self.free_rows = list(range(max_sequences))
        self.block_tables = np.zeros((max_sequences, columns), np.int32)
        self.has_grammar = np.zeros(max_sequences, np.bool_)
        self.slots = np.zeros(max_sequences, np.int64)  # places for tokens in the part of each table that is written
        self.computed = np.zeros(max_sequences, np.int64)  # tokens of each in the cache, as its owner has it
        self.known = np.zeros(max_sequences, np.int64)  # tokens of each that are known, as its owner has it
        self.newest = np.zeros(max_sequences, np.int64)  # the last of these
        self.num_logprobs = np.full(max_sequences, -1, np.int64)  # -1: none asked for

        self._token_ids = device.buffer((max_batch_tokens,), torch.int64)
        self._positions = device.buffer((max_batch_tokens,), torch.int64)
        self._slots = device.buffer((max_batch_tokens,), torch.int64)
        self._query_start = device.buffer((max_sequences + 1,), torch.int32)
        self._seq_lens = device.buffer((max_sequences,), torch.int32)
        self._tables = device.buffer((max_sequences * columns,), torch.int32)
        self._logits_rows = device.buffer((max_sequences,), torch.int64)
        # the plain definitions look at values, which a graph may not
        ladder = [] if kernels.name == "torch" else [size for size in device.graph_sizes if size <= max_sequences]
        self.graphs = DecodeGraphs(model, caches, device, ladder, max_context)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """What the ids mean, for sequences that ask for a grammar."""
        self.grammars.set_vocabulary(vocabulary)

    def expert_tokens(self) -> list[list[int]]:
        """Counted on the device as the experts run; padding of a captured step counts too."""
        config = self.model.config
        if not isinstance(config, MixtureConfig):
            return []
        counts = iter(torch.stack([layer.tokens for layer in self.model.weights.experts()]).tolist())
        return [next(counts) if routed else [] for routed in config.routed]

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step. A row that fails is in `failed`; what raises is a failure of the whole step."""
        for seq in plan.preempted:
            self.release(seq)
        self.device.synchronize()  # the last step, which may have drawn nothing or failed, has read its buffers
        result = StepResult()
        step = self._prepare(plan, result)
        if step is None:
            return result
        for i in step.constrained:
            self.grammars.begin(step.seqs[step.ends[i]])
        with torch.inference_mode():
            logits = self._logits(step, result)
            if logits is not None:
                self._draw(step, logits, result)
        self._advance(step, result)
        return result

    def _logits(self, step: Step, result: StepResult) -> Tensor | None:
        """Compute the step: the logits to draw from, float32 [L, V]; None if nothing is drawn."""
        num_seqs, batch = len(step.seqs), step.batch
        decodes = batch.max_query_len == 1 and len(step.ends) == num_seqs and self.graphs.takes(num_seqs)
        if decodes and all(seq.prompt_logprobs is None for seq in step.seqs):
            tables = self.block_tables[step.rows, : batch.block_tables.shape[1]]
            ids, slots = self._token_ids.host[:num_seqs], self._slots.host[:num_seqs]
            return self.graphs.logits(ids, step.starts, slots, tables, batch.max_seq_len)
        hidden = self.model.forward(batch, self.caches)
        self._prompt_logprobs(step, hidden, result)
        return self.model.logits(hidden.index_select(0, batch.logits_rows)) if len(step.ends) else None

    def _advance(self, step: Step, result: StepResult) -> None:
        """Keep by row what the scheduler notes of each sequence that goes on."""
        self.computed[step.rows] = step.lengths
        for row, seq in [(self.rows[seq], seq) for seq in result.late]:  # its last token is fed again
            self.computed[row] -= 1
            self.known[row] = len(seq.tokens)
            self.newest[row] = seq.tokens[-1]

    def release(self, seq: Sequence) -> None:
        """Its row may go to another sequence; every entry is written anew when it does."""
        row = self.rows.pop(seq, None)
        if row is not None:
            self.grammars.release(seq)
            self.free_rows.append(row)

    def _take_row(self, seq: Sequence) -> bool:
        """A row for a sequence that enters. False if it holds an id that is outside the vocabulary.

        Such ids are refused at admission. Here they must not reach memory: an embedding lookup or a mask would read or
        write past its row.
        """
        if min(seq.tokens) < 0 or max(seq.tokens) >= self.vocab_size:
            return False
        if not ids_in_vocabulary(seq.params, self.vocab_size):
            return False
        row = self.rows[seq] = self.free_rows.pop()
        self.computed[row] = seq.num_computed
        self.known[row] = len(seq.tokens)
        self.newest[row] = seq.tokens[-1]
        self.slots[row] = 0
        self.num_logprobs[row] = -1 if seq.params.logprobs is None else seq.params.logprobs
        self.sampler.set_row(row, seq.params)
        self.has_grammar[row] = bool(seq.params.grammar)
        if seq.params.grammar:
            self.grammars.enter(seq)
        return True

    def _extend_table(self, row: int, blocks: list[int]) -> None:
        """Append what is new in a sequence's blocks to its row: a block table only grows while its owner runs."""
        held = int(self.slots[row]) // BLOCK_SIZE
        assert len(blocks) > held, "a running sequence lost blocks without being released"
        self.block_tables[row, held : len(blocks)] = blocks[held:]
        self.slots[row] = len(blocks) * BLOCK_SIZE

    def _prepare(self, plan: StepPlan, result: StepResult) -> Step | None:
        """Fill the flat arrays; None when no sequence is left to compute. Only newcomers and chunks cost a loop."""
        for seq in [seq for seq in plan.num_tokens if seq not in self.rows]:
            if not self._take_row(seq):
                result.failed[seq] = "internal_error"
        seqs = [seq for seq in plan.num_tokens if seq not in result.failed] if result.failed else [*plan.num_tokens]
        if not seqs:
            return None
        num_seqs = len(seqs)
        rows = np.fromiter(map(self.rows.__getitem__, seqs), np.intp, num_seqs)
        counts = np.fromiter(map(plan.num_tokens.__getitem__, seqs), np.int64, num_seqs)
        starts, known = self.computed[rows], self.known[rows]
        lengths = starts + counts
        for i in (lengths > self.slots[rows]).nonzero()[0].tolist():
            self._extend_table(rows[i], seqs[i].blocks)
        query_start = self._query_start.host[: num_seqs + 1]
        query_start[1:] = counts.cumsum()
        tokens = self._token_ids.host
        tokens[query_start[:-1]] = self.newest[rows]  # right where only the newest token is fed
        for i in (starts + 1 < known).nonzero()[0].tolist():
            start = int(starts[i])
            tokens[query_start[i] : query_start[i + 1]] = seqs[i].tokens[start : start + int(counts[i])]
        ends = (lengths == known).nonzero()[0]
        constrained = self.has_grammar[rows[ends]].nonzero()[0].tolist()
        batch = self._arrays(rows, starts, counts, lengths, ends)
        return Step(seqs, rows, starts, lengths, query_start, ends, constrained, batch)

    def _arrays(
        self,
        rows: NDArray[np.intp],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        ends: NDArray[np.intp],
    ) -> Batch:
        """Positions, slots and tables; all [S] but ends [L], which are drawn from. query_start is filled already."""
        query_start = self._query_start.host
        num_seqs = len(rows)
        num_tokens = int(query_start[num_seqs])
        positions, row_of_token = starts, rows
        if num_tokens > num_seqs:
            row_of_token = rows.repeat(counts)
            positions = np.arange(num_tokens) + (starts - query_start[:num_seqs]).repeat(counts)
        self._positions.host[:num_tokens] = positions
        slots = self._slots.host[:num_tokens]
        slots[:] = self.block_tables[row_of_token, positions // BLOCK_SIZE]
        slots *= BLOCK_SIZE
        slots += positions % BLOCK_SIZE
        self._seq_lens.host[:num_seqs] = lengths
        max_seq_len = int(lengths.max())
        columns = math.ceil(max_seq_len / BLOCK_SIZE)
        size = num_seqs * columns
        self._tables.host[:size].reshape(num_seqs, columns)[:] = self.block_tables[rows, :columns]
        self._logits_rows.host[: len(ends)] = query_start[ends + 1] - 1
        return Batch(
            token_ids=self._token_ids.push(num_tokens),
            positions=self._positions.push(num_tokens),
            slot_mapping=self._slots.push(num_tokens),
            query_start=self._query_start.push(num_seqs + 1),
            seq_lens=self._seq_lens.push(num_seqs),
            block_tables=self._tables.push(size).view(num_seqs, columns),
            logits_rows=self._logits_rows.push(len(ends)),
            max_query_len=int(counts.max()) if num_tokens > num_seqs else 1,
            max_seq_len=max_seq_len,
        )

    def _prompt_logprobs(self, step: Step, hidden: Tensor, result: StepResult) -> None:
        """Where still wanted: one entry per position below prompt_len that the step's rows predict."""
        for i, seq in enumerate(step.seqs):
            if seq.prompt_logprobs is None or seq.params.prompt_logprobs is None:
                continue
            first, start = int(step.query_start[i]), int(step.starts[i]) + 1
            targets = seq.tokens[start : min(start + int(step.query_start[i + 1]) - first, seq.prompt_len)]
            rows = hidden[first : first + len(targets)]
            found = prompt_logprobs(rows, targets, seq.params.prompt_logprobs, self.model.logits, self.vocab_size)
            if found is None:
                result.failed[seq] = "model_produced_nan"
            else:
                result.prompt_logprobs[seq] = found

    def _draw(self, step: Step, logits: Tensor, result: StepResult) -> None:
        """The next token of each sequence whose last known token is computed now, and its logprobs where asked for."""
        is_whole = len(step.ends) == len(step.seqs)
        seqs = step.seqs if is_whole else [step.seqs[i] for i in step.ends.tolist()]
        rows = step.rows[step.ends]
        asking = (self.num_logprobs[rows] >= 0).nonzero()[0]
        raw = logits.index_select(0, self.device.upload(asking)) if len(asking) else logits  # sampling changes logits
        masks: list[tuple[int, Mask]] = []
        if step.constrained:
            asking_seqs = [seqs[i] for i in step.constrained]
            taken, result.late, failed = self.grammars.take(asking_seqs, alone=len(asking_seqs) == len(seqs))
            result.failed.update(failed)
            masks = [(i, mask) for i, mask in zip(step.constrained, taken, strict=True) if mask is not None]
        ids = self.device.download(self.sampler.sample(logits, rows, seqs, masks)).wait()
        self.newest[rows] = ids
        self.known[rows] += 1
        for i, code in failures(ids, self.vocab_size).items():
            result.failed.setdefault(seqs[i], code)
        drawn = zip(seqs, ids.tolist(), strict=True)
        without = result.late.union(result.failed)
        result.tokens = {seq: token for seq, token in drawn if seq not in without} if without else dict(drawn)
        keep = [j for j, i in enumerate(asking) if seqs[i] not in without]
        if keep:
            asked = asking[keep]
            entries = token_logprobs(raw[keep], ids[asked].tolist(), self.num_logprobs[rows[asked]].tolist())
            result.logprobs = {seqs[i]: entry for i, entry in zip(asked, entries, strict=True) if entry is not None}


def load_engine(options: EngineOptions, progress: Callable[[Progress], None]) -> tuple[Engine, Ready]:
    """From a model folder to an engine that has generated through the whole path.

    CheckpointError or ConfigError, for the user to read, if this folder or these options cannot be served here. The
    ledger holds seconds: `open` is headers and choices, `kernels` those of a CPU compiled or read from the cache,
    `read` weights to their place, `warm-up` the first steps.
    """
    if options.model_runner != "auto":
        from engine.null import load_null_engine

        return load_null_engine(options, progress)
    began = time.monotonic()
    checkpoint = open_checkpoint(options.model_dir, options.load_format, options.quantize)
    machine = look_at_machine(options.device)
    model_config = checkpoint.model_config
    asked_plain = options.dtype != "auto" and options.quantize is None
    packs_quantized = options.kernels == "auto" and not asked_plain
    weights = count_weights(checkpoint, packs_quantized)
    config, decisions = resolve(options, model_config, weights, checkpoint.stored_dtype, machine)
    kernels = choose(machine.type, config.kernels)
    looked = time.monotonic()
    if kernels.name == "cpu":
        _compile(config, progress)
    compiled = time.monotonic()
    form, chosen = _choose_arithmetic(checkpoint, config, kernels, machine)
    opened = time.monotonic()

    device = open_device(config.device)
    model = load_model(
        checkpoint,
        device.torch_device,
        getattr(torch, config.dtype),
        kernels,
        form,
        lambda done, total: progress(Progress("read", done, total, "bytes")),
        max_positions=asked_context(options, model_config),
        packs_quantized=packs_quantized,
    )
    read = time.monotonic()

    progress(Progress("warm-up"))
    if kernels.name == "triton":
        _check_kernels(model_config, config, machine, device)
    if machine.type == "cuda":
        config, measured = _measure_cache(options, config, model, kernels, device, machine)
        decisions = [{d.name: d for d in measured}.get(d.name, d) for d in decisions]
    runner = ModelRunner(
        model,
        allocate_caches(model, config, device),
        kernels,
        device,
        max_batch_tokens=config.max_batch_tokens,
        max_sequences=config.max_sequences,
        max_context=config.max_context,
    )
    notes = [Decision("note", "checkpoint", note) for note in checkpoint.notes]
    ledger = {"open": looked - began + opened - compiled, "kernels": compiled - looked, "read": read - opened}
    return served(config, runner, [*decisions, *chosen, *notes], ledger, read)


def _compile(config: EngineConfig, progress: Callable[[Progress], None]) -> None:
    """A CPU's kernels: half a second from the cache, ten or more the first time on a machine, which is said."""
    from kernels.cpu import warm

    progress(Progress("compiling kernels, once on this machine"))
    warm(getattr(torch, config.dtype))


def served(
    config: EngineConfig, runner: ModelRunner, decisions: list[Decision], ledger: dict[str, float], began: float
) -> tuple[Engine, Ready]:
    """A new engine around a runner that has been warmed up, which began then, and what is said of it."""
    warm_up(_engine(config, runner), config)
    return _engine(config, runner), Ready(
        vocab_size=runner.vocab_size,
        max_context=config.max_context,
        cache_tokens=config.num_blocks * BLOCK_SIZE,
        max_sequences=config.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        decisions=decisions,
        ledger={**ledger, "warm-up": time.monotonic() - began},
    )


def _engine(config: EngineConfig, runner: ModelRunner) -> Engine:
    """A new engine with empty books; what a former one left in the cache's memory cannot be found."""
    scheduler = Scheduler(
        BlockPool(config.num_blocks),
        max_batch_tokens=config.max_batch_tokens,
        max_sequences=config.max_sequences,
        max_context=config.max_context,
        vocab_size=runner.vocab_size,
    )
    return Engine(scheduler, runner)


def allocate_caches(model: CausalLM, config: EngineConfig, device: Device) -> list[LayerCache]:
    """What every layer keeps. Not initialised: on a CPU, pages that are never used never take memory."""
    dtype = getattr(torch, config.dtype)

    def empty(heads: int, features: int) -> Tensor:
        shape = (config.num_blocks, heads, BLOCK_SIZE, features)
        return torch.empty(shape, dtype=dtype, device=device.torch_device)

    return [tuple(empty(*each) for each in model.config.cache_heads) for _ in range(model.config.num_layers)]


def warm_up(engine: Engine, config: EngineConfig) -> None:
    """Generate a few tokens as any request would. ConfigError if the model's numbers are not finite in this dtype."""
    length = max(1, min(2 * BLOCK_SIZE + 1, config.max_context - 3))
    params = SamplingParams(max_tokens=3, temperature=1.0, top_k=5, top_p=0.9, ignore_eos=True, logprobs=1)
    engine.add(Submit(id=0, prompt=[i % engine.scheduler.vocab_size for i in range(length)], params=params))
    while engine.has_work():
        for delta in engine.step().deltas:
            if delta.error == "model_produced_nan":
                raise ConfigError(
                    f"The model's logits are not finite in {config.dtype}. Try --dtype float32 (or bfloat16); if that "
                    "changes nothing, the weights are damaged."
                )
            if delta.error is not None:
                raise EngineError(f"The warm-up generation failed: {delta.error}.")


def _choose_arithmetic(
    checkpoint: Checkpoint, config: EngineConfig, kernels: Kernels, machine: Machine
) -> tuple[str, list[Decision]]:
    """The form of the linear weights, and the decisions about kernels, products and threads; sets the thread counts.

    One pool does the work: torch keeps one thread where the products are not its own.
    """
    if kernels.name == "cpu":
        from kernels.cpu.threads import set_threads

        set_threads(config.threads)
    torch.set_num_threads(config.threads)
    form, why = "torch", "the plain definitions" if kernels.name == "torch" else "the device's own library"
    if kernels.name == "cpu":
        from kernels.linear import choose_form

        m = checkpoint.model_config
        heads, kv_heads = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
        shapes = [
            (heads + 2 * kv_heads, m.hidden_size),
            (m.hidden_size, heads),
            (2 * m.intermediate_size, m.hidden_size),
            (m.hidden_size, m.intermediate_size),
        ]
        form, why = choose_form(getattr(torch, config.dtype), machine.type, shapes, config.threads)
        torch.set_num_threads(config.threads if form == "torch" else 1)
    origin = "asked for" if config.kernels != "auto" else f"made for {machine.type}"
    return form, [
        Decision("kernels", kernels.name, origin),
        Decision("matrix products", form, why),
        Decision("threads", str(config.threads), f"of {machine.cores} that this process may use"),
    ]


def _check_kernels(model: ModelConfig, config: EngineConfig, machine: Machine, device: Device) -> None:
    """Every kernel against its definition on this GPU, in this model's sizes, if that was not done before.

    ConfigError names those that are wrong: nothing is served with them.
    """
    from kernels.selfcheck import Sizes, selfcheck

    wrong = selfcheck(
        device.torch_device,
        sizes=Sizes(dtype=config.dtype, **model.kernel_sizes()),
    )
    if wrong:
        lines = [*wrong[:3], *([f"and {len(wrong) - 3} more"] if len(wrong) > 3 else [])]
        raise ConfigError(
            f"On {machine.name} these kernels do not give what their definitions give, so they are not used:\n  "
            + "\n  ".join(lines)
            + "\n--kernels torch serves by the definitions: slower, and right."
        )


def _measure_cache(
    options: EngineOptions, config: EngineConfig, model: CausalLM, kernels: Kernels, device: Device, machine: Machine
) -> tuple[EngineConfig, list[Decision]]:
    """Size the KV cache from what is free after the weights are in place and beside the heaviest step."""
    peak = device.peak_bytes(lambda: heaviest_step(model, kernels, device, config))
    wanted = replace(config, max_context=asked_context(options, model.config))
    budget, why = cache_budget(options, wanted, model.config, device.free_bytes() - peak, machine)
    return size_cache(options, wanted, model.config, budget, why)


def heaviest_step(model: CausalLM, kernels: Kernels, device: Device, config: EngineConfig) -> None:
    """The largest allowed step, drawn from in every row with logprobs: what a step can allocate, this allocates.

    It runs in a cache of one block, to which all block tables point and nothing is written.
    """
    num_seqs = config.max_sequences
    num_tokens = min(config.max_batch_tokens, num_seqs * config.max_context)
    query_start = np.linspace(0, num_tokens, num_seqs + 1).astype(np.int32)
    lengths = np.diff(query_start)
    longest = int(lengths.max())
    batch = Batch(
        token_ids=device.upload(np.zeros(num_tokens, np.int64)),
        positions=device.upload(np.arange(num_tokens) - np.repeat(query_start[:-1].astype(np.int64), lengths)),
        slot_mapping=device.upload(np.full(num_tokens, -1, np.int64)),
        query_start=device.upload(query_start),
        seq_lens=device.upload(lengths),
        block_tables=device.upload(np.zeros((num_seqs, math.ceil(longest / BLOCK_SIZE)), np.int32)),
        logits_rows=device.upload(query_start[1:].astype(np.int64) - 1),
        max_query_len=longest,
        max_seq_len=longest,
    )
    sampler = Sampler(kernels, device, num_seqs, model.config.vocab_size)
    seqs = [Sequence(Submit(id=i, prompt=[0], params=SamplingParams(max_tokens=1))) for i in range(num_seqs)]
    with torch.inference_mode():
        hidden = model.forward(batch, allocate_caches(model, replace(config, num_blocks=1), device))
        logits = model.logits(hidden.index_select(0, batch.logits_rows))
        raw = logits.clone()
        masks = [(i, np.full((model.config.vocab_size + 31) // 32 * 4, 255, np.uint8)) for i in range(num_seqs)]
        sampler.sample(logits, np.arange(num_seqs), seqs, masks)
        token_logprobs(raw, [0] * num_seqs, [20] * num_seqs)
