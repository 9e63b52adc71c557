"""Routed experts in full precision, bf16 or fp32 (spec 2.8): the kernels of `moe`, with the plain product.

Illegal: x and experts of different dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device
from atomc.codegen.kernels.gemm import precision_of
from atomc.codegen.kernels.moe import Matrix, launch_in, launch_out
from atomc.codegen.kernels.moe_config import choose
from atomc.codegen.kernels.moe_sort import sort

WHOLE = 512  # columns of SwiGLU at once, where it has a kernel of its own


def constants_of(device: Device, dtype: torch.dtype) -> dict[str, Any]:
    """What `expert_product` must know: a step has 128 bytes of a row; what scales need is of no use."""
    return {
        "KIND": "plain", "BK": 128 // dtype.itemsize, "GROUP": 0, "FORM": precision_of(device, dtype), "LEFT": "",
        "TILE": 1, "WIDTH": 0, "CHUNK": 0, "WORDS": False, "ASM": False,
    }  # fmt: skip


def moe_experts(
    device: Device, x: Tensor, w13: Tensor, w2: Tensor, indices: Tensor, weights: Tensor, limit: float
) -> Tensor:
    """See `atomc.ops.experts.moe_experts`.

    Raises:
        ValueError: x and the experts have different dtypes, or one that is neither bf16 nor fp32.
    """
    if x.dtype not in (torch.bfloat16, torch.float32) or {w13.dtype, w2.dtype} != {x.dtype}:
        raise ValueError(f"experts {w13.dtype}, {w2.dtype} and activations {x.dtype}: all are bfloat16, or float32")
    (experts, d, i), (t, choices) = w2.shape, indices.shape
    # As FP8's, fp32's parts need registers.
    config = choose(device, choices, experts, fused=True, eights=x.dtype == torch.float32)
    rows = sort(device, x, None, None, indices, experts, config.bm, "plain")
    end = {
        "INNER": i, "WIDE": False, "EIGHT": tl.float8e4nv, "ORDER": "", "IGROUP": 0, "ELEMENT": "", "FLOOR": 0.0,
        "TOP": 0.0, "SCALE": "",
    }  # fmt: skip
    a = device.empty((t * choices, i), x.dtype), None
    shared = constants_of(device, x.dtype)
    launch_in(device, rows, Matrix(w13, None, shared, d), weights, config, a, end, WHOLE, limit, x.dtype)
    return launch_out(device, rows, Matrix(w2, None, shared, i), a, config, indices, d, x.dtype)
