"""`Batch`: the metadata of one step, shared by the model (which reads it) and the runtime (which builds it).

A step may run as two micro-batches (`split_batch`), one computing while the other communicates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """One step over T tokens of B requests; int32 tensors.

    Tokens of one request are consecutive and in order of position. Prefill, chunked prefill, decode and mixed batches
    differ in nothing but these numbers.

    Attributes:
        ids: [T] token ids.
        positions: [T] absolute positions, 0-based.
        requests: [T] row of each token's request in the per-request tensors, in [0, B).
        query_start: [B + 1] index of each request's first token; the last entry is T.
        slots: [B] row of each request in the fixed-size state (compressor rings).
        window_table: [B, NW] physical page of logical page p at column p % NW (window rows, spec 4.1).
        block_table: [B, MB] physical block of each logical block of `block_tokens` tokens (compressed rows).
        csa_ends: [N4] token index of every token that completes a window of ratio 4; padded with -1, empty only where
            T is 0.
        hca_ends: [NH] the same for the HCA ratio.
        logit_rows: [L] token indices whose logits are wanted.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    requests: torch.Tensor
    query_start: torch.Tensor
    slots: torch.Tensor
    window_table: torch.Tensor
    block_table: torch.Tensor
    csa_ends: torch.Tensor
    hca_ends: torch.Tensor
    logit_rows: torch.Tensor


class BatchHalves(NamedTuple):
    """A step as two micro-batches, the second to run after the first.

    Attributes:
        logit_rows: [L] int64, for each wanted row its place in the first half's logits followed by the second's.
    """

    first: Batch
    second: Batch
    logit_rows: torch.Tensor


def middle(query_start: torch.Tensor, *, by_requests: bool) -> int:
    """The token at which a rank's step is cut in two; all of it is the first half where it has one token, or request.

    Args:
        query_start: [B + 1], as in `Batch`.
        by_requests: cut between requests (decode), those without tokens not counted; else at the exact middle of the
            tokens (prefill, mixed).
    """
    if not by_requests:
        return (int(query_start[-1]) + 1) // 2
    ends = query_start[1:][query_start[1:] > query_start[:-1]]
    return int(ends[(ends.shape[0] + 1) // 2 - 1]) if ends.shape[0] else 0


def split_batch(batch: Batch, cut: int) -> BatchHalves:
    """The first `cut` tokens of a step and the rest, each as a step of its own; tensors are new or views.

    A request that straddles the cut is in both: the second half finds in the caches what the first put there, as the
    next chunk of a chunked prefill does. A half that has tokens and no wanted logits asks for those of its last token.
    A half may have no tokens.

    Raises:
        ValueError: the step has no token `cut`.
    """
    tokens = batch.ids.shape[0]
    if not 0 <= cut <= tokens:
        raise ValueError(f"a step of {tokens} tokens cannot be cut at token {cut}.")
    starts, ends = batch.query_start[:-1], batch.query_start[1:]
    in_first, in_second = int((starts < cut).sum()), int((ends <= cut).sum())
    wanted = batch.logit_rows < cut
    rows: list[torch.Tensor] = []
    row = torch.zeros(wanted.shape[0], dtype=torch.int64, device=wanted.device)
    for half, mine in enumerate((wanted, ~wanted)):
        chosen = batch.logit_rows[mine] - half * cut
        row[mine] = torch.arange(chosen.shape[0], device=row.device) + (rows[0].shape[0] if half else 0)
        count = tokens - cut if half else cut
        last = batch.logit_rows.new_tensor([count - 1] if count else [])
        rows.append(chosen if chosen.shape[0] else last)
    first = _part(batch, slice(0, cut), slice(0, in_first), rows[0])
    second = _part(batch, slice(cut, tokens), slice(in_second, starts.shape[0]), rows[1])
    return BatchHalves(first, second, row)


def _part(batch: Batch, tokens: slice, requests: slice, logit_rows: torch.Tensor) -> Batch:
    def ends(of: torch.Tensor) -> torch.Tensor:
        mine = of[(of >= tokens.start) & (of < tokens.stop)] - tokens.start
        return mine if mine.shape[0] or tokens.start == tokens.stop else of.new_full((1,), -1)

    query_start = batch.query_start[requests.start : requests.stop + 1] - tokens.start
    return Batch(
        ids=batch.ids[tokens],
        positions=batch.positions[tokens],
        requests=batch.requests[tokens] - requests.start,
        query_start=query_start.clamp(0, tokens.stop - tokens.start),
        slots=batch.slots[requests],
        window_table=batch.window_table[requests],
        block_table=batch.block_table[requests],
        csa_ends=ends(batch.csa_ends),
        hca_ends=ends(batch.hca_ends),
        logit_rows=logit_rows,
    )
