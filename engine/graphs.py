"""Decode steps recorded once for each number of rows and replayed: a CUDA graph on a GPU, a recording on a CPU.

Knows the model's surface and the device's `capture`; nothing of sequences. A graph reads the same arrays at every
replay, so a step's arrays are padded to the next size of the ladder: a row of padding is a token 0 that writes to no
slot and sees nothing. The steps that are not a replay (chunks of prompts, logprobs of prompts) run as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch, LayerCache
from engine.device import Device, Graph
from engine.messages import BLOCK_SIZE

if TYPE_CHECKING:
    from engine.models.llama import LlamaForCausalLM as CausalLM

# S sequences in the step, P of them after padding, B columns of the block table


class DecodeGraphs:
    """Graphs of `model` by (P, B), captured when a step first needs one."""

    def __init__(
        self, model: CausalLM, caches: list[LayerCache], device: Device, ladder: Sequence[int], max_context: int
    ) -> None:
        self.model, self.caches, self.device = model, caches, device
        self.ladder = sorted(ladder)
        self.columns = math.ceil(max_context / BLOCK_SIZE)
        self.graphs: dict[tuple[int, int], Graph] = {}
        most = self.ladder[-1] if self.ladder else 0
        self._token_ids = device.buffer((most,), torch.int64)
        self._positions = device.buffer((most,), torch.int64)
        self._slots = device.buffer((most,), torch.int64)
        self._query_start = device.buffer((most + 1,), torch.int32)
        self._seq_lens = device.buffer((most,), torch.int32)
        self._tables = device.buffer((most * self.columns,), torch.int32)
        self._rows = device.buffer((most,), torch.int64)
        self._query_start.host[:] = np.arange(most + 1)
        self._rows.host[:] = np.arange(most)

    def takes(self, num_seqs: int) -> bool:
        return bool(self.ladder) and num_seqs <= self.ladder[-1]

    def logits(
        self,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        slots: NDArray[np.int64],
        tables: NDArray[np.int32],
        most_tokens: int,
    ) -> Tensor:
        """float32 [S, V] of one new token for each of S sequences; valid until the next call.

        positions are those of the new tokens; tables int32 [S, columns]; most_tokens: the longest sequence's.
        """
        num_seqs = len(token_ids)
        padded = next(size for size in self.ladder if size >= num_seqs)
        columns = self.device.graph_columns(math.ceil(most_tokens / BLOCK_SIZE), self.columns)
        for buffer, values, nothing in (
            (self._token_ids, token_ids, 0),
            (self._positions, positions, 0),
            (self._slots, slots, -1),
            (self._seq_lens, positions + 1, 0),
        ):
            buffer.host[:num_seqs] = values
            buffer.host[num_seqs:padded] = nothing
        table = self._tables.host[: padded * columns].reshape(padded, columns)
        table[:num_seqs, : tables.shape[1]] = tables
        batch = self._batch(padded, columns)
        graph = self.graphs.get((padded, columns))
        if graph is None:
            graph = self.graphs[padded, columns] = self.device.capture(lambda: self._step(batch))
        return graph.replay()[:num_seqs]

    def _batch(self, padded: int, columns: int) -> Batch:
        return Batch(
            token_ids=self._token_ids.push(padded),
            positions=self._positions.push(padded),
            slot_mapping=self._slots.push(padded),
            query_start=self._query_start.push(padded + 1),
            seq_lens=self._seq_lens.push(padded),
            block_tables=self._tables.push(padded * columns).view(padded, columns),
            logits_rows=self._rows.push(padded),
            max_query_len=1,
            max_seq_len=columns * BLOCK_SIZE,
        )

    def _step(self, batch: Batch) -> Tensor:
        return self.model.logits(self.model.forward(batch, self.caches))
