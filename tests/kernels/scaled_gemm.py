"""Cases of the GEMM of quantised operands."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from atomc.codegen.device import Device
from atomc.codegen.kernels import scaled_gemm
from atomc.formats import FP4_ACTIVATION, FP8_ACTIVATION, FP8_CHANNEL, FP8_TILE, FP8_TILE_F32, MXFP4, Layout, quantize
from atomc.targets import get_target
from tests.support.kernel_cases import Case

SMALL_TILE, FINE = Layout.parse("e4m3:8x128:e8m0"), Layout.parse("e4m3:1x64:pow2:0.0001")
BF16, FP32 = torch.bfloat16, torch.float32


def arguments(
    x: tuple[int, ...], w: tuple[int, int], layouts: tuple[Layout, Layout], dtype: torch.dtype, size: float = 1.0
) -> Callable[[], list[Any]]:
    """Fresh pairs of x [..., K] and w [N, K]; the first columns of x are 16 times as large, some rows zeros."""

    def make() -> list[Any]:
        values, weight = torch.randn(x) * size, torch.randn(w) * w[1] ** -0.5
        values[..., :32] *= 16
        values[-1] = 0 if x[0] > 2 else values[-1]
        weight[-1] *= 1e-6
        texts = [str(layout) for layout in layouts]
        return [*quantize(values, layouts[0]), *quantize(weight, layouts[1]), *texts, dtype]

    return make


def on(target: str, host: Callable[..., Any]) -> Callable[..., Any]:
    """The host function as it decides for another target."""
    return lambda device, *args: host(replace(device, target=get_target(target)), *args)


def case(
    name: str, x: tuple[int, ...], w: tuple[int, int], layouts: tuple[Layout, Layout], dtype: torch.dtype = BF16,
    tokens: int = 0, target: str = "", slow: bool = False, size: float = 1.0,
) -> Case:  # fmt: skip
    op = "scaled_grouped_output" if name.startswith("grouped") else "scaled_linear"
    host = getattr(scaled_gemm, op)
    # Hopper's matrix unit sums 128 products of FP8 with about 14 bits; fp32 adds those sums.
    return Case(name, op, on(target, host) if target else host, arguments(x, w, layouts, dtype, size), tokens or x[0],
                gpu_tolerance={FP32: 2e-3}, slow=slow)  # fmt: skip


TILES = (FP8_ACTIVATION, FP8_TILE)
CHANNELS = (FP8_CHANNEL, FP8_CHANNEL)
NARROW = (FP4_ACTIVATION, MXFP4)
CASES = [
    *(
        case(f"linear {m}x{n}x{k} {str(dtype)[6:]}", (m, k), (n, k), TILES, dtype)
        for m, n, k in ((1, 128, 128), (5, 130, 200), (16, 256, 512), (33, 64, 384))
        for dtype in (FP32, BF16)
    ),
    case("linear split", (3, 1024), (64, 1024), TILES),
    case("linear of three dims", (2, 3, 256), (48, 256), TILES, FP32, tokens=6),
    case("linear tiny", (3, 256), (64, 256), TILES, FP32, size=1e-6),
    case("linear huge", (3, 256), (64, 256), TILES, FP32, size=1e4),
    case("linear float32 tiles", (7, 256), (136, 256), (FP8_ACTIVATION, FP8_TILE_F32), FP32),
    case("linear small tiles", (7, 256), (128, 256), (FP8_ACTIVATION, SMALL_TILE), FP32),
    case("linear channels", (5, 320), (80, 320), (FP8_CHANNEL, FP8_CHANNEL), FP32),
    case("linear channels split", (70, 512), (72, 512), (FP8_CHANNEL, FP8_CHANNEL), BF16),
    case("linear blocks and channels", (5, 256), (80, 256), (FP8_ACTIVATION, FP8_CHANNEL), FP32),
    case("linear channels and tiles", (5, 256), (80, 256), (FP8_CHANNEL, FP8_TILE), FP32),
    case("linear channels and even tiles", (5, 256), (128, 256), (FP8_CHANNEL, FP8_TILE), FP32),
    case("linear blocks of 64", (5, 192), (72, 192), (FINE, FP8_TILE), FP32),
    case("linear fp4 weight", (5, 160), (72, 160), (FP8_ACTIVATION, MXFP4), FP32),
    case("linear fp4 both", (5, 128), (64, 128), NARROW, BF16),
    case("linear prefill", (130, 256), (192, 256), TILES, FP32),
    case("linear prefill ragged", (70, 200), (100, 200), TILES, BF16),
    case("linear prefill small tiles", (70, 128), (64, 128), (FP8_ACTIVATION, SMALL_TILE), FP32),
    case("linear prefill two tiles", (130, 256), (256, 256), TILES, FP32, tokens=1 << 17),
    case("linear prefill two tiles channels", (130, 256), (256, 256), CHANNELS, FP32, tokens=1 << 17),
    case("linear prefill fp4", (70, 64), (64, 64), NARROW, FP32),
    case("grouped", (5, 2, 256), (256, 256), TILES, FP32),
    case("grouped ragged", (5, 3, 128), (3 * 40, 128), TILES, BF16),
    case("grouped split", (2, 2, 1024), (128, 1024), TILES, BF16),
    case("grouped prefill", (70, 2, 128), (256, 128), TILES, BF16),
    case("grouped channels", (5, 2, 128), (128, 128), (FP8_CHANNEL, FP8_CHANNEL), FP32),
    *(
        case(f"linear real {m}x{n}x{k} {layouts[0]}", (m, k), (n, k), layouts, BF16, slow=True)
        for m, n, k in ((1, 1536, 4096), (16, 4096, 8192), (64, 32768, 1024), (200, 1536, 4096), (2100, 4096, 4096))
        for layouts in (TILES, (FP8_CHANNEL, FP8_CHANNEL))
    ),
    case("linear real odd", (2101, 4096), (1536, 4096), TILES, BF16, slow=True),
    case("linear real small tiles", (2100, 4096), (4096, 4096), (FP8_ACTIVATION, SMALL_TILE), BF16, slow=True),
    case("linear real fp4", (300, 4096), (1024, 4096), (FP8_ACTIVATION, MXFP4), BF16, slow=True),
    case("grouped real", (16, 8, 4096), (8192, 4096), TILES, BF16, slow=True),
    case("grouped real prefill", (1100, 8, 4096), (8192, 4096), TILES, BF16, slow=True),
]


def elsewhere() -> list[Case]:
    """What other targets do: the FNUZ dialect, and scaled matrix instructions. The interpreter is any target."""
    found = []
    for target in ("mi300x", "mi355x", "b200"):
        known = get_target(target)
        for name, layouts in (("tiles", TILES), ("fp4", (FP8_ACTIVATION, MXFP4)), ("narrow", NARROW),
                              ("channels", CHANNELS), ("float32 tiles", (FP8_ACTIVATION, FP8_TILE_F32))):  # fmt: skip
            pair = (layouts[0].fnuz(), layouts[1].fnuz()) if known.fp8 == "fnuz" else layouts
            found += [
                case(f"linear {name} {m} for {target}", (m, 200), (136, 200), pair, FP32, target=target)
                for m in (5, 70)
            ]
        pair = (TILES[0].fnuz(), TILES[1].fnuz()) if known.fp8 == "fnuz" else TILES
        found.append(case(f"grouped for {target}", (5, 2, 256), (160, 256), pair, FP32, target=target))
        found.append(case(f"linear two tiles for {target}", (300, 128), (256, 128), pair, FP32, 1 << 17, target))
    return found


if os.environ.get("TRITON_INTERPRET") == "1":
    CASES += elsewhere()


# -- ahead of time -----------------------------------------------------------------------------------------------------


def meta(shape: tuple[int, ...], layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """An empty pair of values of that shape."""
    codes, scales = layout.code_shape(shape), layout.scale_shape(shape)
    return (
        torch.empty(codes, dtype=layout.element.storage, device="meta"),
        torch.empty(scales, dtype=layout.scale_dtype, device="meta"),
    )


def product(n: int, k: int, layouts: tuple[Layout, Layout], groups: int = 0) -> Callable[[Device], Any]:
    """A launch at a model's shape, in the dialect of the device's target."""

    def run(device: Device) -> Any:
        x, w = (y.fnuz() if device.target.fp8 == "fnuz" else y for y in layouts)
        shape = (device.tokens, groups, k) if groups else (device.tokens, k)
        host = scaled_gemm.scaled_grouped_output if groups else scaled_gemm.scaled_linear
        return host(device, *meta(shape, x), *meta((n, k), w), str(x), str(w), BF16)

    return run


FLASH = {"wqkv_a": (1536, 4096), "wq_b": (32768, 1024), "index wq_b": (8192, 1024), "wo_b": (4096, 8192),
         "w13": (4096, 4096), "w2": (4096, 2048)}  # fmt: skip
PRO = {"wqkv_a": (2048, 7168), "wq_b": (65536, 1536), "index wq_b": (8192, 1536), "wo_b": (7168, 16384),
       "w13": (6144, 7168), "w2": (7168, 3072)}  # fmt: skip
PRODUCTS = [
    *(
        (f"{model} {name}{suffix}", product(*shape, layouts))
        for model, shapes in (("flash", FLASH), ("pro", PRO))
        for name, shape in shapes.items()
        for suffix, layouts in (("", TILES), (" channels", CHANNELS))
    ),
    ("flash wo_a", product(8192, 4096, TILES, 8)),
    ("flash wo_a channels", product(8192, 4096, CHANNELS, 8)),
    ("pro wo_a", product(16384, 4096, TILES, 16)),
    ("flash w13 small tiles", product(4096, 4096, (FP8_ACTIVATION, SMALL_TILE))),
    ("flash w13 float32 tiles", product(4096, 4096, (FP8_ACTIVATION, FP8_TILE_F32))),
    ("flash w13 fp4", product(4096, 4096, (FP8_ACTIVATION, MXFP4))),
    ("flash w13 fp4 both", product(4096, 4096, NARROW)),
]
AOT = [(f"{name} {tokens}", run) for name, run in PRODUCTS for tokens in (1, 16, 64, 8192)]
