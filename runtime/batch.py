"""Builds the `Batch` of one step from the scheduler's chunks: plain numpy, no loop over tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from atomc.ops.batch import Batch
from atomc.runtime.caches import Caches
from atomc.runtime.protocols import Serving
from atomc.runtime.scheduler import Chunk

Int32 = npt.NDArray[np.int32]
Shapes = tuple[tuple[int, ...], ...]


def _ends(positions: Int32, ratio: int) -> Int32:
    """[N] indices of the tokens that complete a window of `ratio`; [-1] when none does or the ratio is 0."""
    if ratio:
        ends = np.flatnonzero((positions + 1) % ratio == 0)
        if ends.size:
            return ends.astype(np.int32)
    return np.full(1, -1, dtype=np.int32)


def build_batch(chunks: Sequence[Chunk], caches: Caches, *, csa_ratio: int, hca_ratio: int) -> Batch:
    """The metadata of one step over `chunks` (at least one), int32 on the CPU; shapes as in `Batch`.

    Logits are asked for the last token of every chunk that completes its request, in order; when none does, for the
    step's last token, because a batch has at least one logit row.
    """
    lengths = np.fromiter((chunk.length for chunk in chunks), np.int32, len(chunks))
    starts = np.fromiter((chunk.request.computed for chunk in chunks), np.int32, len(chunks))
    slots = np.fromiter((chunk.request.slot for chunk in chunks), np.int32, len(chunks))
    query_start = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start[1:])
    requests = np.repeat(np.arange(len(chunks), dtype=np.int32), lengths)
    positions = np.arange(query_start[-1], dtype=np.int32) + np.repeat(starts - query_start[:-1], lengths)
    ids: list[int] = []
    for request, length in chunks:
        ids += request.tokens[request.computed : request.computed + length]
    rows = [query_start[i + 1] - 1 for i, chunk in enumerate(chunks) if chunk.completes] or [query_start[-1] - 1]
    return Batch(
        ids=torch.from_numpy(np.array(ids, dtype=np.int32)),
        positions=torch.from_numpy(positions),
        requests=torch.from_numpy(requests),
        query_start=torch.from_numpy(query_start),
        slots=torch.from_numpy(slots),
        window_table=torch.from_numpy(caches.window_table[slots]),
        block_table=torch.from_numpy(caches.block_table[slots]),
        csa_ends=torch.from_numpy(_ends(positions, csa_ratio)),
        hca_ends=torch.from_numpy(_ends(positions, hca_ratio)),
        logit_rows=torch.from_numpy(np.array(rows, dtype=np.int32)),
    )


def idle_batch(serving: Serving) -> Batch:
    """One token of padding, in the reserved page and block, and in a slot that a new request starts afresh.

    What a step needs that has nothing to compute: it touches nothing that a request will read. Only while no request
    holds slot 0.
    """

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    def table(width: int) -> torch.Tensor:
        return torch.zeros((1, width), dtype=torch.int32)

    return Batch(
        ids=ints(0), positions=ints(0), requests=ints(0), query_start=ints(0, 1), slots=ints(0),
        window_table=table(serving.window_table_width), block_table=table(serving.block_table_width),
        csa_ends=ints(-1), hca_ends=ints(-1), logit_rows=ints(0),
    )  # fmt: skip


def pack_batch(batch: Batch) -> torch.Tensor:
    """All fields of a batch in one tensor [N] int32, for another rank."""
    return torch.cat([field.reshape(-1) for field in batch])


def shapes_of(serving: Serving, tokens: int, requests: int, csa_ends: int, hca_ends: int, rows: int) -> Shapes:
    """The shape of every field of a batch of these sizes, in order."""
    return (
        (tokens,), (tokens,), (tokens,), (requests + 1,), (requests,), (requests, serving.window_table_width),
        (requests, serving.block_table_width), (csa_ends,), (hca_ends,), (rows,),
    )  # fmt: skip


def unpack_batch(packed: torch.Tensor, shapes: Shapes) -> Batch:
    """The batch that was packed; its fields are views."""
    parts = packed.split([math.prod(shape) for shape in shapes])
    return Batch(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))
