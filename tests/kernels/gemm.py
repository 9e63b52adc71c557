"""Cases of the GEMM of tensors that are not quantised."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from atomc.codegen.device import Device
from atomc.codegen.kernels import gemm
from tests.support.kernel_cases import TOLERANCE, TORCH, Case

BF16, FP32 = torch.bfloat16, torch.float32


def arguments(x: tuple[int, ...], n: int, dtypes: tuple[torch.dtype, torch.dtype], size: float) -> list[Any]:
    """x [..., K] and a weight [N, K]. torch's own operator is no entry of OPS."""
    known = SimpleNamespace(reference=F.linear, overload=torch.ops.aten.linear.default, mutates=())
    TORCH.setdefault("linear", known)
    values = torch.randn(x) * size
    values[..., :16] *= 16
    return [values.to(dtypes[0]), (torch.randn(n, x[-1]) * x[-1] ** -0.5).to(dtypes[1])]


def case(
    name: str, x: tuple[int, ...], n: int, dtypes: tuple[torch.dtype, torch.dtype], op: str = "linear_fp32",
    size: float = 1.0, slow: bool = False, tokens: int = 0,
) -> Case:  # fmt: skip
    make = lambda: arguments(x, n, dtypes, size)  # noqa: E731
    # The matrix unit adds 16 columns at a time and cuts each sum off at 24 bits; of three parts, three times as often.
    cut = {FP32: max(TOLERANCE[FP32], 3 * x[-1] / 16 * 2.0**-24)} if FP32 in dtypes else {}
    return Case(name, op, getattr(gemm, op), make, tokens or x[0], gpu_tolerance=cut, slow=slow)


def batched(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, tokens: int = 0, within: bool = True,
    slow: bool = False,
) -> Case:  # fmt: skip
    """Groups, tokens, N, K: x is [T, G, K] exchanged, or contiguous; the weight [G, N, K] exchanged."""
    groups, m, n, k = shape
    known = SimpleNamespace(
        reference=lambda x, w: torch.bmm(*_views(x, w, within)), overload=torch.ops.aten.bmm.default, mutates=()
    )
    TORCH[f"bmm {within}"] = known

    def make() -> list[Any]:
        x = torch.randn((m, groups, k) if within else (groups, m, k))
        x[..., :16] *= 16
        return [x.to(dtype), (torch.randn(groups, n, k) * k**-0.5).to(dtype)]

    host = lambda device, x, w: gemm.bmm(device, *_views(x, w, within))  # noqa: E731
    return Case(f"bmm {name} {title((dtype,))}", f"bmm {within}", host, make, tokens or m, slow=slow)


