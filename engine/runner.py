"""A step's plan in, drawn ids out: the flat arrays, the model, the sampler.

Knows tensors, rows and blocks; knows no policy (the scheduler's), no text, no socket. A running sequence owns a
persistent row: its block table and its params live there as array entries and are written when they change, so that a
step is array arithmetic over the rows it touches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch, LayerCache
from engine.logprobs import prompt_logprobs, token_logprobs
from engine.messages import BLOCK_SIZE
from engine.sampler import Sampler, failures, ids_in_vocabulary
from engine.scheduler import StepPlan, StepResult

if TYPE_CHECKING:
    from engine.device import Device
    from engine.models.llama import LlamaForCausalLM as CausalLM
    from engine.sequence import Sequence
    from kernels import Kernels

# T tokens in the step, S sequences in the step, L of them drawn from, B columns of the block table, V vocabulary


@dataclass(slots=True)
class Step:
    """The sequences of one step, in the order of the batch."""

    seqs: list[Sequence]
    rows: NDArray[np.intp]  # [S] their persistent rows
    starts: NDArray[np.int64]  # [S] tokens computed before the step
    query_start: NDArray[np.int32]  # [S + 1]
    ends: NDArray[np.intp]  # [L] which of them reach their last known token, and so are drawn from
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

        columns = math.ceil(max_context / BLOCK_SIZE)
        self.rows: dict[Sequence, int] = {}
        self.free_rows = list(range(max_sequences))
        self.block_tables = np.zeros((max_sequences, columns), np.int32)
        self.num_blocks = [0] * max_sequences  # entries of each block table that are written
        self.num_logprobs = np.full(max_sequences, -1, np.int64)  # -1: none asked for

        self._token_ids = device.buffer((max_batch_tokens,), torch.int64)
        self._positions = device.buffer((max_batch_tokens,), torch.int64)
        self._slots = device.buffer((max_batch_tokens,), torch.int64)
        self._query_start = device.buffer((max_sequences + 1,), torch.int32)
        self._seq_lens = device.buffer((max_sequences,), torch.int32)
        self._tables = device.buffer((max_sequences * columns,), torch.int32)
        self._logits_rows = device.buffer((max_sequences,), torch.int64)

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step. A row that fails is in `failed`; what raises is a failure of the whole step."""
        for seq in plan.preempted:
            self.release(seq)
        result = StepResult()
        step = self._prepare(plan, result)
        if step is None:
            return result
        with torch.inference_mode():
            hidden = self.model.forward(step.batch, self.caches)
            self._prompt_logprobs(step, hidden, result)
            if len(step.ends):
                self._draw(step, hidden, result)
        return result

    def release(self, seq: Sequence) -> None:
        """Its row may go to another sequence; every entry is written anew when it does."""
        row = self.rows.pop(seq, None)
        if row is not None:
            self.num_blocks[row] = 0
            self.free_rows.append(row)

    def _take_row(self, seq: Sequence) -> int | None:
        """A row for a sequence that enters; None if it holds an id that is outside the vocabulary.

        Such ids are refused at admission. Here they must not reach memory: an embedding lookup or a mask would read or
        write past its row.
        """
        if min(seq.tokens) < 0 or max(seq.tokens) >= self.vocab_size:
            return None
        if not ids_in_vocabulary(seq.params, self.vocab_size):
            return None
        row = self.rows[seq] = self.free_rows.pop()
        self.num_blocks[row] = 0
        self.num_logprobs[row] = -1 if seq.params.logprobs is None else seq.params.logprobs
        self.sampler.set_row(row, seq.params)
        return row

    def _extend_table(self, row: int, blocks: list[int]) -> None:
        """Append what is new in a sequence's blocks to its row: a block table only grows while its owner runs."""
        held = self.num_blocks[row]
        assert len(blocks) > held, "a running sequence lost blocks without being released"
        self.block_tables[row, held : len(blocks)] = blocks[held:]
        self.num_blocks[row] = len(blocks)

    def _prepare(self, plan: StepPlan, result: StepResult) -> Step | None:
        """Fill the flat arrays; None when no sequence is left to compute."""
        seqs: list[Sequence] = []
        rows: list[int] = []
        counts: list[int] = []
        known: list[int] = []
        token_ids: list[int] = []
        for seq, count in plan.num_tokens.items():
            row = self.rows.get(seq)
            if row is None and (row := self._take_row(seq)) is None:
                result.failed[seq] = "internal_error"
                continue
            if len(seq.blocks) != self.num_blocks[row]:
                self._extend_table(row, seq.blocks)
            seqs.append(seq)
            rows.append(row)
            counts.append(count)
            known.append(len(seq.tokens))
            if count == 1:
                token_ids.append(seq.tokens[seq.num_computed])
            else:
                token_ids += seq.tokens[seq.num_computed : seq.num_computed + count]
        if not seqs:
            return None
        self._token_ids.host[: len(token_ids)] = token_ids
        starts = np.fromiter((seq.num_computed for seq in seqs), np.int64, len(seqs))
        return self._arrays(seqs, np.array(rows, np.intp), starts, np.array(counts), np.array(known))

    def _arrays(
        self,
        seqs: list[Sequence],
        rows: NDArray[np.intp],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        known: NDArray[np.int64],
    ) -> Step:
        """Positions, slots, lengths and tables from each sequence's row, start and count; all [S] except the result."""
        num_seqs, num_tokens = len(seqs), int(counts.sum())
        query_start = self._query_start.host[: num_seqs + 1]
        np.cumsum(counts, out=query_start[1:])
        lengths = starts + counts
        positions = np.arange(num_tokens) + np.repeat(starts - query_start[:-1], counts)
        self._positions.host[:num_tokens] = positions
        blocks = self.block_tables[np.repeat(rows, counts), positions // BLOCK_SIZE].astype(np.int64)
        self._slots.host[:num_tokens] = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        self._seq_lens.host[:num_seqs] = lengths
        max_seq_len = int(lengths.max())
        columns = math.ceil(max_seq_len / BLOCK_SIZE)
        size = num_seqs * columns
        self._tables.host[:size] = self.block_tables[rows, :columns].ravel()
        ends = np.flatnonzero(lengths == known)
        self._logits_rows.host[: len(ends)] = query_start[ends + 1] - 1
        batch = Batch(
            token_ids=self._token_ids.push(num_tokens),
            positions=self._positions.push(num_tokens),
            slot_mapping=self._slots.push(num_tokens),
            query_start=self._query_start.push(num_seqs + 1),
            seq_lens=self._seq_lens.push(num_seqs),
            block_tables=self._tables.push(size).view(num_seqs, columns),
            logits_rows=self._logits_rows.push(len(ends)),
            max_query_len=int(counts.max()),
            max_seq_len=max_seq_len,
        )
        return Step(seqs, rows, starts, query_start, ends, batch)

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

    def _draw(self, step: Step, hidden: Tensor, result: StepResult) -> None:
        """The next token of each sequence whose last known token is computed now, and its logprobs where asked for."""
        seqs = [step.seqs[i] for i in step.ends]
        rows = step.rows[step.ends]
        logits = self.model.logits(hidden.index_select(0, step.batch.logits_rows))
        asking = np.flatnonzero(self.num_logprobs[rows] >= 0)
        raw = logits.index_select(0, self.device.upload(asking)) if len(asking) else logits  # sampling changes logits
        ids = self.device.download(self.sampler.sample(logits, rows, seqs)).wait()
        for i, code in failures(ids, self.vocab_size).items():
            result.failed.setdefault(seqs[i], code)
        drawn = zip(seqs, ids.tolist(), strict=True)
        result.tokens = {seq: token for seq, token in drawn if seq not in result.failed}
        keep = [j for j, i in enumerate(asking) if seqs[i] not in result.failed]
        if keep:
            asked = asking[keep]
            entries = token_logprobs(raw[keep], ids[asked].tolist(), self.num_logprobs[rows[asked]].tolist())
            result.logprobs = {seqs[i]: entry for i, entry in zip(asked, entries, strict=True) if entry is not None}
