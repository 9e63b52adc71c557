"""Cases of the routed experts, and of clamped SwiGLU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atomc.codegen.device import Device
from atomc.codegen.kernels import moe, swiglu
from atomc.codegen.kernels.moe_config import Config, Part
from atomc.codegen.tuning import trial
from atomc.formats import FP4_ACTIVATION, FP8_ACTIVATION, FP8_CHANNEL, FP8_TILE, FP8_TILE_F32, MXFP4, Layout, quantize
from tests.support.kernel_cases import Case, as_on

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = (F32, BF16)
INTERPRETED = "TRITON_INTERPRET" in os.environ
LIMIT = 10.0
FLOATS = Layout.parse("e4m3:1x128:float32:0.0001")
# A sum that is off by 1e-6 moves a value of what w2 multiplies to the next code now and then, which is 2^-4 of it; the
# matrix unit's FP8 sums have some 13 bits, so that more values move.
BOUNDS: dict[str, Any] = {"tolerance": {F32: 2e-3, BF16: 6e-3}, "gpu_tolerance": {F32: 1.5e-2, BF16: 1.5e-2}}


def choices(t: int, k: int, e: int, kind: str) -> Tensor:
    """Experts of each token: `spread` over all, `one` hot expert that all share, `few` experts only, `same` all; `own`:
    those of odd numbers are another rank's, and so are all of the first token."""
    if kind == "same":
        return torch.arange(k).expand(t, k).contiguous()
    among = min(e, k + 1) if kind == "few" else e
    found = torch.stack([torch.randperm(among)[:k] for _ in range(t)])
    if kind == "own":
        found = torch.where(found % 2 == 1, -1, found)
        found[0] = -1
    if kind == "one":
        found[found == e - 1] = found[:, :1].expand_as(found)[found == e - 1]
        found[:, 0] = e - 1
    return found