def _views(x: torch.Tensor, w: torch.Tensor, within: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return x.transpose(0, 1) if within else x, w.transpose(1, 2)


PAIRS = ((BF16, BF16), (FP32, BF16), (FP32, FP32), (BF16, FP32))
SHAPES = (
    ((1, 128), 64), ((5, 200), 130), ((16, 512), 96), ((33, 384), 64), ((64, 256), 80), ((70, 136), 144),
    ((2, 3, 64), 48),
)  # fmt: skip


def title(dtypes: tuple[torch.dtype, ...]) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


CASES = [
    *(case(f"fp32 {title(d)} {x} {n}", x, n, d, tokens=math.prod(x[:-1])) for x, n in SHAPES for d in PAIRS),
    *(case(f"linear {title((d, d))} {x} {n}", x, n, (d, d), "linear") for x, n in SHAPES[:6] for d in (BF16, FP32)),
    case("fp32 split", (3, 2048), 72, (BF16, BF16)),
    case("linear split", (3, 2048), 64, (BF16, BF16), "linear"),
    case("fp32 prefill split", (70, 1024), 128, (BF16, BF16)),
    case("fp32 wide tiles", (130, 128), 256, (BF16, BF16), tokens=1 << 17),
    *(case(f"fp32 tall tiles {title(d)}", (130, 96), 136, d, tokens=1 << 17) for d in PAIRS),
    *(case(f"fp32 {name} {title(d)}", (5, 256), 64, d, size=size) for name, size in (("huge", 1e4), ("tiny", 1e-6))
      for d in PAIRS[:3]),
    *(
        case(f"fp32 real {m}x{n}x{k} {title(d)}", (m, k), n, d, slow=True)
        for m in (1, 16, 64, 300, 2100)
        for n, k in ((256, 4096), (2048, 4096), (384, 7168))
        for d in PAIRS[:3]
    ),
    *(
        batched(f"{shape} {'within' if within else 'apart'}", shape, dtype, within=within)
        for shape in ((2, 1, 64, 128), (3, 5, 40, 72), (1, 7, 33, 100), (8, 16, 16, 64), (4, 70, 130, 96))
        for dtype in (BF16, FP32)
        for within in (True, False)
    ),
    *(case(f"linear prefill narrow {m} {title((d, d))}", (m, 128), 4, (d, d), "linear", tokens=tokens)
      for m, tokens in ((70, 0), (130, 1 << 17)) for d in (BF16, FP32)),
    batched("split", (2, 3, 64, 2048), BF16),
    batched("prefill", (2, 130, 256, 128), BF16, tokens=1 << 17),
    *(batched(f"real {m}", (8, m, 1024, 4096), dtype, slow=True) for m in (1, 16, 64, 2100) for dtype in (BF16, FP32)),
    *(case(f"fp32 head {m}", (m, 4096), 129280, (BF16, BF16), slow=True) for m in (1, 64)),
]  # fmt: skip


# -- ahead of time -----------------------------------------------------------------------------------------------------


def product(
    n: int, k: int, dtypes: tuple[torch.dtype, torch.dtype], op: str = "linear_fp32"
) -> Callable[[Device], Any]:
    """A launch at a model's shape."""

    def run(device: Device) -> Any:
        x = torch.empty(device.tokens, k, dtype=dtypes[0], device="meta")
        return getattr(gemm, op)(device, x, torch.empty(n, k, dtype=dtypes[1], device="meta"))

    return run


def grouped(groups: int, dtype: torch.dtype) -> Callable[[Device], Any]:
    """wo_a of a model: 1024 of 4096 for each group of heads."""

    def run(device: Device) -> Any:
        x = torch.empty(device.tokens, groups, 4096, dtype=dtype, device="meta").transpose(0, 1)
        w = torch.empty(groups, 1024, 4096, dtype=dtype, device="meta").transpose(1, 2)
        return gemm.bmm(device, x, w)

    return run


FLASH = {"router": (256, 4096), "compressor": (2048, 4096), "hca compressor": (1024, 4096), "index": (512, 4096),
         "weights_proj": (64, 4096), "head": (129280, 4096)}  # fmt: skip
PRO = {"router": (384, 7168), "compressor": (2048, 7168), "hca compressor": (1024, 7168), "index": (512, 7168),
       "weights_proj": (64, 7168), "head": (129280, 7168)}  # fmt: skip
PRODUCTS = [
    *(
        (f"{model} {name}", product(*shape, (BF16, BF16)))
        for model, shapes in (("flash", FLASH), ("pro", PRO))
        for name, shape in shapes.items()
    ),
    *((f"flash router {title(d)}", product(256, 4096, d)) for d in PAIRS[1:]),
    *((f"flash head {title(d)}", product(129280, 4096, d)) for d in PAIRS[1:3]),
    ("flash wqkv_a bf16", product(1536, 4096, (BF16, BF16), "linear")),
    ("flash wo_a bf16", grouped(8, BF16)),
    ("pro wo_a bf16", grouped(16, BF16)),
    ("flash wo_a fp32", grouped(8, FP32)),
    ("flash wqkv_a fp32", product(1536, 4096, (FP32, FP32), "linear")),
]
PRODUCTS += [(f"few heads {title(d)}", product(4, 256, d)) for d in (PAIRS[0], PAIRS[2])]
AOT = [(f"{name} {tokens}", run) for name, run in PRODUCTS for tokens in (1, 16, 64, 8192)]
