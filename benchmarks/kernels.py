"""Kernels on a GPU: time, bytes, FLOPs and share of the ceilings of the same run: `python benchmarks/kernels.py`.

Each operator's host function runs at V4-Flash shapes; times are medians of CUDA-graph replays over inputs that rotate
past the L2 cache. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomc.codegen.device import TorchDevice
from atomc.formats import FP8_ACTIVATION, FP8_TILE, MXFP4, Layout
from atomc.targets import get_target

ROTATED = 256 << 20  # bytes of inputs that are cycled through, so that none is found in a cache
CUDA = "cuda"


class Device(TorchDevice):
    """Allocates without poison: that would be timed too."""

    def empty(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)


@dataclass
class Row:
    """One measurement; seconds, bytes and operations of a call."""

    name: str
    seconds: float
    bytes: float
    flops: float
    peer: float | None = None  # seconds of the library's kernel


def timed(calls: list[Callable[[], Any]], repeats: int = 7) -> float:
    """Median seconds of one call, of graph replays of all calls one after the other."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / len(calls))
    return statistics.median(times[2:])


def copies(size: float) -> int:
    """How many sets of inputs are rotated."""
    return max(2, min(24, int(ROTATED // max(size, 1)) + 1))


def random_codes(shape: tuple[int, ...], layout: Layout) -> tuple[Tensor, Tensor]:
    """Random codes and plausible scales, made on the device."""
    stored = layout.code_shape(shape)
    if layout.element.bits == 4:
        codes = torch.randint(-128, 128, stored, dtype=torch.int8, device=CUDA)
    else:
        codes = (torch.randn(stored, device=CUDA) * 40).clamp(-440, 440).to(layout.element.storage)
    scales = torch.randint(115, 123, layout.scale_shape(shape), dtype=torch.uint8, device=CUDA)
    return codes, scales.view(torch.float8_e8m0fnu)


def ceilings() -> dict[str, float]:
    """Copy (bytes/s, read and write), bf16 and FP8 matrix products (FLOP/s) of the library, on this device, now."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=CUDA).random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / timed([lambda: target.copy_(source)] * 4)
    n = 8192
    a, b = (torch.randn(n, n, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    bf16 = 2 * n**3 / timed([lambda: torch.mm(a, b)] * 3)
    qa, qb = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
    one = torch.ones((), device=CUDA)
    fp8 = (
        2
        * n**3
        / timed(
            [lambda: torch._scaled_mm(qa, qb, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)]
            * 3
        )
    )
    return {"copy": copy, "bf16": bf16, "fp8": fp8}


def linears(target: Any) -> list[Row]:
    """FP8 linears of V4-Flash: wq_a|wkv, wq_b, wo_b, shared w1|w3, shared w2."""
    from atomc.codegen.kernels.scaled_gemm import scaled_linear

    rows = []
    for m in (1, 16, 64, 4096, 8192):
        for name, n, k in (("wq_a|wkv", 1536, 4096), ("wq_b", 32768, 1024), ("wo_b", 4096, 8192),
                           ("w1|w3", 4096, 4096), ("w2", 4096, 2048), ("square", 8192, 8192)):  # fmt: skip
            if (name == "square") != (m == 8192):
                continue
            size = m * k + n * k + 2.0 * m * n
            device, calls = Device(target, m, CUDA), []
            for _ in range(copies(size)):
                x, w = random_codes((m, k), FP8_ACTIVATION), random_codes((n, k), FP8_TILE)
                calls.append(
                    lambda x=x, w=w, device=device: scaled_linear(
                        device, *x, *w, str(FP8_ACTIVATION), str(FP8_TILE), torch.bfloat16
                    )
                )
            rows.append(Row(f"scaled_linear {name} {n}x{k}, M={m}", timed(calls), size, 2.0 * m * n * k))
    return rows


def experts(target: Any) -> list[Row]:
    """Routed experts of V4-Flash: 256 of 4096 -> 2048 -> 4096, top 6, FP4 weights."""
    from atomc.codegen.kernels.moe import scaled_moe_experts

    e, d, i, k = 256, 4096, 2048, 6
    w13, w2 = random_codes((e, 2 * i, d), MXFP4), random_codes((e, d, i), MXFP4)
    rows = []
    for m in (1, 16, 64, 4096, 8192):
        device, calls, hit = Device(target, m, CUDA), [], 0.0
        for _ in range(3 if m < 1024 else 1):
            x = random_codes((m, d), FP8_ACTIVATION)
            indices = torch.rand(m, e, device=CUDA).topk(k, dim=-1).indices
            weights = torch.rand(m, k, device=CUDA)
            hit += indices.unique().numel()
            calls.append(
                lambda x=x, indices=indices, weights=weights, device=device: scaled_moe_experts(
                    device,
                    *x,
                    *w13,
                    *w2,
                    indices,
                    weights,
                    10.0,
                    str(FP8_ACTIVATION),
                    str(FP8_ACTIVATION),
                    str(MXFP4),
                    str(MXFP4),
                    torch.bfloat16,
                )
            )
        hit /= len(calls)
        size = hit * 3 * i * d * 17 / 32 + 6 * m * d
        rows.append(Row(f"scaled_moe_experts M={m}, {hit:.0f} experts", timed(calls), size, 6.0 * m * k * i * d))
    return rows


FAMILIES: dict[str, Callable[[Any], list[Row]]] = {"linears": linears, "experts": experts}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels.json"))
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    options = parser.parse_args()
    target = get_target("h200" if "H200" in torch.cuda.get_device_name() else "h100")
    best = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {best['copy'] / 1e12:.2f} TB/s, bf16 {best['bf16'] / 1e12:.0f}, "
          f"FP8 {best['fp8'] / 1e12:.0f} TFLOP/s")  # fmt: skip
    rows: list[Row] = []
    for family in options.families or FAMILIES:
        try:
            found = FAMILIES[family](target)
        except Exception as error:  # noqa: BLE001  the others are worth measuring all the same
            print(f"{family}: {type(error).__name__}: {error}")
            continue
        for row in found:
            print(f"{row.name:52} {row.seconds * 1e6:9.1f} us  {row.bytes / row.seconds / 1e12:5.2f} TB/s "
                  f"({row.bytes / row.seconds / best['copy']:4.0%})  {row.flops / row.seconds / 1e12:6.0f} TFLOP/s "
                  f"({row.flops / row.seconds / best['fp8']:4.0%} of FP8)", flush=True)  # fmt: skip
        rows += found
    facts = {"command": " ".join(sys.argv), "device": torch.cuda.get_device_name(), "torch": torch.__version__,
             "ceilings": best, "rows": [asdict(row) for row in rows]}  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
