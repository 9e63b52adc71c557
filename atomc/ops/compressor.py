"""The compressors of CSA and HCA: partial state, window pooling, fused pool + norm + RoPE + store (spec 2.5, 2.6)."""

from __future__ import annotations

import torch

from atomc.ops.cache import cache_insert, packed_insert
from atomc.ops.norm import rms_norm
from atomc.ops.quantize import hadamard, pack_rows
from atomc.ops.registry import define, no_output
from atomc.ops.rope import rope


def _pool_fake(
    kv: torch.Tensor,
    gate: torch.Tensor,
    ape: torch.Tensor,
    state: torch.Tensor,
    ends: torch.Tensor,
    positions: torch.Tensor,
    requests: torch.Tensor,
    query_start: torch.Tensor,
    slots: torch.Tensor,
    overlap: bool,
) -> torch.Tensor:
    return kv.new_empty((ends.shape[0], kv.shape[1] // (2 if overlap else 1)))


@define(
    "compressor_pool(Tensor kv, Tensor gate, Tensor ape, Tensor state, Tensor ends, Tensor positions,"
    " Tensor requests, Tensor query_start, Tensor slots, bool overlap) -> Tensor",
    tokens="ends",
    spec="2.5, 2.6, 6.1 K11",
    fake=_pool_fake,
)
def compressor_pool(
    kv: torch.Tensor,
    gate: torch.Tensor,
    ape: torch.Tensor,
    state: torch.Tensor,
    ends: torch.Tensor,
    positions: torch.Tensor,
    requests: torch.Tensor,
    query_start: torch.Tensor,
    slots: torch.Tensor,
    overlap: bool,
) -> torch.Tensor:
    """Pool every window completed in this step: per-channel softmax of gate + ape over the window's tokens.

    Tokens of the window that are in this step come from kv and gate, older ones from the ring `state`. With overlap
    (CSA) a row pools 2m slots: the first half of the columns of the previous window's m tokens, then the second half
    of the own window's; slots before the sequence's start are absent.

    Args:
        kv, gate: [T, w] fp32 projections of this step's tokens; w = d, or 2d with overlap.
        ape: [m, w] fp32. state: [slots, R, 2, w] fp32, R = m or 2m: token t at t % R, (kv, gate).
        ends: [N] index of each completing token, -1 for padding (its row is unspecified).
    Returns:
        [N, d] fp32 pooled rows, before norm and RoPE.
    """
    m, ring, width = ape.shape[0], state.shape[1], kv.shape[1]
    end = ends.clamp(min=0).long()
    request = requests[end].long()
    steps = torch.arange(1 - ring, 1, device=kv.device)
    token = end[:, None] + steps
    position = positions[end].long()[:, None] + steps
    old = state[slots[request].long()[:, None], position % ring]
    fresh = (token >= query_start[request][:, None])[..., None]
    token = token.clamp(min=0)
    kv_w = torch.where(fresh, kv[token], old[:, :, 0])
    logits = torch.where(fresh, gate[token], old[:, :, 1]) + ape[position % m]
    logits = logits.masked_fill((position < 0)[..., None], float("-inf"))
    if overlap:
        d = width // 2
        kv_w = torch.cat((kv_w[:, :m, :d], kv_w[:, m:, d:]), dim=1)
        logits = torch.cat((logits[:, :m, :d], logits[:, m:, d:]), dim=1)
    # An absent slot may hold anything, even NaN left by another request: select before multiplying.
    kv_w = kv_w.masked_fill((position < 0)[..., None], 0.0)
    return (torch.softmax(logits, dim=1) * kv_w).sum(dim=1)


@define(
    "compressor_update(Tensor(a!) state, Tensor kv, Tensor gate, Tensor positions, Tensor requests,"
    " Tensor query_start, Tensor slots) -> ()",
    tokens="kv",
    spec="4.1, 6.1 K10",
    fake=no_output,
)
def compressor_update(
    state: torch.Tensor,
    kv: torch.Tensor,
    gate: torch.Tensor,
    positions: torch.Tensor,
    requests: torch.Tensor,
    query_start: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Keep (kv, gate) of each request's last R tokens in its ring: state [slots, R, 2, w], token t at t % R.

    Runs after `compressor_pool` of the same step, which still reads the older entries.
    """
    ring = state.shape[1]
    token = torch.arange(kv.shape[0], device=kv.device)
    keep = token >= query_start[requests.long() + 1] - ring  # of tokens that share a ring place, only the last
    row = slots[requests[keep].long()].long()
    state[row, positions[keep].long() % ring] = torch.stack((kv[keep], gate[keep]), dim=1).to(state.dtype)


def _rows_of(ends: torch.Tensor, positions: torch.Tensor, ratio: int) -> torch.Tensor:
    return torch.where(ends < 0, -1, positions[ends.clamp(min=0)] // ratio)


@define(
    "compressed_insert(Tensor(a!) cache, Tensor x, Tensor table, Tensor ends, Tensor positions, Tensor requests,"
    " int ratio) -> ()",
    tokens="x",
    spec="4.1, 6.1 K11",
    fake=no_output,
)
def compressed_insert(
    cache: torch.Tensor,
    x: torch.Tensor,
    table: torch.Tensor,
    ends: torch.Tensor,
    positions: torch.Tensor,
    requests: torch.Tensor,
    ratio: int,
) -> None:
    """Store compressed rows x [N, d] of the windows that end at tokens `ends` [N] (-1: padding)."""
    request = requests[ends.clamp(min=0)]
    cache_insert(cache, x, table, request, _rows_of(ends, positions, ratio))


@define(
    "compressed_packed_insert(Tensor(a!) cache, Tensor packed, Tensor table, Tensor ends, Tensor positions,"
    " Tensor requests, int ratio, str rows) -> ()",
    tokens="packed",
    spec="4.2, 6.1 K11",
    fake=no_output,
)
def compressed_packed_insert(
    cache: torch.Tensor,
    packed: torch.Tensor,
    table: torch.Tensor,
    ends: torch.Tensor,
    positions: torch.Tensor,
    requests: torch.Tensor,
    ratio: int,
    rows: str,
) -> None:
    """`compressed_insert` of rows that `pack_rows` made, into pages [pages, page bytes] of row layout `rows`."""
    request = requests[ends.clamp(min=0)]
    packed_insert(cache, packed, table, request, _rows_of(ends, positions, ratio), rows)


@define(
    "compressor_pool_norm_rope_insert(Tensor kv, Tensor gate, Tensor ape, Tensor state, Tensor weight, float eps,"
    " Tensor cos, Tensor sin, Tensor(a!) cache, Tensor table, Tensor ends, Tensor positions, Tensor requests,"
    " Tensor query_start, Tensor slots, int ratio, bool overlap, ScalarType dtype, bool rotate=False,"
    ' str rows="") -> ()',
    tokens="ends",
    spec="2.5, 2.6, 6.1 K11",
    fake=no_output,
)
def compressor_pool_norm_rope_insert(
    kv: torch.Tensor,
    gate: torch.Tensor,
    ape: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    ends: torch.Tensor,
    positions: torch.Tensor,
    requests: torch.Tensor,
    query_start: torch.Tensor,
    slots: torch.Tensor,
    ratio: int,
    overlap: bool,
    dtype: torch.dtype,
    rotate: bool = False,
    rows: str = "",
) -> None:
    """Pool the completed windows, RMSNorm with `weight` [d], RoPE at the window's first position, store.

    Args:
        cos, sin: [N, rd/2] fp32, of the positions of the windows' first tokens.
        dtype: of the pooled row before its norm, the compute dtype.
        rotate: apply the Hadamard rotation before storing (index rows that are quantised, spec 2.7).
        rows: the row layout of a packed cache; empty where it is plain.
    """
    pooled = compressor_pool(kv, gate, ape, state, ends, positions, requests, query_start, slots, overlap)
    row = rope(rms_norm(pooled.to(dtype), weight, eps), cos, sin, False)
    store_compressed(cache, hadamard(row) if rotate else row, table, ends, positions, requests, ratio, rows)


def store_compressed(
    cache: torch.Tensor,
    row: torch.Tensor,
    table: torch.Tensor,
    ends: torch.Tensor,
    positions: torch.Tensor,
    requests: torch.Tensor,
    ratio: int,
    rows: str,
) -> None:
    """`compressed_insert`, or `pack_rows` and `compressed_packed_insert` where `rows` names a row layout."""
    if rows:
        compressed_packed_insert(cache, pack_rows(row, rows), table, ends, positions, requests, ratio, rows)
    else:
        compressed_insert(cache, row, table, ends, positions, requests, ratio)
