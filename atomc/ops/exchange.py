"""What surrounds a collective: rows of several tensors as one message, and rows sorted by the rank they go to.

Contract: these operators run on one rank. They make what a collective sends and read what it brought; the collectives
themselves are those of `torch.distributed`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F

from atomc.ops.registry import define

U8 = torch.uint8
# Between a rank's rows and what is sent: rows in order of their destination, how many there are for each, and the rows'
# columns, which came rank by rank.
BY_DESTINATION: Final = frozenset({"sort_by_rank", "host_sizes", "dispatch_rows", "combine_rows", "join_columns"})
# All operators of this file.
EXCHANGES: Final = BY_DESTINATION | {
    "pack_message", "unpack_message", "drop_padding", "local_experts", "vocabulary_embedding",
}  # fmt: skip


def _bytes(part: torch.Tensor) -> int:
    """Bytes of a row."""
    return math.prod(part.shape[1:]) * part.dtype.itemsize


@define(
    "pack_message(Tensor[] parts, SymInt? rows=None) -> Tensor",
    tokens="parts",
    spec="2.8",
    fake=lambda parts, rows=None: parts[0].new_empty(
        (parts[0].shape[0] if rows is None else rows, sum(map(_bytes, parts))), dtype=U8
    ),
)
def pack_message(parts: Sequence[torch.Tensor], rows: int | None = None) -> torch.Tensor:
    """The rows of several tensors side by side as bytes, so that one collective carries them all.

    Args:
        parts: [T, ...] each, of any dtype. rows: of the message, at least T; those after the T-th are zeros.
    Returns:
        [rows, bytes] uint8.
    Raises:
        ValueError: there are more than `rows` rows, or parts of different numbers of them.
    """
    count = parts[0].shape[0]
    if {p.shape[0] for p in parts} != {count} or (rows is not None and rows < count):
        raise ValueError(f"parts of {[p.shape[0] for p in parts]} rows do not fit into a message of {rows}")
    joined = torch.cat([p.contiguous().flatten().view(U8).view(count, _bytes(p)) for p in parts], dim=1)
    return joined if rows is None else F.pad(joined, (0, 0, 0, rows - count))


def _unpack_fake(message: torch.Tensor, widths: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
    return [message.new_empty((message.shape[0], w), dtype=t) for w, t in zip(widths, dtypes, strict=True)]


@define(
    "unpack_message(Tensor message, int[] widths, ScalarType[] dtypes) -> Tensor[]",
    tokens="message",
    spec="2.8",
    fake=_unpack_fake,
)
def unpack_message(message: torch.Tensor, widths: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
    """The parts [R, width] of a message [R, bytes] that `pack_message` made."""
    parts = message.split([w * t.itemsize for w, t in zip(widths, dtypes, strict=True)], dim=1)
    return [
        p.clone(memory_format=torch.contiguous_format).flatten().view(t).view(message.shape[0], w)
        for p, w, t in zip(parts, widths, dtypes, strict=True)
    ]


@define(
    "drop_padding(Tensor x, Tensor like) -> Tensor",
    tokens="like",
    spec="2.8",
    fake=lambda x, like: x.new_empty((like.shape[0], *x.shape[1:])),
)
def drop_padding(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The first rows of x [R, ...], as many as `like` [T, ...] has.

    Raises:
        ValueError: x has fewer.
    """
    if x.shape[0] < like.shape[0]:
        raise ValueError(f"{x.shape[0]} rows came back for {like.shape[0]} tokens")
    return x[: like.shape[0]].clone()


