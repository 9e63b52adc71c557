"""Paged caches: where a row lives, and the insertion of new rows (spec 4.1, 4.2)."""

from __future__ import annotations

import torch

from atomc.formats import RowLayout
from atomc.formats.rows import Records
from atomc.ops.norm import rms_norm
from atomc.ops.quantize import pack_rows
from atomc.ops.registry import define, no_output
from atomc.ops.rope import rope


def physical_rows(table: torch.Tensor, requests: torch.Tensor, rows: torch.Tensor, page: int) -> torch.Tensor:
    """Flat row index in a cache [pages, page, d] of logical `rows`, through a table used as a ring of pages.

    Negative rows give row 0, which belongs to the reserved page 0.
    """
    column = torch.div(rows, page, rounding_mode="floor").remainder_(table.shape[1])
    flat = table[requests, column].long().mul_(page).add_(rows.remainder(page))
    return flat.masked_fill_(rows < 0, 0)


@define(
    "cache_insert(Tensor(a!) cache, Tensor x, Tensor table, Tensor requests, Tensor rows) -> ()",
    tokens="x",
    spec="4.1, 6.1 K9",
    fake=no_output,
)
def cache_insert(
    cache: torch.Tensor, x: torch.Tensor, table: torch.Tensor, requests: torch.Tensor, rows: torch.Tensor
) -> None:
    """Store x [N, d] at logical `rows` [N] of the requests [N]; a negative row is a padding entry.

    Args:
        cache: [pages, page, d]. table: [B, columns], used modulo its width. Padding lands in reserved page 0.
    """
    flat = physical_rows(table, requests, rows, cache.shape[1])
    cache.view(-1, cache.shape[-1]).index_copy_(0, flat, x.to(cache.dtype))


def insert(
    cache: torch.Tensor,
    x: torch.Tensor,
    table: torch.Tensor,
    requests: torch.Tensor,
    positions: torch.Tensor,
    rows: str,
) -> None:
    """`cache_insert`, or `pack_rows` and `packed_insert` where `rows` names a row layout."""
    if rows:
        packed_insert(cache, pack_rows(x, rows), table, requests, positions, rows)
    else:
        cache_insert(cache, x, table, requests, positions)


def page_rows(cache: torch.Tensor, rows: str) -> int:
    """Rows of a page: of a plain cache [pages, page, d], or of a packed one [pages, page bytes] in layout `rows`."""
    return RowLayout.parse(rows).rows_of(cache.shape[1]) if rows else cache.shape[1]


def gather_rows(cache: torch.Tensor, flat: torch.Tensor, rows: str) -> torch.Tensor:
    """float32 cache rows [..., d] at flat row numbers [...]; `rows` as in `page_rows`."""
    if rows:
        return RowLayout.parse(rows).load(cache, flat)
    return cache.view(-1, cache.shape[-1])[flat].float()


@define(
    "packed_insert(Tensor(a!) cache, Tensor packed, Tensor table, Tensor requests, Tensor positions, str rows) -> ()",
    tokens="packed",
    spec="4.2, 6.1 K9",
    fake=no_output,
)
def packed_insert(
    cache: torch.Tensor,
    packed: torch.Tensor,
    table: torch.Tensor,
    requests: torch.Tensor,
    positions: torch.Tensor,
    rows: str,
) -> None:
    """`cache_insert` of rows that `pack_rows` made, into pages [pages, page bytes] of row layout `rows`."""
    layout = RowLayout.parse(rows)
    flat = physical_rows(table, requests, positions, layout.rows_of(cache.shape[1]))
    layout.store(cache, flat, Records(packed[:, : layout.body_bytes], packed[:, layout.body_bytes :]))


@define(
    "qk_norm_rope_insert(Tensor q, Tensor kv, Tensor cos, Tensor sin, float eps, Tensor(a!) cache, Tensor table,"
    ' Tensor requests, Tensor positions, str rows="") -> Tensor',
    tokens="q",
    spec="2.3, 6.1 K9",
    fake=lambda q, *_, **__: q.new_empty(q.shape),
)
def qk_norm_rope_insert(
    q: torch.Tensor,
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    cache: torch.Tensor,
    table: torch.Tensor,
    requests: torch.Tensor,
    positions: torch.Tensor,
    rows: str = "",
) -> torch.Tensor:
    """Per-head q norm and RoPE of q [T, H, dh]; RoPE of kv [T, dh] (already normed) and its insertion as window rows.

    Args:
        cos, sin: [T, rd/2] fp32. rows: the row layout of a packed cache; empty where it is plain.
    """
    insert(cache, rope(kv, cos, sin, False), table, requests, positions, rows)
    return rope(rms_norm(q, None, eps), cos.unsqueeze(-2), sin.unsqueeze(-2), False)
