"""`Batch`: the metadata of one step, shared by the model (which reads it) and the runtime (which builds it)."""

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
        csa_ends: [N4] token index of every token that completes a window of ratio 4; padded with -1, never empty.
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
