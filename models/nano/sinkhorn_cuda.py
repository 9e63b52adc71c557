"""Sinkhorn in Triton, forward and backward, for training: forty dependent steps on 4x4 matrices stay in registers.

The backward kernel repeats the forward, keeps only the divisors (4 numbers a step, in a scratch buffer) and walks back:
for a' = a / s with s = sum(a) + eps, the gradient is (g - sum(g * a')) / s and a = a' * s.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 64


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(
    logits_ptr: tl.tensor,
    out_ptr: tl.tensor,
    count: tl.tensor,
    eps: tl.tensor,
    ITERATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, 4)
    offsets = n[:, None, None] * 16 + i[None, :, None] * 4 + i[None, None, :]
    mask = (n < count)[:, None, None]
    a = tl.load(logits_ptr + offsets, mask=mask, other=0.0)
    a = tl.exp(a - tl.max(a, 2)[:, :, None])
    a = a / tl.sum(a, 2)[:, :, None] + eps
    a = a / (tl.sum(a, 1)[:, None, :] + eps)
    for _ in range(ITERATIONS - 1):
        a = a / (tl.sum(a, 2)[:, :, None] + eps)
        a = a / (tl.sum(a, 1)[:, None, :] + eps)
    tl.store(out_ptr + offsets, a, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(
    logits_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    count: tl.tensor,
    eps: tl.tensor,
    ITERATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, 4)
    offsets = n[:, None, None] * 16 + i[None, :, None] * 4 + i[None, None, :]
    mask = (n < count)[:, None, None]
    row = scratch_ptr + n[:, None, None] * 4 + i[None, :, None]
    column = scratch_ptr + n[:, None, None] * 4 + i[None, None, :]
    step = count * 4

    p = tl.load(logits_ptr + offsets, mask=mask, other=0.0)
    p = tl.exp(p - tl.max(p, 2)[:, :, None])
    p = p / tl.sum(p, 2)[:, :, None]
    a = p + eps
    first = tl.sum(a, 1)[:, None, :] + eps
    tl.store(column, first, mask=mask)
    a = a / first
    for k in range(1, ITERATIONS):
        s = tl.sum(a, 2)[:, :, None] + eps
        tl.store(row + (2 * k - 1) * step, s, mask=mask)
        a = a / s
        t = tl.sum(a, 1)[:, None, :] + eps
        tl.store(column + 2 * k * step, t, mask=mask)
        a = a / t
    tl.debug_barrier()

    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    for back in range(1, ITERATIONS):
        k = ITERATIONS - back
        t = tl.load(column + 2 * k * step, mask=mask, other=1.0)
        g = (g - tl.sum(g * a, 1)[:, None, :]) / t
        a = a * t
        s = tl.load(row + (2 * k - 1) * step, mask=mask, other=1.0)
        g = (g - tl.sum(g * a, 2)[:, :, None]) / s
        a = a * s
    first = tl.load(column, mask=mask, other=1.0)
    g = (g - tl.sum(g * a, 1)[:, None, :]) / first
    g = p * (g - tl.sum(g * p, 2)[:, :, None])
    tl.store(out_ptr + offsets, g, mask=mask)


@torch.library.custom_op("atomc_nano::sinkhorn", mutates_args=())
def sinkhorn_op(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """`[..., 4, 4]` fp32; see `sinkhorn.sinkhorn_reference`."""
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    count = logits.numel() // 16
    _forward_kernel[(triton.cdiv(count, _BLOCK),)](logits, out, count, eps, ITERATIONS=iterations, BLOCK=_BLOCK)
    return out


@torch.library.custom_op("atomc_nano::sinkhorn_backward", mutates_args=())
def sinkhorn_backward_op(logits: Tensor, grad: Tensor, iterations: int, eps: float) -> Tensor:
    """Gradient of the logits."""
    logits, grad = logits.contiguous(), grad.contiguous()
    out = torch.empty_like(logits)
    count = logits.numel() // 16
    scratch = torch.empty(2 * iterations - 1, count, 4, device=logits.device)
    grid = (triton.cdiv(count, _BLOCK),)
    _backward_kernel[grid](logits, grad, out, scratch, count, eps, ITERATIONS=iterations, BLOCK=_BLOCK)
    return out


@sinkhorn_op.register_fake
def _(logits: Tensor, iterations: int, eps: float) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@sinkhorn_backward_op.register_fake
def _(logits: Tensor, grad: Tensor, iterations: int, eps: float) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, int, float], output: Tensor) -> None:
    logits, ctx.iterations, ctx.eps = inputs
    ctx.save_for_backward(logits)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (logits,) = ctx.saved_tensors
    return sinkhorn_backward_op(logits, grad, ctx.iterations, ctx.eps), None, None


sinkhorn_op.register_autograd(_backward, setup_context=_save)
