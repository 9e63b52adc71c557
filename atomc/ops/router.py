"""Expert routing: sqrt-softplus scores, top-k with a selection bias or a hash table of token ids (spec 2.8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atomc.ops.registry import define


def _weigh(scores: torch.Tensor, indices: torch.Tensor, scale: float, eps: float) -> torch.Tensor:
    weights = scores.gather(-1, indices)
    return weights / (weights.sum(-1, keepdim=True) + eps) * scale


@define(
    "route_topk(Tensor logits, Tensor bias, int k, float scale, float eps) -> (Tensor, Tensor)",
    tokens="logits",
    spec="2.8, 6.1 K20",
)
def route_topk(
    logits: torch.Tensor, bias: torch.Tensor, k: int, scale: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k routing: `r = sqrt(softplus(logits))`, experts of the k largest `r + bias`, weights `r / sum r * scale`.

    Args:
        logits: [T, E] fp32. bias: [E] fp32, used for the selection only.
    Returns:
        weights [T, k] fp32 and expert indices [T, k] int64 (order within a token unspecified).
    """
    scores = F.softplus(logits).sqrt()
    indices = torch.topk(scores + bias, k, dim=-1, sorted=False).indices
    return _weigh(scores, indices, scale, eps), indices


@define(
    "route_hash(Tensor logits, Tensor ids, Tensor tid2eid, float scale, float eps) -> (Tensor, Tensor)",
    tokens="logits",
    spec="2.8, 6.1 K20",
)
def route_hash(
    logits: torch.Tensor, ids: torch.Tensor, tid2eid: torch.Tensor, scale: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hash routing: experts `tid2eid[ids]`, weights from the router scores as in `route_topk`.

    Args:
        logits: [T, E] fp32. ids: [T] int. tid2eid: [V, k] int.
    Returns:
        weights [T, k] fp32 and expert indices [T, k] int64.
    """
    scores = F.softplus(logits).sqrt()
    indices = tid2eid[ids].long()
    return _weigh(scores, indices, scale, eps), indices
