"""Attention of the three layer kinds (SWA, CSA with its indexer, HCA), dense over blocks and compressed rows.

Shape suffixes: B batch, T tokens, D hidden, H heads, d head dim, r q-LoRA rank, R compressed rows.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from atomc.models.nano.config import LayerKind, NanoConfig
from atomc.models.nano.layers import Rope, Weights, apply_rope, rms_norm


def compress(x_BTD: Tensor, w: Weights, name: str, ratio: int, rope: Rope, c: NanoConfig) -> Tensor:
    """Rows of complete windows, `[B, R, d]`. CSA weights are twice as wide: [half for the next window | own half]."""
    values = (x_BTD @ w[f"{name}.wkv"].T).unflatten(1, (-1, ratio))
    logits = (x_BTD @ w[f"{name}.wgate"].T).float().unflatten(1, (-1, ratio)) + w[f"{name}.ape"]
    d = w[f"{name}.norm"].shape[0]
    if values.shape[-1] == 2 * d:
        shifted_values = F.pad(values[:, :-1, :, :d], (0, 0, 0, 0, 1, 0))
        shifted_logits = F.pad(logits[:, :-1, :, :d], (0, 0, 0, 0, 1, 0), value=-math.inf)
        values = torch.cat([shifted_values, values[..., d:]], 2)
        logits = torch.cat([shifted_logits, logits[..., d:]], 2)
    pooled = (logits.softmax(2) * values.float()).sum(2).to(x_BTD.dtype)
    return apply_rope(rms_norm(pooled, w[f"{name}.norm"], c.rms_norm_eps), Rope(rope.cos[::ratio], rope.sin[::ratio]))


def index_scores(x_BTD: Tensor, qn_BTr: Tensor, w: Weights, rope: Rope, ratio: int, c: NanoConfig) -> Tensor:
    """fp32 `[B, T, R]`. Its inputs are detached: only the index loss trains the indexer, and it trains nothing else."""
    x_BTD, heads = x_BTD.detach(), c.index_n_heads
    q_BTHd = apply_rope((qn_BTr.detach() @ w["attn.indexer.wq_b"].T).unflatten(-1, (heads, -1)), rope, heads=True)
    k_BRd = compress(x_BTD, w, "attn.indexer.compressor", ratio, rope, c)
    head_weight_BTH = (x_BTD @ w["attn.indexer.weights_proj"].T).float() * (c.index_head_dim * heads) ** -0.5
    dots_BTHR = (q_BTHd.flatten(1, 2) @ k_BRd.transpose(1, 2)).unflatten(1, (-1, heads))
    score_BTR: Tensor = (dots_BTHR.float().relu() * head_weight_BTH[..., None]).sum(2)
    return score_BTR


def select(score_BTR: Tensor, visible_TR: Tensor, top_k: int) -> Tensor:
    """Boolean `[B, T, R]`: the visible rows among the top-k scores."""
    score_BTR = score_BTR.detach().masked_fill(~visible_TR, -math.inf)
    top = score_BTR.topk(min(top_k, score_BTR.shape[-1]), dim=-1, sorted=False).indices
    return torch.zeros_like(score_BTR, dtype=torch.bool).scatter(-1, top, True) & visible_TR


def attend(
    q_BTHd: Tensor, kv_BTd: Tensor, rows_BRd: Tensor | None, allowed_BTR: Tensor | None, sink_H: Tensor, window: int
) -> tuple[Tensor, Tensor | None]:
    """One softmax over window rows, allowed compressed rows and the sink; also the head-summed mass on the second."""
    B, T, H, d = q_BTHd.shape
    blocks, scale = T // window, d**-0.5
    own = kv_BTd.reshape(B, blocks, window, d)
    keys = torch.cat([F.pad(own[:, :-1], (0, 0, 0, 0, 1, 0)), own], 2).flatten(0, 1)
    near = (q_BTHd.reshape(B * blocks, window * H, d) @ keys.transpose(1, 2)).view(B, blocks, window, H, 2 * window)
    query = torch.arange(window, device=q_BTHd.device)[:, None]
    key = torch.arange(2 * window, device=q_BTHd.device)
    block = torch.arange(blocks, device=q_BTHd.device)[:, None, None]
    near_mask = (key > query) & (key <= query + window) & ((key >= window) | (block > 0))
    near_logits = (near.float() * scale).masked_fill(~near_mask[:, :, None], -math.inf).view(B, T, H, 2 * window)
    top = torch.maximum(near_logits.amax(-1, keepdim=True), sink_H[:, None])
    if rows_BRd is None or allowed_BTR is None:
        top = top.detach()
        e_near = (near_logits - top).exp()
        p_near = e_near / (e_near.sum(-1, keepdim=True) + (sink_H[:, None] - top).exp())
        o = p_near.to(keys.dtype).view(B * blocks, window * H, -1) @ keys
        return o.view(B, T, H, d), None
    far = (q_BTHd.flatten(1, 2) @ rows_BRd.transpose(1, 2)).view(B, T, H, -1)
    far_logits = (far.float() * scale).masked_fill(~allowed_BTR[:, :, None], -math.inf)
    top = torch.maximum(top, far_logits.amax(-1, keepdim=True)).detach()
    e_near, e_far = (near_logits - top).exp(), (far_logits - top).exp()
    total = e_near.sum(-1, keepdim=True) + e_far.sum(-1, keepdim=True) + (sink_H[:, None] - top).exp()
    p_near, p_far = e_near / total, e_far / total
    o_near = p_near.to(keys.dtype).view(B * blocks, window * H, -1) @ keys
    o_far = p_far.to(keys.dtype).flatten(1, 2) @ rows_BRd
    return o_near.view(B, T, H, d) + o_far.view(B, T, H, d), p_far.detach().sum(2)


def index_loss(score_BTR: Tensor, mass_BTR: Tensor, allowed_BTR: Tensor) -> Tensor:
    """KL(attention mass on compressed rows || softmax of index scores) over the allowed rows, `[B, T]`."""
    seen_BT = allowed_BTR.any(-1)
    target = mass_BTR / mass_BTR.sum(-1, keepdim=True).clamp_min(1e-20)
    log_q = score_BTR.masked_fill(~allowed_BTR, -1e30).log_softmax(-1)
    kl = (torch.special.xlogy(target, target) - target * log_q).sum(-1)
    return torch.where(seen_BT, kl, 0.0)


def index_recall(chosen_BTR: Tensor, mass_BTR: Tensor) -> Tensor:
    """Share of the attention mass on compressed rows in the chosen ones, `[B, T]`; below 1 under dense rows only."""
    return (mass_BTR * chosen_BTR).sum(-1) / mass_BTR.sum(-1).clamp_min(1e-20)


def attention(
    x_BTD: Tensor, w: Weights, kind: LayerKind, ratio: int, rope: Rope, dense_rows: Tensor, c: NanoConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, T, D]`, index KL and recall `[B, T]`. `dense_rows` (bool scalar): CSA attends all visible rows."""
    eps, T = c.rms_norm_eps, x_BTD.shape[1]
    qn_BTr = rms_norm(x_BTD @ w["attn.wq_a"].T, w["attn.q_norm"], eps)
    q_BTHd = (qn_BTr @ w["attn.wq_b"].T).unflatten(-1, (c.num_attention_heads, -1))
    q_BTHd = apply_rope(rms_norm(q_BTHd, None, eps), rope, heads=True)
    kv_BTd = apply_rope(rms_norm(x_BTD @ w["attn.wkv"].T, w["attn.kv_norm"], eps), rope)
    sink_H, zero_BT = w["attn.attn_sink"], x_BTD.new_zeros(x_BTD.shape[:2], dtype=torch.float32)
    kl_BT, recall_BT = zero_BT, zero_BT + 1
    if kind == "swa":
        o_BTHd, _ = attend(q_BTHd, kv_BTd, None, None, sink_H, c.sliding_window)
    else:
        rows_BRd = compress(x_BTD, w, "attn.compressor", ratio, rope, c)
        position, row = torch.arange(T, device=x_BTD.device), torch.arange(rows_BRd.shape[1], device=x_BTD.device)
        visible_TR = row < ((position + 1) // ratio)[:, None]
        allowed_BTR = visible_TR[None]
        if kind == "csa":
            score_BTR = index_scores(x_BTD, qn_BTr, w, rope, ratio, c)
            chosen_BTR = select(score_BTR, visible_TR, c.index_topk)
            allowed_BTR = chosen_BTR | (visible_TR & dense_rows)
        o_BTHd, mass_BTR = attend(q_BTHd, kv_BTd, rows_BRd, allowed_BTR, sink_H, c.sliding_window)
        if kind == "csa":
            assert mass_BTR is not None
            kl_BT = index_loss(score_BTR, mass_BTR, allowed_BTR)
            recall_BT = index_recall(chosen_BTR, mass_BTR)
    o_BTgi = apply_rope(o_BTHd, rope, heads=True, inverse=True).flatten(2).unflatten(-1, (c.o_groups, -1))
    wo_a = w["attn.wo_a"].unflatten(0, (c.o_groups, -1))
    z_BTi = torch.cat([group @ matrix.T for group, matrix in zip(o_BTgi.unbind(2), wo_a.unbind(0), strict=True)], -1)
    return z_BTi @ w["attn.wo_b"].T, kl_BT, recall_BT
