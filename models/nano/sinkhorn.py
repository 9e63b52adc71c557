"""Sinkhorn projection of the mHC residual mixing matrices; on a GPU one fused kernel each way, else plain torch."""

import torch
from torch import Tensor


def sinkhorn_reference(logits_N44: Tensor, iterations: int, eps: float) -> Tensor:
    """Row softmax, then column and row normalisation in turn; the first pair counts, the last step is a column step."""
    a = logits_N44.softmax(-1) + eps
    a = a / (a.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        a = a / (a.sum(-1, keepdim=True) + eps)
        a = a / (a.sum(-2, keepdim=True) + eps)
    return a


def sinkhorn(logits_N44: Tensor, iterations: int, eps: float) -> Tensor:
    """fp32 `[..., 4, 4]` -> doubly stochastic `[..., 4, 4]`. The caller on a GPU has imported `sinkhorn_cuda`."""
    if logits_N44.is_cuda:
        out: Tensor = torch.ops.atomc_nano.sinkhorn(logits_N44, iterations, eps)
        return out
    return sinkhorn_reference(logits_N44, iterations, eps)
