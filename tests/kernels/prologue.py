"""Cases of the prologue. It is plain PyTorch in a graph, so what it computes is an operator here only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atomc.codegen.device import Device
from atomc.codegen.kernels import prologue
from atomc.models.deepseek_v4 import hyper_connection, layers
from atomc.ops.registry import define
from tests.support.kernel_cases import Case

F32, BF16 = torch.float32, torch.bfloat16
I32, I64 = torch.int32, torch.int64


@define("case_embed(Tensor weight, Tensor ids) -> Tensor", tokens="ids", spec="2.0")
def case_embed(weight: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.embedding(ids, weight)


@define("case_enter(Tensor x, int n) -> (Tensor, Tensor, Tensor)", tokens="x", spec="2.1")
def case_enter(x: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    residual = hyper_connection.enter(x, n)
    return residual.h, residual.post, residual.comb


@define(
    "case_embed_enter(Tensor weight, Tensor ids, int n) -> (Tensor, Tensor, Tensor, Tensor)", tokens="ids", spec="2.1"
)
def case_embed_enter(weight: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(hyper_connection.enter(torch.nn.functional.embedding(ids, weight), n))  # type: ignore[return-value]


@define("case_angles(Tensor positions, Tensor inv_freq) -> (Tensor, Tensor)", tokens="positions", spec="2.2")
def case_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    # In float64 from the float32 product on: the kernel must be near the truth, not near another approximation.
    theta = (positions.float().unsqueeze(-1) * inv_freq).double()
    return theta.cos().float(), theta.sin().float()


@define(
    "case_row_angles(Tensor positions, Tensor ends, int ratio, Tensor inv_freq) -> (Tensor, Tensor)", tokens="ends",
    spec="2.2",
)  # fmt: skip
def case_row_angles(positions: Tensor, ends: Tensor, ratio: int, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(layers.angles(positions[ends.clamp(min=0)] - (ratio - 1), inv_freq))  # type: ignore[return-value]


def frequencies(pairs: int, theta: float) -> Tensor:
    return 1.0 / (theta ** (torch.arange(pairs).float() / pairs))


def positions(t: int) -> Tensor:
    """Short and long ones, the largest, and those at multiples of a quarter turn."""
    p = torch.randint(0, 1 << 20, (t,))
    p[: t // 3] = torch.arange(t // 3)
    p[-1] = (1 << 20) - 1
    return p.int()


def ids(t: int, v: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(0, v, (t,)).to(dtype)


# Relative to the norm of cosines and sines, so the error of each is near it too; at most 1e-6.
EXACT = {F32: 1e-6, BF16: 0.0}
ANGLES = [(1, 32, 10000.0), (300, 32, 10000.0), (301, 32, 160000.0), (7, 5, 10000.0)]
CASES = [
    *(Case(f"embed {t}x{d} {dtype} {kind}", "case_embed", prologue.embed,
           lambda t=t, d=d, dtype=dtype, kind=kind: [torch.randn(50, d).to(dtype), ids(t, 50, kind)], tolerance=EXACT)
      for t, d in [(1, 4096), (5, 20)] for dtype in (F32, BF16) for kind in (I32, I64)),
    *(Case(f"enter {t}x{d} {dtype}", "case_enter", prologue.enter,
           lambda t=t, d=d, dtype=dtype: [torch.randn(t, d).to(dtype), 4], tolerance=EXACT)
      for t, d in [(1, 1100), (5, 20)] for dtype in (F32, BF16)),
    *(Case(f"embed enter {t}x{d} {dtype}", "case_embed_enter", prologue.embed_enter,
           lambda t=t, d=d, dtype=dtype: [torch.randn(50, d).to(dtype), ids(t, 50, I32), 4], tolerance=EXACT)
      for t, d in [(1, 1100), (5, 20)] for dtype in (F32, BF16)),
    *(Case(f"angles {t}x{pairs} {theta}", "case_angles", prologue.angles,
           lambda t=t, pairs=pairs, theta=theta: [positions(t), frequencies(pairs, theta)], tolerance=EXACT, tokens=t)
      for t, pairs, theta in ANGLES),
    *(Case(f"row angles {ratio}", "case_row_angles", prologue.row_angles,
           lambda ratio=ratio: [positions(40), torch.tensor([3, 17, 39, -1], dtype=I32), ratio, frequencies(32, 1e4)],
           tolerance=EXACT) for ratio in (4, 128)),
]  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _prologue(device: Device) -> None:
    t, inv_freq = device.tokens, meta(32, dtype=F32)
    place = meta(t, dtype=I32)
    for d in (4096, 7168):
        prologue.embed(device, meta(129280, d), place)
        prologue.enter(device, meta(t, d), 4)
        prologue.embed_enter(device, meta(129280, d), place, 4)
    prologue.angles(device, place, inv_freq)
    prologue.row_angles(device, place, place, 4, inv_freq)
    prologue.row_angles(device, place, place, 128, inv_freq)


AOT: list[Any] = [("prologue", _prologue)]
