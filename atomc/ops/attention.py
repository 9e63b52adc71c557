"""Core attention over window rows and compressed rows with a sink, one shared KV head (spec 2.4)."""

from __future__ import annotations

import torch

from atomc.ops.cache import gather_rows, page_rows, physical_rows
from atomc.ops.quantize import Pair, pair_like, quantize
from atomc.ops.registry import define
from atomc.ops.rope import rope

GATHER_ELEMENTS = 1 << 18  # elements of gathered rows the reference holds at once: they stay in a core's cache


def _window_rows(
    window: torch.Tensor, table: torch.Tensor, requests: torch.Tensor, positions: torch.Tensor, size: int, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gathered window rows [t, size, d] and which of them exist [t, size]."""
    rows = positions.long()[:, None] + torch.arange(1 - size, 1, device=positions.device)
    flat = physical_rows(table, requests.long()[:, None], rows, page_rows(window, layout))
    return gather_rows(window, flat, layout), rows >= 0


def _compressed_rows(
    cache: torch.Tensor,
    table: torch.Tensor,
    topk: torch.Tensor | None,
    requests: torch.Tensor,
    positions: torch.Tensor,
    ratio: int,
    layout: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gathered compressed rows [t, n, d] and which are selected and visible [t, n]."""
    visible = ((positions.long() + 1) // ratio)[:, None]
    if topk is None:
        most = int(visible.max()) if len(visible) else 0
        rows = torch.arange(most, device=positions.device).expand(positions.shape[0], -1)
    else:
        rows = topk.long()
    valid = (rows >= 0) & (rows < visible)
    flat = physical_rows(table, requests.long()[:, None], torch.where(valid, rows, -1), page_rows(cache, layout))
    return gather_rows(cache, flat, layout), valid


def _attend(q: torch.Tensor, rows: torch.Tensor, valid: torch.Tensor, sink: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax over rows and the sink, which has no value: q [t, H, d], rows [t, n, d] fp32, valid [t, n]."""
    hidden = valid.logical_not()
    rows = rows.masked_fill(hidden.unsqueeze(-1), 0.0)  # a free page may hold NaN, and 0 * NaN is NaN
    scores = torch.empty((*q.shape[:2], rows.shape[1] + 1), dtype=torch.float32, device=q.device)
    scores[..., :-1] = torch.bmm(q.float(), rows.transpose(1, 2)).mul_(scale)
    scores[..., :-1].masked_fill_(hidden.unsqueeze(1), float("-inf"))
    scores[..., -1] = sink
    return torch.bmm(torch.softmax(scores, dim=-1)[..., :-1], rows).to(q.dtype)


@define(
    "sparse_attention(Tensor q, Tensor window, Tensor window_table, Tensor? cache, Tensor block_table, Tensor? topk,"
    " Tensor sink, Tensor requests, Tensor positions, float scale, int window_size, int ratio,"
    ' str rows="") -> Tensor',
    tokens="q",
    spec="2.4, 6.1 K15-K16",
    fake=lambda q, *_, **__: q.new_empty(q.shape),
)
def sparse_attention(
    q: torch.Tensor,
    window: torch.Tensor,
    window_table: torch.Tensor,
    cache: torch.Tensor | None,
    block_table: torch.Tensor,
    topk: torch.Tensor | None,
    sink: torch.Tensor,
    requests: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window_size: int,
    ratio: int,
    rows: str = "",
) -> torch.Tensor:
    """One softmax per head over the last `window_size` rows, compressed rows, and the sink; K = V = row.

    Args:
        q: [T, H, d] after RoPE. window: [pages, page, d]. sink: [H] fp32 logits, not scaled.
        cache: [blocks, rows, d] compressed rows, or None (SWA layer).
        topk: [T, K] int32 selected rows (CSA), or None: every visible row, i < (t + 1) // ratio (HCA).
        rows: the row layout of both caches, then [pages, page bytes] uint8; empty where they are plain.
    Returns:
        [T, H, d] in q's dtype, before the inverse RoPE.
    """
    out = torch.empty_like(q)
    most = int(positions.max() + 1) // ratio if cache is not None and topk is None and len(positions) else 0
    width = window_size + (topk.shape[1] if topk is not None else most)
    chunk = max(1, GATHER_ELEMENTS // (width * q.shape[-1]))
    for at in range(0, q.shape[0], chunk):
        part = slice(at, at + chunk)
        kv, valid = _window_rows(window, window_table, requests[part], positions[part], window_size, rows)
        if cache is not None:
            chosen = topk[part] if topk is not None else None
            more, seen = _compressed_rows(cache, block_table, chosen, requests[part], positions[part], ratio, rows)
            kv, valid = torch.cat((kv, more), dim=1), torch.cat((valid, seen), dim=1)
        out[part] = _attend(q[part], kv, valid, sink, scale)
    return out


@define(
    "sparse_attention_inverse_rope(Tensor q, Tensor window, Tensor window_table, Tensor? cache, Tensor block_table,"
    " Tensor? topk, Tensor sink, Tensor requests, Tensor positions, float scale, int window_size, int ratio,"
    ' Tensor cos, Tensor sin, str rows="") -> Tensor',
    tokens="q",
    spec="2.4, 6.1 K15-K17",
    fake=lambda q, *_, **__: q.new_empty(q.shape),
)
def sparse_attention_inverse_rope(
    q: torch.Tensor,
    window: torch.Tensor,
    window_table: torch.Tensor,
    cache: torch.Tensor | None,
    block_table: torch.Tensor,
    topk: torch.Tensor | None,
    sink: torch.Tensor,
    requests: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window_size: int,
    ratio: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rows: str = "",
) -> torch.Tensor:
    """`sparse_attention`, then the inverse rotation at the query's position; cos, sin [T, rd/2] fp32."""
    o = sparse_attention(
        q, window, window_table, cache, block_table, topk, sink, requests, positions, scale, window_size, ratio, rows
    )
    return rope(o, cos.unsqueeze(-2), sin.unsqueeze(-2), True)


def _quant_fake(q: torch.Tensor, *args: object, **_: object) -> Pair:
    groups, layout = args[-2:]
    assert isinstance(groups, int) and isinstance(layout, str)
    return pair_like(q, (q.shape[0], groups, q.shape[1] * q.shape[2] // groups), layout)


@define(
    "sparse_attention_inverse_rope_quant(Tensor q, Tensor window, Tensor window_table, Tensor? cache,"
    " Tensor block_table, Tensor? topk, Tensor sink, Tensor requests, Tensor positions, float scale, int window_size,"
    " int ratio, Tensor cos, Tensor sin, str rows, int groups, str layout) -> (Tensor, Tensor)",
    tokens="q",
    spec="2.4, 3.4, 6.1 K15-K17",
    fake=_quant_fake,
)
def sparse_attention_inverse_rope_quant(
    q: torch.Tensor,
    window: torch.Tensor,
    window_table: torch.Tensor,
    cache: torch.Tensor | None,
    block_table: torch.Tensor,
    topk: torch.Tensor | None,
    sink: torch.Tensor,
    requests: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window_size: int,
    ratio: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rows: str,
    groups: int,
    layout: str,
) -> Pair:
    """`sparse_attention_inverse_rope`, its heads viewed in groups [T, groups, K] and quantised for wo_a."""
    o = sparse_attention_inverse_rope(
        q, window, window_table, cache, block_table, topk, sink, requests, positions, scale, window_size, ratio,
        cos, sin, rows,
    )  # fmt: skip
    return quantize(o.flatten(-2).unflatten(-1, (groups, -1)), layout)
