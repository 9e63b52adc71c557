"""Cases of the generator: programs with casts, views, gathers, reductions, angles; strides, NaN, ragged sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atomc.codegen import pointwise
from atomc.codegen.device import Device
from tests.support.kernel_cases import Case

F32, BF16, I32, I64 = torch.float32, torch.bfloat16, torch.int32, torch.int64
Make = Callable[[], list[Any]]
ADD = """v0 = aten.to.dtype(a1, float32)
v1 = aten.add.Tensor(a0, v0)
v2 = aten.to.dtype(v1, bfloat16)
return v2,"""
ANGLES = """v0 = aten.to.dtype(a0, float32)
v1 = aten.unsqueeze.default(v0, -1)
v2 = aten.mul.Tensor(v1, a1)
v3 = aten.cos.default(v2)
v4 = aten.sin.default(v2)
return v3, v4,"""
ROW_ANGLES = """v0 = aten.clamp.default(a0, 0)
v1 = aten.index.Tensor(a1, [v0])
v2 = aten.sub.Tensor(v1, 3)
v3 = aten.to.dtype(v2, float32)
v4 = aten.unsqueeze.default(v3, -1)
v5 = aten.mul.Tensor(v4, a2)
v6 = aten.cos.default(v5)
return v6,"""
STREAMS = """v0 = aten.embedding.default(a0, a1)
v1 = aten.to.dtype(v0, float32)
v2 = aten.unsqueeze.default(v1, -2)
v3 = aten.expand.default(v2, [-1, 4, -1])
v4 = aten.contiguous.default(v3)
return v4,"""
IDENTITY = """v0 = aten.eye.default(4, dtype=float32)
v1 = aten.expand.default(v0, [s0, 4, 4])
v2 = aten.contiguous.default(v1)
v3 = aten.zeros.default([s0, 4, 4], dtype=float32)
v4 = aten.full.default([s0, 4, 4], 0.5, dtype=bfloat16)
return v2, v3, v4,"""
NORM = """v0 = aten.to.dtype(a0, float32)
v1 = aten.square.default(v0)
v2 = aten.mean.dim(v1, [-1], True)
v3 = aten.add.Tensor(v2, 1e-06)
v4 = aten.rsqrt.default(v3)
v5 = aten.mul.Tensor(v0, v4)
v6 = aten.mul.Tensor(v5, a1)
v7 = aten.to.dtype(v6, bfloat16)
return v7,"""
SOFTMAX = """v0 = aten.amax.default(a0, [-1], True)
v1 = aten.sub.Tensor(a0, v0)
v2 = aten.exp.default(v1)
v3 = aten.sum.dim_IntList(v2, [-1], True)
v4 = aten.div.Tensor(v2, v3)
return v4,"""
SUM = """v0 = aten.sum.dim_IntList(a0, [-1])
v1 = aten.mul.Tensor(v0, -0.25)
return v1, v0,"""
OTHER_LENGTH = """v0 = aten.sum.dim_IntList(a0, [-1], True)
v1 = aten.add.Tensor(v0, a1)
return v1,"""
CURVES = """v0 = aten.silu.default(a0)
v1 = aten.sigmoid.default(a0)
v2 = aten.clamp.default(a0, -0.5, 1.5)
v3 = aten.relu.default(a0)
v4 = aten.maximum.default(a0, a1)
v5 = aten.gt.Scalar(a0, 0.25)
v6 = aten.where.self(v5, v0, v1)
v7 = aten.abs.default(a0)
v8 = aten.sqrt.default(v7)
v9 = aten.rsub.Scalar(v8, 1.0)
v10 = aten.neg.default(v9)
v11 = aten.minimum.default(v10, v2)
return v0, v1, v2, v3, v4, v6, v8, v11,"""
PICK = """v0 = aten.index.Tensor(a0, [a1])
return v0,"""
INTEGERS = """v0 = aten.mul.Tensor(a0, 3)
v1 = aten.sub.Tensor(v0, a1)
v2 = aten.clamp.default(v1, -5, 11)
v3 = aten.to.dtype(v2, int64)
v4 = aten.eq.Tensor(a0, a1)
v5 = aten.where.self(v4, v2, v1)
v6 = aten.to.dtype(v4, int32)
return v2, v5, v6,"""
FOUR_DIMS = """v0 = aten.mul.Tensor(a0, a1)
return v0,"""


def frequencies(pairs: int, theta: float) -> Tensor:
    return 1.0 / (theta ** (torch.arange(pairs).float() / pairs))


def positions(t: int) -> Tensor:
    """Short and long ones, the largest, and those at multiples of a quarter turn."""
    p = torch.randint(0, 1 << 20, (t,))
    p[: t // 3] = torch.arange(t // 3)
    p[-1] = (1 << 20) - 1
    return p.int()


def odd(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """With NaN and infinities."""
    x = torch.randn(shape)
    for place, value in enumerate((torch.nan, torch.inf, -torch.inf, 0.0, -0.0)):
        x.view(-1)[place] = value
    return x.to(dtype)


def small(*shape: int) -> Tensor:
    return torch.randint(-9, 9, shape).int()


def case(
    name: str, program: str, inputs: Callable[[], list[Tensor]], sizes: tuple[int, ...] = (), **known: Any
) -> Case:
    return Case(name, "pointwise", pointwise.pointwise, lambda: [inputs(), list(sizes), program], **known)


# A cosine is relative to the norm of all of them, so the error of each is near it too.
EXACT = {F32: 1e-6, BF16: 4e-3}
CASES = [
    *(case(f"add {t}x{d}", ADD, lambda t=t, d=d: [torch.randn(t, d), torch.randn(t, d).bfloat16()])
      for t, d in [(1, 256), (5, 4100), (7, 20)]),
    *(case(f"angles {t}x{n} {theta}", ANGLES,
           lambda t=t, n=n, theta=theta: [positions(t), frequencies(n, theta)], tokens=t, tolerance=EXACT)
      for t, n, theta in [(1, 32, 1e4), (301, 32, 1.6e5), (7, 5, 1e4)]),
    case("row angles", ROW_ANGLES,
         lambda: [torch.tensor([3, 17, 39, -1]).int(), positions(40), frequencies(32, 1e4)], tolerance=EXACT),
    *(case(f"streams {dtype} {kind}", STREAMS,
           lambda dtype=dtype, kind=kind: [torch.randn(50, 72).to(dtype), torch.randint(0, 50, (5,)).to(kind)])
      for dtype in (F32, BF16) for kind in (I32, I64)),
    case("identity", IDENTITY, lambda: [torch.randn(1)], (5,)),
    *(case(f"norm {d}", NORM, lambda d=d: [torch.randn(5, d).bfloat16(), torch.randn(d)]) for d in (20, 256, 1500)),
    case("softmax", SOFTMAX, lambda: [torch.randn(6, 3, 70) * 5]),
    case("sum", SUM, lambda: [torch.randn(9, 70)]),
    case("sum and rows of another length", OTHER_LENGTH, lambda: [torch.randn(9, 70), torch.randn(9, 6)]),
    *(case(f"curves {dtype}", CURVES, lambda dtype=dtype: [odd(5, 33, dtype=dtype), odd(5, 33, dtype=dtype)])
      for dtype in (F32, BF16)),
    case("curves, columns of a product", CURVES, lambda: [odd(5, 70)[:, 3:36], odd(70)[7:40]]),
    case("rows from the end", PICK, lambda: [torch.randn(7, 4, 10), torch.tensor([0, -1, 6, -7, 2])]),
    case("integers", INTEGERS, lambda: [small(3, 5), small(3, 5)]),
    case("four dims", FOUR_DIMS, lambda: [torch.randn(3, 2, 5, 9), torch.randn(2, 1, 9)], tokens=128),
]  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _generated(device: Device) -> None:
    t, freq = device.tokens, meta(32, dtype=F32)
    ids = meta(t, dtype=I32)
    for d in (4096, 7168):
        pointwise.pointwise(device, [meta(t, d, dtype=F32), meta(t, d)], [], ADD)
        pointwise.pointwise(device, [meta(129280, d), ids], [], STREAMS)
        pointwise.pointwise(device, [meta(t, 4, d), ids], [], PICK)
        pointwise.pointwise(device, [meta(t, d), meta(d, dtype=F32)], [], NORM)
    pointwise.pointwise(device, [ids, freq], [], ANGLES)
    pointwise.pointwise(device, [ids, ids, freq], [], ROW_ANGLES)
    pointwise.pointwise(device, [freq], [t], IDENTITY)


AOT = [(f"generated {tokens}", _generated) for tokens in (1, 8192)]
