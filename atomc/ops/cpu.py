"""CPU kernels in plain torch: what the references compute, with a fraction of their operations.

A decode step works on so little data that its time is the number of torch operations. These agree with the references
to rounding (`tests/ops/test_cpu.py`); the references stay as they are written, because patterns are traced from them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from atomc.ops.attention import sparse_attention
from atomc.ops.cache import gather_rows, insert, page_rows, physical_rows
from atomc.ops.compressor import compressor_pool, store_compressed
from atomc.ops.compressor import compressor_update as reference_update
from atomc.ops.hyper_connection import Pre, Quantised
from atomc.ops.indexer import index_topk, select
from atomc.ops.quantize import Pair, dequantize, hadamard, quantize
from atomc.ops.registry import implement_cpu

GATHERED_KEYS = 1 << 20  # elements of index keys gathered for all tokens at once; longer contexts go by request


# -- norms and rotation ------------------------------------------------------------------------------------------------


@implement_cpu("rms_norm")
def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """See `atomc.ops.norm.rms_norm`."""
    x_f = x.float()
    y = x_f.square().mean(-1, keepdim=True).add_(eps).rsqrt_() * x_f
    return (y if weight is None else y.mul_(weight)).to(x.dtype)


@implement_cpu("rms_norm_pair")
def rms_norm_pair(
    q: torch.Tensor, q_weight: torch.Tensor, kv: torch.Tensor, kv_weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `atomc.ops.norm.rms_norm_pair`."""
    return rms_norm(q, q_weight, eps), rms_norm(kv, kv_weight, eps)