@define(
    "join_columns(Tensor x, int ranks) -> Tensor",
    tokens="x",
    spec="3.7",
    fake=lambda x, ranks: x.new_empty((x.shape[0] // ranks, ranks * x.shape[1])),
)
def join_columns(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """Columns [R, C] of each of `ranks` ranks, one rank after the other [ranks R, C], side by side: [R, ranks C]."""
    return torch.cat(x.chunk(ranks), dim=1) if len(x) else x.new_empty((0, ranks * x.shape[1]))


@define(
    "local_experts(Tensor indices, SymInt first, int experts) -> Tensor",
    tokens="indices",
    spec="2.8, 3.7",
    fake=lambda indices, *_: indices.new_empty(indices.shape, dtype=torch.int64),
)
def local_experts(indices: torch.Tensor, first: int, experts: int) -> torch.Tensor:
    """Numbers of experts [T, k] counted from the rank's own `first`; -1 where another rank has them, or nobody (-1)."""
    own = indices.long() - first
    return torch.where((own >= 0) & (own < experts), own, -1)


def _sort_fake(indices: torch.Tensor, _first: int, ranks: int, _experts: int, _span: int) -> tuple[torch.Tensor, ...]:
    most = indices.shape[0] * min(ranks, indices.shape[1])
    return indices.new_empty((ranks,), dtype=torch.int64), indices.new_empty((most,), dtype=torch.int64)


@define(
    "sort_by_rank(Tensor indices, SymInt first, int ranks, int experts, int span) -> (Tensor, Tensor)",
    tokens="indices",
    spec="2.8, 3.7",
    fake=_sort_fake,
)
def sort_by_rank(
    indices: torch.Tensor, first: int, ranks: int, experts: int, span: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens go to which of `ranks` ranks along an axis; a token goes once to each that has an expert of its.

    Args:
        indices: [T, k] experts of each token. first: this rank's first expert. experts: that a rank has.
        span: experts of all ranks with one place on the axis. Where it is more than `experts`, the ranks of another
            axis share them, and this rank sends for those experts that stand in the span where its own do.
    Returns:
        counts [ranks] int64 of rows for each; tokens [T min(ranks, k)] int64, in order of destination and then of
        token, -1 after the last.
    """
    count, k = indices.shape
    column = first % span // experts
    mine = indices.long() % span // experts == column
    to = torch.where(mine, indices.long() // span, ranks)
    wanted = torch.zeros((ranks + 1, count), dtype=torch.bool, device=indices.device)
    wanted[to, torch.arange(count, device=indices.device).unsqueeze(1).expand(-1, k)] = True
    wanted = wanted[:ranks]
    tokens = wanted.nonzero()[:, 1]
    return wanted.sum(dim=1), F.pad(tokens, (0, count * min(ranks, k) - tokens.shape[0]), value=-1)


def _sizes_fake(counts: torch.Tensor) -> list[torch.SymInt]:
    context = torch.library.get_ctx()
    return [context.new_dynamic_size() for _ in range(int(counts.shape[0]))]


@define("host_sizes(Tensor counts) -> SymInt[]", tokens="counts", spec="2.8", fake=_sizes_fake)
def host_sizes(counts: torch.Tensor) -> list[int]:
    """Counts [n] as numbers of the host; it waits for the device."""
    return [int(n) for n in counts.tolist()]


@define(
    "dispatch_rows(Tensor message, Tensor order, SymInt[] sizes) -> Tensor",
    tokens="message",
    spec="2.8, 3.7",
    fake=lambda message, order, sizes: message.new_empty((sum(sizes), *message.shape[1:])),
)
def dispatch_rows(message: torch.Tensor, order: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The rows of a message [T, bytes] in the order of `sort_by_rank`, `sizes` for each rank: [sum of sizes, bytes]."""
    return message[order[: sum(sizes)]]


@define(
    "combine_rows(Tensor rows, Tensor order, Tensor like, SymInt[] sizes) -> Tensor",
    tokens="like",
    spec="2.8, 3.7",
    fake=lambda rows, _order, like, _sizes: rows.new_empty((like.shape[0], *rows.shape[1:])),
)
def combine_rows(rows: torch.Tensor, order: torch.Tensor, like: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The sum [T, D] fp32, in order of rank, of what came back for each token.

    Args:
        rows: [R, D] fp32, `sizes` of them from each rank. order: of `sort_by_rank`. like: [T, ...].
    """
    out = rows.new_zeros((like.shape[0], *rows.shape[1:]))
    # A rank has a token once, so that each of these adds to a row once: the sums are the same however they are made.
    for part, tokens in zip(rows.split(list(sizes)), order[: rows.shape[0]].split(list(sizes)), strict=True):
        out.index_add_(0, tokens, part)
    return out


@define(
    "vocabulary_embedding(Tensor table, Tensor ids, SymInt first) -> Tensor",
    tokens="ids",
    spec="2.0, 3.7",
    fake=lambda table, ids, _: table.new_empty((*ids.shape, table.shape[1])),
)
def vocabulary_embedding(table: torch.Tensor, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Rows of a part [V/n, D] of a table, whose first row is row `first` of the whole; 0 for ids it has not."""
    own = ids.long() - first
    held = (own >= 0) & (own < table.shape[0])
    return torch.where(held.unsqueeze(-1), F.embedding(torch.where(held, own, 0), table), 0)
