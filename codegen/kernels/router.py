"""The router: experts of a token by score and bias or by table, and their weights (spec 2.8, 6.1 K20)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device, cdiv, power_of_two


@triton.jit
def scores_of(logits):
    """sqrt(softplus(logits)), to a few units in the last place: max(x, 0) + log1p(exp(-|x|)) by a series."""
    small = tl.exp(-tl.abs(logits))
    # log1p(y) = 2 artanh(y / (2 + y)), and 0 < y <= 1: the argument is at most 1/3. A logarithm near 1 is not precise.
    z = tl.math.div_rn(small, 2.0 + small)
    s = z * z
    series = 1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15)))))))
    return tl.sqrt_rn(tl.maximum(logits, 0.0) + 2.0 * z * series)


@triton.jit
def store_choices(
    logits, chosen, weights, indices, row, T, E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    SCALE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Experts `chosen` [R, KP] of rows `row` [R, 1], and weights score / sum of scores x SCALE."""
    choice = tl.arange(0, KP)[None, :]
    keep = (row < T) & (choice < K)
    scores = tl.where(keep, scores_of(tl.load(logits + row * E + chosen, mask=keep, other=0.0)), 0.0)
    total = tl.sum(scores, 1)[:, None] + EPS
    tl.store(weights + row * K + choice, tl.math.div_rn(scores, total + tl.zeros_like(scores)) * SCALE, mask=keep)
    tl.store(indices + row * K + choice, chosen.to(tl.int64), mask=keep)


@triton.jit
def top_experts(
    logits, bias, weights, indices, T, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    SCALE: tl.constexpr, EPS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The K largest of score + bias of R rows of logits [T, E], largest first, of equal ones the lowest index first."""
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    expert = tl.arange(0, EP)[None, :]
    keep = (row < T) & (expert < E)
    score = scores_of(tl.load(logits + row * E + expert, mask=keep, other=0.0))
    score += tl.load(bias + expert, mask=expert < E, other=0.0)
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    least: tl.constexpr = -0x8000000000000000
    key = (ordered.to(tl.int64) << 32) | (EP - 1 - expert).to(tl.int64)
    key = tl.where(expert < E, key, least)
    chosen = tl.zeros((R, KP), tl.int32)
    for choice in tl.static_range(K):
        best = tl.max(key, 1)[:, None]
        key = tl.where(key == best, least, key)
        found = EP - 1 - (best & 0xFFFFFFFF).to(tl.int32)
        chosen = tl.where(tl.arange(0, KP)[None, :] == choice, found, chosen)
    store_choices(logits, chosen, weights, indices, row, T, E, K, KP, SCALE, EPS)


@triton.jit
def table_experts(
    logits, ids, table, weights, indices, T, E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SCALE: tl.constexpr,
    EPS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Experts table[ids] of R rows of logits [T, E]."""
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    choice = tl.arange(0, KP)[None, :]
    token = tl.load(ids + row, mask=row < T, other=0).to(tl.int64)
    chosen = tl.load(table + token * K + choice, mask=(row < T) & (choice < K), other=0).to(tl.int32)
    store_choices(logits, chosen, weights, indices, row, T, E, K, KP, SCALE, EPS)


def _results(device: Device, t: int, k: int) -> tuple[Tensor, Tensor]:
    return device.empty((t, k), torch.float32), device.empty((t, k), torch.int64)


def route_topk(device: Device, logits: Tensor, bias: Tensor, k: int, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """See `atomc.ops.router.route_topk`."""
    t, e = logits.shape
    weights, indices = _results(device, t, k)
    r = 1 if device.tokens <= 256 else 4
    args = {"logits": logits, "bias": bias, "weights": weights, "indices": indices, "T": t}
    constants = {
        "E": e, "EP": power_of_two(e), "K": k, "KP": power_of_two(k), "SCALE": scale, "EPS": eps, "R": r,
    }  # fmt: skip
    device.launch(top_experts, (cdiv(t, r),), args, constants, warps=1)
    return weights, indices


def route_hash(
    device: Device, logits: Tensor, ids: Tensor, tid2eid: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """See `atomc.ops.router.route_hash`."""
    t, e = logits.shape
    k = tid2eid.shape[1]
    weights, indices = _results(device, t, k)
    r = 4 if device.tokens <= 256 else 16
    args = {"logits": logits, "ids": ids, "table": tid2eid, "weights": weights, "indices": indices, "T": t}
    constants = {"E": e, "K": k, "KP": power_of_two(k), "SCALE": scale, "EPS": eps, "R": r}
    device.launch(table_experts, (cdiv(t, r),), args, constants, warps=1)
    return weights, indices
