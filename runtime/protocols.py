"""What the engine needs from the executor and the manifest: tests put a strict fake in their place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch.distributed import ProcessGroup

from atomc.ops.batch import Batch


class Serving(Protocol):
    """The serving facts of the manifest; sizes in tokens unless said otherwise.

    `window` is W, the positions a query sees in the window cache, `window_page` the rows of one page of it;
    `block_tokens` the original tokens of one block of compressed rows. A ratio of 0 means: no such layers.
    """

    @property
    def model_name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_ids(self) -> list[int]: ...
    @property
    def window(self) -> int: ...
    @property
    def window_page(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def csa_ratio(self) -> int: ...
    @property
    def hca_ratio(self) -> int: ...
    @property
    def max_context(self) -> int: ...
    @property
    def max_batch_tokens(self) -> int: ...
    @property
    def max_requests(self) -> int: ...
    @property
    def max_logit_rows(self) -> int: ...
    @property
    def window_table_width(self) -> int: ...
    @property
    def block_table_width(self) -> int: ...


class Executor(Protocol):
    """Runs one step of the compiled model over caches of `num_blocks` blocks and `num_window_pages` pages.

    Block 0 and page 0 are dummies that no request is ever given; each of the `num_slots` slots is.
    """

    @property
    def serving(self) -> Serving: ...
    @property
    def tokenizer_path(self) -> Path: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_window_pages(self) -> int: ...
    @property
    def num_slots(self) -> int: ...

    def step(self, batch: Batch) -> torch.Tensor:
        """Writes the batch's rows into the caches; returns float32 logits [L, vocab_size] of `batch.logit_rows`."""
        ...


class Peers(Protocol):
    """The ranks of a run, as an executor whose steps hold collectives sees them: it is given them when it is loaded.

    Rank `d * tp + t` is number t of the `tp` ranks that run the requests of data-parallel rank d. Its device is the
    current one, and the process groups are there, before anything is loaded.
    """

    @property
    def rank(self) -> int: ...
    @property
    def dp(self) -> int: ...
    @property
    def tp(self) -> int: ...

    def group(self, axis: str) -> ProcessGroup:
        """The ranks that differ from this one on an axis, dp or tp, alone, in order: gloo on the CPU, NCCL on GPUs.

        Functional collectives take its `group_name`.
        """
        ...

    def announce(self, at: int) -> None:
        """Say that collective `at` of the step is next: called before each, `at` rising from 1 in every step.

        Costs a microsecond. It is how the watchdog knows which rank the others wait for; a graph that is replayed is
        one such point, and so is each collective of a rehearsal while loading.
        """
        ...

    def least(self, value: int) -> int:
        """The least of all ranks' values: a collective of its own, for sizes that must be the same everywhere."""
        ...


@runtime_checkable
class ShardedExecutor(Executor, Protocol):
    """An executor whose steps hold collectives: every rank runs every step, with its own batch or one of padding.

    The ranks of one data-parallel rank are given the same batch, so their pools must be of equal sizes. Logits of the
    first of them are sampled; what the others return is dropped.
    """

    def begin(self, tokens: Sequence[int], bucket: int, prefill: bool) -> None:
        """What the next `step` is, on all ranks: called with equal arguments on each of them, before each step.

        `tokens` of each rank, the same within a tp group, 0 where it has none of its own and runs `idle_batch`;
        `bucket`, the most of them, is what steps without `prefill` are padded to: in those every rank has one token of
        each of its requests, and wants the logits of all.
        """
        ...
