"""The lightning indexer's scoring and top-k over cached index rows (spec 2.7)."""

from __future__ import annotations

import itertools

import torch

from atomc.ops.cache import gather_rows, page_rows, physical_rows
from atomc.ops.quantize import dequantize, hadamard, quantize
from atomc.ops.registry import define
from atomc.ops.rope import rope

CHUNK = 256  # tokens scored at once by the reference, to bound the [tokens, heads, rows] scores in memory


def _topk_fake(q: torch.Tensor, *args: object, **_: object) -> torch.Tensor:
    topk = [a for a in args if isinstance(a, int)][-1]
    return q.new_empty((q.shape[0], topk), dtype=torch.int32)


def select(scores: torch.Tensor, visible: torch.Tensor, topk: int) -> torch.Tensor:
    """Row numbers of the `topk` best visible scores; scores [t, n], visible [t] counts -> [t, topk], -1 padded."""
    n = scores.shape[1]
    hidden = torch.arange(n, device=scores.device) >= visible[:, None]
    best = scores.masked_fill(hidden, float("-inf")).topk(min(topk, n), dim=-1).indices
    best = torch.where(best < visible[:, None], best, -1)
    return best if best.shape[1] == topk else torch.nn.functional.pad(best, (0, topk - best.shape[1]), value=-1)


@define(
    "index_topk(Tensor q, Tensor weights, Tensor cache, Tensor table, Tensor requests, Tensor positions,"
    ' Tensor query_start, int ratio, int topk, str rows="") -> Tensor',
    tokens="q",
    spec="2.7, 6.1 K13-K14",
    fake=_topk_fake,
)
def index_topk(
    q: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    requests: torch.Tensor,
    positions: torch.Tensor,
    query_start: torch.Tensor,
    ratio: int,
    topk: int,
    rows: str = "",
) -> torch.Tensor:
    """Compressed rows each query attends: the `topk` largest `sum_h w_h * relu(q_h . k_row)` of its visible rows.

    Args:
        q: [T, Hi, di] after RoPE. weights: [T, Hi] fp32, already scaled. cache: [blocks, rows, di] index rows.
        rows: the row layout of a packed cache [blocks, block bytes] uint8; empty where it is plain.
    Returns:
        [T, topk] int32 logical row numbers, order unspecified, -1 padded.
    """
    out = torch.full((q.shape[0], topk), -1, dtype=torch.int32, device=q.device)
    page = page_rows(cache, rows)
    bounds = query_start.tolist()
    visible = (positions.long() + 1) // ratio
    for request, (start, stop) in enumerate(itertools.pairwise(bounds)):
        n = int(visible[stop - 1]) if stop > start else 0
        if n == 0:
            continue
        numbers = torch.arange(n, device=q.device)
        keys = gather_rows(cache, physical_rows(table, torch.full_like(numbers, request), numbers, page), rows)
        for at in range(start, stop, CHUNK):
            part = slice(at, min(at + CHUNK, stop))
            dots = torch.relu(q[part].float() @ keys.T)  # [t, Hi, n]
            scores = torch.einsum("thn,th->tn", dots, weights[part].float())
            out[part] = select(scores, visible[part], topk).int()
    return out


@define(
    "index_rope_topk(Tensor q, Tensor cos, Tensor sin, Tensor weights, Tensor cache, Tensor table, Tensor requests,"
    ' Tensor positions, Tensor query_start, int ratio, int topk, str rows="", str layout="") -> Tensor',
    tokens="q",
    spec="2.7, 6.1 K12-K14",
    fake=_topk_fake,
)
def index_rope_topk(
    q: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    requests: torch.Tensor,
    positions: torch.Tensor,
    query_start: torch.Tensor,
    ratio: int,
    topk: int,
    rows: str = "",
    layout: str = "",
) -> torch.Tensor:
    """RoPE of the index queries [T, Hi, di] at cos, sin [T, rd/2], then `index_topk`.

    `layout`: the queries are rotated (Hadamard, as the rows in the cache are) and rounded to it; empty: neither.
    """
    q = rope(q, cos.unsqueeze(-2), sin.unsqueeze(-2), False)
    if layout:
        q = dequantize(*quantize(hadamard(q), layout), layout, q.dtype)
    return index_topk(q, weights, cache, table, requests, positions, query_start, ratio, topk, rows)