def experts(
    t: int, k: int, e: int, d: int, i: int, dtype: torch.dtype, act: Layout = FP8_ACTIVATION, weight: Layout = MXFP4,
    inner: Layout | None = None, kind: str = "spread", size: float = 1.0, spoil: bool = False,
) -> Callable[[], list[Any]]:  # fmt: skip
    def make() -> list[Any]:
        x = torch.randn(t, d) * size
        x[1::4] *= 1e-3
        x[2::5] = 0
        if spoil:
            x[0, 5], x[-1, d - 1] = torch.nan, torch.inf
        # Scales of neighbouring groups, up to 2^12 apart.
        apart = 2.0 ** torch.randint(-6, 7, (e, 1, -(-d // 32))).float().repeat_interleave(32, -1)[..., :d]
        w13, w2 = torch.randn(e, 2 * i, d) * d**-0.5 * apart / 8, torch.randn(e, d, i) * i**-0.5
        pairs = [p for w in (w13, w2) for p in quantize(w, weight)]
        indices, weights = choices(t, k, e, kind), torch.rand(t, k) + 0.1
        layouts = [str(part) for part in (act, inner or act, weight, weight)]
        return [*quantize(x, act), *pairs, indices, weights, LIMIT, *layouts, dtype]

    return make


def broken_scale(make: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
    """With a scale of NaN in an expert, as a checkpoint that has NaN would give."""

    def run() -> list[Any]:
        arguments = make()
        arguments[3].view(torch.uint8)[1, 3, 2] = 0xFF
        return arguments

    return run


def apart(
    make: Callable[[], list[Any]], spread: int, least: int = 112, zeros: bool = False, spoil: bool = False
) -> Callable[[], list[Any]]:
    """With scales of the weights up to 2^spread apart; `zeros`: groups and rows of scale byte 0; `spoil`: 0xFF."""

    def run() -> list[Any]:
        arguments = make()
        for at in (3, 5):
            scales = arguments[at].view(torch.uint8)
            # Odd rows as far apart as they may be, even ones not at all.
            scales.copy_(torch.randint(least, least + spread + 1, scales.shape))
            scales[:, ::2] = least + spread // 2
            scales[:, 1::4, 0], scales[:, 1::4, -1] = least, least + spread
            if zeros:
                scales[0, 2:5], scales[:, 7, 1:3], scales[1, :, -1], scales[0, 9, 1:] = 0, 0, 0, 0
            if spoil:
                # Half of the tokens do without expert 1, whose inner columns are NaN.
                scales[(1, 3, 2) if at == 3 else (2, 130, -1)] = 0xFF
        arguments[2], arguments[4] = (torch.randint(-128, 128, w.shape, dtype=torch.int8) for w in arguments[2:5:2])
        return arguments

    return run


def rows_each(make: Callable[[], list[Any]], counts: list[int]) -> Callable[[], list[Any]]:
    """With so many tokens for each expert, in a random order; one choice a token."""

    def run() -> list[Any]:
        arguments = make()
        chosen = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        arguments[6] = chosen[torch.randperm(len(chosen))][:, None].contiguous()
        return arguments

    return run


def case(name: str, make: Callable[[], list[Any]], target: str = "h100", tokens: int = 16, slow: bool = False) -> Case:
    return Case(
        name, "scaled_moe_experts", as_on(target, moe.scaled_moe_experts), make, tokens=tokens, slow=slow, **BOUNDS
    )


def cut(bm: int, first: Part, second: Part) -> Callable[..., Any]:
    """The operator with parts that are cut in a way that only a GPU's table may ask for."""

    def run(device: Device, *given: Any) -> Any:
        with trial("experts", Config(bm, first, second, fused=False).table):
            return moe.scaled_moe_experts(device, *given)

    return run


def finer(
    name: str,
    make: Callable[[], list[Any]],
    first: Part,
    second: Part,
    target: str = "h100",
    slow: bool = False,
    bm: int = 16,
) -> Case:
    host = as_on(target, cut(bm, first, second))
    return Case(f"experts cut finer {name}", "scaled_moe_experts", host, make, tokens=16, slow=slow, **BOUNDS)


def precise(act: Layout) -> torch.dtype:
    """With scales that are no powers of two the reference rounds what it dequantises to bf16, which no kernel does."""
    return F32 if act.scale == "float32" else BF16


def fnuz(layout: Layout) -> Layout:
    return layout.fnuz()


CASES = [
    *(case(f"experts one token {str(dtype)[6:]}", experts(1, 3, 8, 256, 128, dtype), tokens=1) for dtype in DTYPES),
    *(case(f"experts {t} tokens {kind} {str(dtype)[6:]}", experts(t, k, 8, d, i, dtype, kind=kind), tokens=16)
      for t, k, d, i, kind, dtype in [(2, 3, 256, 128, "spread", BF16), (16, 2, 128, 256, "one", F32),
                                      (7, 2, 384, 128, "few", BF16), (13, 6, 128, 64, "spread", F32)]),
    case("experts ragged", experts(5, 2, 5, 96, 160, BF16)),
    case("experts ragged, one token", experts(1, 3, 5, 160, 96, F32), tokens=1),
    case("experts tiles of 32", experts(30, 3, 6, 128, 128, BF16, kind="same"), tokens=80),
    case("experts tiles of 64, sorted by blocks", experts(150, 4, 5, 128, 128, BF16, kind="one"), tokens=300),
    case("experts sorted by blocks, one expert", experts(90, 3, 3, 128, 128, F32, kind="same"), tokens=400),
    *(case(f"experts of a rank {t}", experts(t, 4, 8, 128, d, BF16, kind="own"), tokens=n)
      for t, d, n in [(1, 128, 1), (7, 96, 16), (40, 128, 90)]),
    case("experts huge", experts(3, 2, 4, 128, 128, BF16, size=1e4)),
    case("experts tiny", experts(3, 2, 4, 128, 128, F32, size=1e-6)),
    case("experts with a NaN scale", broken_scale(experts(9, 2, 4, 128, 128, BF16))),
    case("experts with a NaN scale, bf16", broken_scale(experts(40, 2, 4, 256, 128, BF16)), tokens=90),
    case("experts with NaN, bf16", experts(36, 2, 4, 256, 128, BF16, spoil=True), tokens=90),
    case("experts with NaN", experts(3, 2, 4, 256, 128, BF16, spoil=True)),
    # MXFP4 activations; FP8 tiles; a scale for each row.
    *(case(f"experts {act} x {weight}, {t} tokens", experts(t, 2, 4, d, i, precise(act), act, weight), tokens=tokens)
      for t, d, i, tokens, act, weight in [
          (5, 128, 128, 16, FP4_ACTIVATION, MXFP4), (1, 96, 160, 1, FP4_ACTIVATION, MXFP4),
          (5, 256, 128, 16, FP8_ACTIVATION, FP8_TILE), (1, 256, 128, 1, FP8_ACTIVATION, FP8_TILE),
          (6, 200, 72, 16, FP8_ACTIVATION, FP8_TILE_F32), (4, 128, 128, 16, FP4_ACTIVATION, FP8_TILE),
          (4, 128, 96, 16, FP8_ACTIVATION, Layout.parse("e4m3:32x128:e8m0")),
          (4, 128, 128, 16, FP8_CHANNEL, FP8_CHANNEL), (4, 96, 160, 16, FP8_CHANNEL, FP8_CHANNEL),
          (3, 128, 256, 16, FP8_CHANNEL, MXFP4),
          # Tiles of 32 and 64 tokens: bf16 in registers, but for FP8 weights.
          (33, 128, 128, 60, FP4_ACTIVATION, MXFP4), (40, 96, 160, 90, FP8_ACTIVATION, MXFP4),
          (35, 128, 256, 100, FP8_CHANNEL, MXFP4), (33, 256, 96, 90, FP8_ACTIVATION, FP8_TILE),
          (33, 128, 128, 50, FP8_CHANNEL, FP8_CHANNEL), (33, 128, 128, 50, FLOATS, MXFP4)]),
    case("experts bf16 tiles of 128 columns, float32", experts(5, 2, 4, 128, 128, F32, weight=FP8_TILE)),
    *(case(f"experts scaled instructions {t} {act}", experts(t, 2, 4, d, i, precise(act), act), "mi355x", tokens)
      for t, d, i, tokens, act in [
          (5, 128, 128, 16, FP8_ACTIVATION), (1, 256, 256, 1, FP8_ACTIVATION), (4, 128, 128, 16, FP4_ACTIVATION),
          (3, 96, 160, 16, FP8_ACTIVATION), (1, 96, 160, 1, FP4_ACTIVATION), (3, 128, 128, 16, FP8_CHANNEL),
          (34, 128, 128, 100, FP8_ACTIVATION)]),
    *(case(f"experts scaled instructions {t} {weight}", experts(t, 2, 4, d, i, BF16, weight=weight), "mi355x", t)
      for t, d, i, weight in [(5, 256, 128, FP8_TILE), (3, 96, 160, Layout.parse("e4m3:32x128:e8m0"))]),
    case("experts scaled instructions b200", experts(7, 2, 4, 128, 256, BF16), "b200"),
    # Triton compiles the FNUZ dialect for AMD only; the interpreter knows both.
    *(case(f"experts fnuz {t} {weight}", experts(t, 2, 4, d, i, BF16, fnuz(FP8_ACTIVATION), weight), "mi300x", tokens)
      for t, d, i, tokens, weight in [
          (5, 128, 128, 16, MXFP4), (1, 128, 256, 1, MXFP4), (3, 96, 160, 16, MXFP4), (5, 128, 128, 16, fnuz(FP8_TILE)),
          (34, 128, 128, 90, MXFP4)]
      if INTERPRETED),
    *(case("experts fnuz MXFP4 activations", experts(4, 2, 4, 128, 128, BF16, FP4_ACTIVATION), "mi300x", t)
      for t in [16] if INTERPRETED),
    # Many tokens on sm_90: scales inside of e4m3 (`moe_hopper`; the interpreter has the other kernels).
    *(case(f"experts folded {dtype}", experts(260, 2, 6, 512, 512, dtype), tokens=300, slow=slow)
      for dtype, slow in ((BF16, False), (F32, True))),
    case("experts folded one expert", experts(300, 3, 4, 512, 512, BF16, kind="same"), tokens=300, slow=True),
    case("experts folded hot expert", experts(500, 2, 8, 1024, 512, BF16, kind="one"), tokens=512, slow=True),
    case("experts folded huge", experts(200, 2, 4, 512, 512, BF16, size=1e4), tokens=200, slow=True),
    case("experts folded tiny", experts(200, 2, 4, 512, 512, BF16, size=1e-6), tokens=200, slow=True),
    case("experts folded with NaN", experts(200, 2, 4, 512, 512, BF16, spoil=True), tokens=200, slow=True),
    *(case(f"experts folded {counts} rows", rows_each(experts(sum(counts), 1, len(counts), 512, 512, BF16), counts),
           tokens=sum(counts), slow=True)
      for counts in ([1, 63, 64, 65, 127, 0, 128], [96, 97, 0, 129, 33, 32, 31, 193], [0, 0, 200, 0])),
    *(case(f"experts folded scales 2^{spread} apart", apart(experts(200, 2, 4, 1024, 512, BF16), spread, least),
           tokens=200, slow=True)
      for spread, least in ((11, 112), (12, 112), (13, 110), (23, 100), (24, 100), (40, 85))),
    case("experts folded zero scales", apart(experts(200, 2, 4, 512, 512, BF16), 8, 114, zeros=True), tokens=200,
         slow=True),
    case("experts folded zero scales far apart", apart(experts(200, 2, 4, 512, 512, BF16), 30, 95, zeros=True),
         tokens=200, slow=True),
    case("experts folded NaN scales", apart(experts(200, 2, 4, 512, 512, BF16), 20, 105, zeros=True, spoil=True),
         tokens=200, slow=True),
    # What the static model does not choose: steps of two blocks, more parts of the columns, one warp for a few rows.
    finer("two blocks", experts(5, 2, 4, 512, 256, BF16), Part(64, 4, 3, 2, 2), Part(64, 4, 3, 1, 2)),
    finer("two blocks, MXFP4", experts(3, 2, 4, 256, 512, BF16, FP4_ACTIVATION), Part(64, 4, 3, 1, 2),
          Part(128, 4, 3, 1, 2)),
    finer("two blocks, three do not pair", experts(3, 2, 4, 384, 128, F32), Part(64, 4, 4, 3, 2), Part(64, 4, 4, 1, 2)),
    finer("parts of uneven length", experts(2, 3, 5, 640, 128, BF16), Part(64, 2, 4, 4), Part(64, 2, 4)),
    finer("a warp", experts(4, 2, 4, 256, 256, BF16), Part(32, 1, 4, 2), Part(16, 1, 4), bm=8),
    finer("two blocks with NaN", broken_scale(experts(9, 2, 4, 256, 256, BF16)), Part(64, 2, 3, 1, 2),
          Part(64, 2, 3, 1, 2)),
    *(finer("fnuz", experts(3, 2, 4, 256, 256, BF16, fnuz(FP8_ACTIVATION)), Part(64, 4, 2, 1, 2),
            Part(64, 4, 2, 1, 2), "mi300x") for _ in range(INTERPRETED)),
    finer("flash", experts(16, 6, 64, 4096, 2048, BF16), Part(64, 4, 4, 4, 2), Part(64, 4, 4, 1, 2), slow=True),
    # Realistic sizes.
    *(case(f"experts flash {t} {weight!s}", experts(t, 6, 64, 4096, 2048, BF16, weight=weight), tokens=t, slow=True)
      for t, weight in [(1, MXFP4), (16, MXFP4), (64, MXFP4), (1000, MXFP4), (16, FP8_TILE), (1000, FP8_TILE)]),
    case("experts folded pro", experts(500, 6, 24, 7168, 3072, BF16), tokens=500, slow=True),
    case("experts pro 64", experts(64, 6, 32, 7168, 3072, BF16), tokens=64, slow=True),
    case("experts flash 16 MXFP4 activations", experts(16, 6, 32, 4096, 2048, BF16, FP4_ACTIVATION), tokens=16,
         slow=True),
]  # fmt: skip


# -- clamped SwiGLU ----------------------------------------------------------------------------------------------------


def merged(host: Callable[..., Any]) -> Callable[..., Any]:
    """The host function given gate and up as columns of one product, as a plan with a merged projection does."""

    def run(device: Device, gate: Tensor, up: Tensor, *rest: Any) -> Any:
        both = torch.cat((gate, up), dim=-1)
        return host(device, both[..., : gate.shape[-1]], both[..., gate.shape[-1] :], *rest)

    return run


def gates(t: int, i: int, dtype: torch.dtype, *layout: str, size: float = 6.0) -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        gate, up = torch.randn(t, i) * size, torch.randn(t, i) * size
        gate[1::3, ::5], up[2::3] = -1e4, 0
        gate[:, 1::7] = 1e4
        if t > 4:
            up[3, 2], gate[4, 0] = torch.nan, torch.inf
        return [gate.to(dtype), up.to(dtype), LIMIT, *layout]

    return make


FNUZ = str(FP8_ACTIVATION.fnuz())
LAYOUTS = [str(FP8_ACTIVATION), str(FP4_ACTIVATION), str(FP8_CHANNEL)] + [FNUZ] * INTERPRETED
CASES += [
    *(Case(f"swiglu {t}x{i} {str(dtype)[6:]}", "swiglu", merged(swiglu.swiglu), gates(t, i, dtype))
      for t, i in [(1, 2048), (6, 22), (3, 1100)] for dtype in DTYPES),
    *(Case(f"swiglu_quant {t}x{i} {str(dtype)[6:]} {layout}", "swiglu_quant", merged(swiglu.swiglu_quant),
           gates(t, i, dtype, layout), layouts=[layout])
      for t, i in [(1, 1024), (6, 200)] for dtype in DTYPES for layout in LAYOUTS),
]  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pair(shape: tuple[int, ...], layout: Layout) -> tuple[Tensor, Tensor]:
    codes = meta(*layout.code_shape(shape), dtype=layout.element.storage)
    return codes, meta(*layout.scale_shape(shape), dtype=layout.scale_dtype)


def _experts(device: Device) -> None:
    t = device.tokens
    here = fnuz if device.target.fp8 == "fnuz" else lambda layout: layout
    for e, d, i in [(256, 4096, 2048), (384, 7168, 3072)]:
        schemes = [
            (FP8_ACTIVATION, MXFP4),
            (FP4_ACTIVATION, MXFP4),
            (FP8_ACTIVATION, FP8_TILE),
            (FP8_CHANNEL, FP8_CHANNEL),
        ]
        for act, weight in schemes:
            act, weight = here(act), here(weight)
            w13, w2 = pair((e, 2 * i, d), weight), pair((e, d, i), weight)
            indices, weights = meta(t, 6, dtype=torch.int64), meta(t, 6, dtype=F32)
            layouts = [str(part) for part in (act, act, weight, weight)]
            arguments: list[Any] = [*pair((t, d), act), *w13, *w2, indices, weights, LIMIT, *layouts, BF16]
            moe.scaled_moe_experts(device, *arguments)


def _swiglu(device: Device) -> None:
    t = device.tokens
    for i in (2048, 3072):
        both = meta(t, 2 * i)
        swiglu.swiglu(device, both[:, :i], both[:, i:], LIMIT)
        for layout in (FP8_ACTIVATION, FP8_CHANNEL):
            here = layout.fnuz() if device.target.fp8 == "fnuz" else layout
            swiglu.swiglu_quant(device, both[:, :i], both[:, i:], LIMIT, str(here))


AOT = [(f"{name} {tokens}", call) for name, call in (("experts", _experts), ("swiglu", _swiglu))
       for tokens in (1, 16, 64, 8192)]  # fmt: skip
