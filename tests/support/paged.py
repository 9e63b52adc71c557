"""Feeds sequences to an executor of the runtime, with a paging of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from atomc.ops import Batch
from atomc.runtime.executor import Executor
from atomc.runtime.watch import MemoryWatch
from tests.support.eager import Step


class Paged:
    """Feeds sequences to an executor; each request has its own shuffled pages, blocks and slot for good."""

    def __init__(self, executor: Executor, requests: int) -> None:
        serving = self.serving = executor.serving
        self.executor = executor
        pages = 1 + torch.randperm(executor.num_window_pages - 1)
        blocks = 1 + torch.randperm(executor.num_blocks - 1)
        width, depth = serving.window_table_width, serving.block_table_width
        self.window_table = pages[: requests * width].view(requests, width)
        self.block_table = blocks[: requests * depth].view(requests, depth)
        self.slots = torch.randperm(executor.num_slots)[:requests]
        for state in executor.states.values():  # what nobody wrote must not matter
            state.fill_(0xFF if state.dtype == torch.uint8 else torch.nan)  # bytes that decode to NaN

    def batch(self, pieces: list[tuple[int, int, Tensor]]) -> Batch:
        positions = torch.cat([torch.arange(first, first + len(ids)) for _, first, ids in pieces])
        lengths = torch.tensor([len(ids) for _, _, ids in pieces])
        rows = torch.tensor([row for row, _, _ in pieces])

        def ends(ratio: int) -> Tensor:
            found = ((positions + 1) % ratio == 0).nonzero()[:, 0] if ratio else positions[:0]
            return found if len(found) else torch.tensor([-1])

        fields = (
            torch.cat([ids for _, _, ids in pieces]), positions, torch.repeat_interleave(lengths),
            torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), self.slots[rows], self.window_table[rows],
            self.block_table[rows], ends(self.serving.csa_ratio), ends(self.serving.hca_ratio),
            torch.arange(len(positions))[-self.serving.max_logit_rows :],
        )  # fmt: skip
        return Batch(*(f.int() for f in fields))

    def feed(self, sequences: list[Tensor], steps: list[Step], watch: MemoryWatch | None = None) -> list[Tensor]:
        done = [0] * len(sequences)
        parts: list[list[Tensor]] = [[] for _ in sequences]
        for step in steps:
            pieces = [(i, done[i], sequences[i][done[i] : done[i] + n]) for i, n in step]
            logits = self.executor.step(self.batch(pieces), watch)
            for (i, n), part in zip(step, logits.split([n for _, n in step]), strict=True):
                parts[i].append(part)
                done[i] += n
        return [torch.cat(part) for part in parts]
