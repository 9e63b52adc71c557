"""Cases of the routed experts in full precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from atomc.codegen.device import Device
from atomc.codegen.kernels import moe_plain
from tests.kernels.moe import INTERPRETED, LIMIT, choices, meta
from tests.support.kernel_cases import Case, as_on

F32, BF16 = torch.float32, torch.bfloat16
# A sum that is off in its last bits now and then rounds to the next bf16, which is 2^-8 of it; there are three such
# roundings (of both products, and of what lies between).
BOUNDS = {BF16: {F32: 1e-3}, F32: {F32: 2e-5}}


def experts(
    t: int, k: int, e: int, d: int, i: int, dtype: torch.dtype, kind: str = "spread", size: float = 1.0,
    spoil: bool = False,
) -> Callable[[], list[Any]]:  # fmt: skip
    """Fresh arguments: rows of zeros and tiny ones among those of x, experts of very different size."""

    def make() -> list[Any]:
        x = torch.randn(t, d) * size
        x[1::4] *= 1e-3
        x[2::5] = 0
        if spoil:
            x[0, 5], x[-1, d - 1] = torch.nan, torch.inf
        apart = 2.0 ** torch.randint(-6, 7, (e, 1, 1)).float()
        w13, w2 = torch.randn(e, 2 * i, d) * d**-0.5 * apart, torch.randn(e, d, i) * i**-0.5
        indices, weights = choices(t, k, e, kind), torch.rand(t, k) + 0.1
        return [x.to(dtype), w13.to(dtype), w2.to(dtype), indices, weights, LIMIT]

    return make


def case(
    name: str, make: Callable[[], list[Any]], dtype: torch.dtype, target: str = "h100", tokens: int = 16,
    slow: bool = False,
) -> Case:  # fmt: skip
    host = as_on(target, moe_plain.moe_experts)
    return Case(
        f"{name} {str(dtype)[6:]}", "moe_experts", host, make, tokens=tokens, slow=slow, tolerance=BOUNDS[dtype]
    )


# tokens, choices, experts, D, I, bucket, kind of routing
SHAPES = [
    (1, 3, 8, 256, 128, 1, "spread"), (1, 1, 1, 8, 1, 1, "spread"), (1, 3, 5, 160, 97, 1, "spread"),
    (2, 3, 8, 256, 128, 16, "spread"), (16, 2, 8, 128, 256, 16, "one"), (7, 2, 8, 384, 128, 16, "few"),
    (5, 2, 5, 96, 160, 16, "spread"), (3, 2, 4, 33, 70, 16, "spread"), (13, 6, 8, 64, 32, 16, "spread"),
    (30, 3, 6, 128, 128, 80, "same"), (33, 2, 4, 100, 72, 90, "spread"), (150, 4, 5, 128, 128, 300, "one"),
    (90, 3, 3, 72, 130, 400, "same"),
]  # fmt: skip
CASES = [
    *(case(f"plain {t}x{d}x{i} {kind} of {e}", experts(t, k, e, d, i, dtype, kind), dtype, tokens=tokens)
      for t, k, e, d, i, tokens, kind in SHAPES for dtype in (F32, BF16)),
    *(case(f"plain of a rank {t}", experts(t, 4, 8, 96, 72, dtype, "own"), dtype, tokens=n)
      for t, n in [(1, 1), (7, 16), (40, 90)] for dtype in (F32, BF16)),
    case("plain huge", experts(3, 2, 4, 128, 128, BF16, size=1e4), BF16),
    case("plain tiny", experts(3, 2, 4, 128, 128, F32, size=1e-6), F32),
    *(case(f"plain with NaN {t}", experts(t, 2, 4, 256, 128, dtype, spoil=True), dtype, tokens=tokens)
      for t, tokens in [(3, 16), (36, 90)] for dtype in (F32, BF16)),
    *(case(f"plain for {target} {t}", experts(t, 2, 4, d, 72, dtype), dtype, target, tokens)
      for target in ("mi355x", "b200") for t, d, tokens in [(1, 128, 1), (5, 96, 16), (40, 136, 100)]
      # AMD's fp32 products have a name of their own, which no other compiler takes.
      for dtype in ((F32, BF16) if INTERPRETED or target == "b200" else (BF16,))),
    *(case(f"plain flash {t}", experts(t, 6, 16, 4096, 2048, dtype), dtype, tokens=t, slow=True)
      for t, dtype in [(1, BF16), (16, BF16), (64, BF16), (1000, BF16), (1, F32), (64, F32), (300, F32)]),
    case("plain pro 64", experts(64, 6, 16, 7168, 3072, BF16), BF16, tokens=64, slow=True),
]  # fmt: skip


# -- ahead of time -----------------------------------------------------------------------------------------------------


def _experts(device: Device) -> None:
    t = device.tokens
    for e, d, i in [(256, 4096, 2048), (384, 7168, 3072), (16, 256, 256)]:
        for dtype in (BF16, F32):
            indices, weights = meta(t, 6, dtype=torch.int64), meta(t, 6, dtype=F32)
            w13, w2 = meta(e, 2 * i, d, dtype=dtype), meta(e, d, i, dtype=dtype)
            moe_plain.moe_experts(device, meta(t, d, dtype=dtype), w13, w2, indices, weights, LIMIT)


AOT = [(f"plain {tokens}", _experts) for tokens in (1, 16, 64, 512, 8192)]