@implement_cpu("rms_norm_pair_quant")
def rms_norm_pair_quant(
    q: torch.Tensor, q_weight: torch.Tensor, kv: torch.Tensor, kv_weight: torch.Tensor, eps: float, layout: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `atomc.ops.norm.rms_norm_pair_quant`."""
    return *quantize(rms_norm(q, q_weight, eps), layout), rms_norm(kv, kv_weight, eps)


def turn_(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """RoPE in place: the trailing channel pairs of x times the complex `turns`, broadcastable to [..., rd/2]."""
    tail = x[..., -2 * turns.shape[-1] :]
    pairs = tail.float().unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs.contiguous()).mul(turns)
    tail.copy_(torch.view_as_real(turned).flatten(-2))
    return x


@implement_cpu("rope")
def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    """See `atomc.ops.rope.rope`."""
    return turn_(x.clone(memory_format=torch.contiguous_format), torch.complex(cos, -sin if inverse else sin))


# -- hyper-connections -------------------------------------------------------------------------------------------------


@lru_cache
def _summing(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices S with `flat @ S` = the row sums (column sums) of a flattened [n, n], each in every place of its row."""
    with torch.inference_mode(False):
        eye, ones = torch.eye(n), torch.ones(n, n)
        return torch.kron(eye, ones), torch.kron(ones, eye)


@lru_cache
def _groups(n: int) -> torch.Tensor:
    """Which of the three scales each of the 2n + n² mixing logits takes."""
    with torch.inference_mode(False):
        return torch.repeat_interleave(torch.arange(3), torch.tensor([n, n, n * n]))


def sinkhorn_(comb: torch.Tensor, hc_eps: float, iters: int) -> torch.Tensor:
    """`atomc.ops.hyper_connection.sinkhorn` in place on contiguous [T, n, n]: two operations each half iteration."""
    n = comb.shape[-1]
    rows, columns = _summing(n)
    flat = comb.view(-1, n * n)
    eps = flat.new_full((1,), hc_eps)
    sums = torch.addmm(eps, flat, columns)
    flat.div_(sums)
    for _ in range(iters - 1):
        flat.div_(torch.addmm(eps, flat, rows, out=sums))
        flat.div_(torch.addmm(eps, flat, columns, out=sums))
    return comb


def _coefficients(
    h: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, norm_eps: float, hc_eps: float,
    iters: int,
) -> Pre:  # fmt: skip
    """h [T, n, D] fp32 -> pre [T, n], post [T, n], comb [T, n, n]."""
    n, u = h.shape[1], h.flatten(1)
    rstd = u.square().mean(-1, keepdim=True).add_(norm_eps).rsqrt_()
    mix = torch.addcmul(base, F.linear(u, fn).mul_(rstd), scale[_groups(n)])
    gates = torch.sigmoid(mix[:, : 2 * n])
    comb = torch.softmax(mix[:, 2 * n :].unflatten(1, (n, n)), dim=-1).add_(hc_eps)
    return gates[:, :n] + hc_eps, 2 * gates[:, n:], sinkhorn_(comb, hc_eps, iters)


def _collapse(pre: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return torch.bmm(pre.unsqueeze(1), h).squeeze(1)


@implement_cpu("hc_pre")
def hc_pre(
    h: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, norm_eps: float, hc_eps: float,
    iters: int,
) -> Pre:  # fmt: skip
    """See `atomc.ops.hyper_connection.hc_pre`."""
    lead, flat = h.shape[:-2], h.reshape(-1, *h.shape[-2:]).float()
    pre, post, comb = _coefficients(flat, fn, base, scale, norm_eps, hc_eps, iters)
    x = _collapse(pre, flat).to(h.dtype)
    return tuple(part.view(*lead, *part.shape[1:]) for part in (x, post, comb))  # type: ignore[return-value]


@implement_cpu("hc_post")
def hc_post(h: torch.Tensor, y: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """See `atomc.ops.hyper_connection.hc_post`."""
    n = h.shape[-2]
    flat, mixing = h.reshape(-1, n, h.shape[-1]).float(), comb.reshape(-1, n, n).transpose(1, 2)
    out = torch.mul(post.reshape(-1, n, 1), y.reshape(-1, 1, y.shape[-1]))
    return torch.baddbmm(out, mixing, flat, out=out).view(h.shape).to(h.dtype)


@implement_cpu("hc_pre_norm")
def hc_pre_norm(
    h: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, norm_eps: float,
    hc_eps: float, iters: int,
) -> Pre:  # fmt: skip
    """See `atomc.ops.hyper_connection.hc_pre_norm`."""
    x, post, comb = hc_pre(h, fn, base, scale, norm_eps, hc_eps, iters)
    return rms_norm(x, weight, norm_eps), post, comb


@implement_cpu("hc_post_pre_norm")
def hc_post_pre_norm(
    h: torch.Tensor, y: torch.Tensor, post: torch.Tensor, comb: torch.Tensor, fn: torch.Tensor, base: torch.Tensor,
    scale: torch.Tensor, weight: torch.Tensor, norm_eps: float, hc_eps: float, iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """See `atomc.ops.hyper_connection.hc_post_pre_norm`."""
    h = hc_post(h, y, post, comb)
    return h, *hc_pre_norm(h, fn, base, scale, weight, norm_eps, hc_eps, iters)


@implement_cpu("hc_post_pre_norm_quant")
def hc_post_pre_norm_quant(
    h: torch.Tensor, y: torch.Tensor, post: torch.Tensor, comb: torch.Tensor, fn: torch.Tensor, base: torch.Tensor,
    scale: torch.Tensor, weight: torch.Tensor, norm_eps: float, hc_eps: float, iters: int, layout: str,
) -> Quantised:  # fmt: skip
    """See `atomc.ops.hyper_connection.hc_post_pre_norm_quant`."""
    results = hc_post_pre_norm(h, y, post, comb, fn, base, scale, weight, norm_eps, hc_eps, iters)
    return *results, *quantize(results[1], layout)


# -- caches ------------------------------------------------------------------------------------------------------------


@implement_cpu("qk_norm_rope_insert")
def qk_norm_rope_insert(
    q: torch.Tensor, kv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, cache: torch.Tensor,
    table: torch.Tensor, requests: torch.Tensor, positions: torch.Tensor, rows: str = "",
) -> torch.Tensor:  # fmt: skip
    """See `atomc.ops.cache.qk_norm_rope_insert`."""
    turns = torch.complex(cos, sin)
    insert(cache, turn_(kv.clone(memory_format=torch.contiguous_format), turns), table, requests, positions, rows)
    return turn_(rms_norm(q, None, eps), turns.unsqueeze(1))


@implement_cpu("compressor_pool_norm_rope_insert")
def compressor_pool_norm_rope_insert(
    kv: torch.Tensor, gate: torch.Tensor, ape: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, eps: float,
    cos: torch.Tensor, sin: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, ends: torch.Tensor,
    positions: torch.Tensor, requests: torch.Tensor, query_start: torch.Tensor, slots: torch.Tensor, ratio: int,
    overlap: bool, dtype: torch.dtype, rotate: bool = False, rows: str = "",
) -> None:  # fmt: skip
    """See `atomc.ops.compressor.compressor_pool_norm_rope_insert`; most decode steps complete no window."""
    done = ends >= 0
    if not bool(done.any()):
        return
    pooled = compressor_pool(kv, gate, ape, state, ends, positions, requests, query_start, slots, overlap)
    row = turn_(rms_norm(pooled.to(dtype), weight, eps), torch.complex(cos, sin))
    store_compressed(cache, hadamard(row) if rotate else row, table, ends, positions, requests, ratio, rows)


@implement_cpu("compressor_update")
def compressor_update(
    state: torch.Tensor, kv: torch.Tensor, gate: torch.Tensor, positions: torch.Tensor, requests: torch.Tensor,
    query_start: torch.Tensor, slots: torch.Tensor,
) -> None:  # fmt: skip
    """See `atomc.ops.compressor.compressor_update`; with no more tokens than the ring has places, all are kept."""
    ring = state.shape[1]
    if kv.shape[0] > ring:
        reference_update(state, kv, gate, positions, requests, query_start, slots)
        return
    place = slots[requests].mul(ring).add_(positions.remainder(ring))
    state.view(-1, *state.shape[2:]).index_copy_(0, place.long(), torch.stack((kv, gate), dim=1).to(state.dtype))


# -- attention ---------------------------------------------------------------------------------------------------------


@implement_cpu("index_rope_topk")
def index_rope_topk(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weights: torch.Tensor, cache: torch.Tensor,
    table: torch.Tensor, requests: torch.Tensor, positions: torch.Tensor, query_start: torch.Tensor, ratio: int,
    topk: int, rows: str = "", layout: str = "",
) -> torch.Tensor:  # fmt: skip
    """See `atomc.ops.indexer.index_rope_topk`; tokens of short contexts are scored together, whatever their request."""
    turned = turn_(q.clone(memory_format=torch.contiguous_format), torch.complex(cos, sin).unsqueeze(1))
    if layout:
        turned = dequantize(*quantize(hadamard(turned), layout), layout, q.dtype)
    visible = (positions + 1).div_(ratio, rounding_mode="floor")
    most = int(visible.max()) if len(visible) else 0
    if most * q.shape[0] * q.shape[-1] > GATHERED_KEYS:
        return index_topk(turned, weights, cache, table, requests, positions, query_start, ratio, topk, rows)
    if most == 0:
        return torch.full((q.shape[0], topk), -1, dtype=torch.int32)
    flat = physical_rows(table, requests.unsqueeze(1), torch.arange(most), page_rows(cache, rows))
    keys = gather_rows(cache, flat, rows)  # [T, most, di]; rows out of sight are masked
    scores = torch.bmm(weights.float().unsqueeze(1), torch.bmm(turned.float(), keys.transpose(1, 2)).relu_())
    return select(scores.squeeze(1), visible, topk).int()


@implement_cpu("sparse_attention_inverse_rope")
def sparse_attention_inverse_rope(
    q: torch.Tensor, window: torch.Tensor, window_table: torch.Tensor, cache: torch.Tensor | None,
    block_table: torch.Tensor, topk: torch.Tensor | None, sink: torch.Tensor, requests: torch.Tensor,
    positions: torch.Tensor, scale: float, window_size: int, ratio: int, cos: torch.Tensor, sin: torch.Tensor,
    rows: str = "",
) -> torch.Tensor:  # fmt: skip
    """See `atomc.ops.attention.sparse_attention_inverse_rope`."""
    out = sparse_attention(
        q, window, window_table, cache, block_table, topk, sink, requests, positions, scale, window_size, ratio, rows
    )
    return turn_(out, torch.complex(cos, -sin).unsqueeze(1))


@implement_cpu("sparse_attention_inverse_rope_quant")
def sparse_attention_inverse_rope_quant(
    q: torch.Tensor, window: torch.Tensor, window_table: torch.Tensor, cache: torch.Tensor | None,
    block_table: torch.Tensor, topk: torch.Tensor | None, sink: torch.Tensor, requests: torch.Tensor,
    positions: torch.Tensor, scale: float, window_size: int, ratio: int, cos: torch.Tensor, sin: torch.Tensor,
    rows: str, groups: int, layout: str,
) -> Pair:  # fmt: skip
    """See `atomc.ops.attention.sparse_attention_inverse_rope_quant`."""
    out = sparse_attention_inverse_rope(
        q, window, window_table, cache, block_table, topk, sink, requests, positions, scale, window_size, ratio,
        cos, sin, rows,
    )  # fmt: skip
    return quantize(out.flatten(-2).unflatten(-1, (groups, -1)), layout)


# -- experts -----------------------------------------------------------------------------------------------------------


@implement_cpu("moe_experts")
def moe_experts(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, limit: float
) -> torch.Tensor:
    """See `atomc.ops.experts.moe_experts`."""
    return _experts(x, w13, w2, indices, weights, limit, "")


@implement_cpu("moe_experts_quant")
def moe_experts_quant(
    codes: torch.Tensor, scales: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, indices: torch.Tensor,
    weights: torch.Tensor, limit: float, layout: str, inner_layout: str, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """See `atomc.ops.experts.moe_experts_quant`."""
    return _experts(dequantize(codes, scales, layout, dtype), w13, w2, indices, weights, limit, inner_layout)


def _experts(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, limit: float,
    inner_layout: str,
) -> torch.Tensor:  # fmt: skip
    """(token, choice) pairs sorted by expert, one product a used expert; what enters w2 in `inner_layout`, if any."""
    count, k = indices.shape
    width = w13.shape[1] // 2
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    others, *counts = (flat + 1).bincount(minlength=1).tolist()  # -1: experts of other ranks
    groups = [(expert, n) for expert, n in enumerate(counts) if n]
    order = order[others:]
    rows = x[order.div(k, rounding_mode="floor")]
    hidden = x.new_empty((rows.shape[0], 2 * width))
    _grouped_mm(rows, w13, groups, hidden)
    gate, up = hidden[:, :width].float(), hidden[:, width:].float()
    a = F.silu(gate.clamp(max=limit)).mul_(up.clamp(-limit, limit)).mul_(weights.flatten()[order].unsqueeze(1))
    a = a.to(x.dtype)
    if inner_layout:
        a = dequantize(*quantize(a, inner_layout), inner_layout, x.dtype)
    out = x.new_empty((rows.shape[0], x.shape[1]))
    _grouped_mm(a, w2, groups, out)
    # Back in the order of choices, so that the sum is the reference's.
    chosen = x.new_zeros((count * k, x.shape[1])).index_copy_(0, order, out)
    return chosen.view(count, k, x.shape[1]).float().sum(dim=1)


def _grouped_mm(rows: torch.Tensor, weight: torch.Tensor, groups: list[tuple[int, int]], out: torch.Tensor) -> None:
    """`out` [R, N] = rows [R, K] of each expert, in order of expert, times its matrix."""
    at = 0
    for expert, count in groups:
        torch.mm(rows[at : at + count], weight[expert].t(), out=out[at : at + count])
        at += count
