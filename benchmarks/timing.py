"""How long a call takes on a GPU: replays of a CUDA graph, or calls as they are; and what the device can do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROTATED = 256 << 20  # bytes of inputs that are cycled through, so that none is found in a cache
SPARE = 8 << 30  # bytes that torch may hold unused
Call = Callable[[], Any]


def copies(size: float) -> int:
    """How many sets of inputs are rotated."""
    return max(2, min(24, int(ROTATED // max(size, 1)) + 1))


def captured(run: Call, errors: str = "global") -> torch.cuda.CUDAGraph:
    """A graph of what `run` issues, after it ran once on another stream; `errors`: torch's `capture_error_mode`."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode=errors):
        run()
    return graph


def replayed(calls: list[Call], repeats: int = 7) -> float:
    """Median seconds of one call, of graph replays of all calls one after the other."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()

    def run() -> None:
        for call in calls:
            call()

    graph = captured(run)
    times = [_event_seconds(graph.replay) / len(calls) for _ in range(repeats + 2)]
    return statistics.median(times[2:])


def called(call: Call, repeats: int = 7, most: float = 1.0) -> float:
    """Median seconds of a call without a graph: launches, and what the host waits for, count. Stops after `most` s."""
    call()
    torch.cuda.synchronize()
    start, times = time.perf_counter(), []
    while len(times) < repeats and (not times or time.perf_counter() - start < most):
        times.append(_event_seconds(call))
    return statistics.median(times)


def trim() -> None:
    """Give back what torch holds and does not use, where that is much."""
    if torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > SPARE:
        torch.cuda.empty_cache()


def still_works() -> bool:
    """Whether the device answers after an error: a failed capture leaves it as it was, a bad address does not."""
    try:
        torch.cuda.synchronize()
    except torch.AcceleratorError:
        return False
    return True


def _event_seconds(call: Call) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def bandwidths() -> dict[str, float]:
    """Bytes/s by each way of moving many: copies count what they read and what they write."""
    return {name: rate for gib in (1, 2, 4) for name, rate in _ways(gib).items()}


def _ways(gib: int) -> dict[str, float]:
    source = torch.empty(gib << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    wide, out = source.view(torch.int32), target.view(torch.int32)
    size = float(source.numel())
    return {
        f"copy_ of {gib} GiB": 2 * size / replayed([lambda: target.copy_(source)] * 2),
        f"add of {gib} GiB": 2 * size / replayed([lambda: torch.add(wide, 1, out=out)] * 2),
        f"read of {gib} GiB": size / replayed([lambda: _read(source)] * 2),
    }


def _read(source: Tensor) -> Tensor:
    """Reads all and writes next to nothing."""
    return source.view(torch.int32).view(-1, 1 << 14).amax(1)


def ceilings() -> dict[str, Any]:
    """`copy` (bytes/s, the best of `bandwidths`; `copy_by`: which); `bf16`, `fp8` (FLOP/s of the library); now."""
    ways = bandwidths()
    torch.cuda.empty_cache()
    best = max(ways, key=ways.__getitem__)
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bf16 = 2 * n**3 / replayed([lambda: torch.mm(a, b)] * 3)
    qa, qb = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
    one, given = torch.ones((), device="cuda"), {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    fp8 = 2 * n**3 / replayed([lambda: torch._scaled_mm(qa, qb, scale_a=one, scale_b=one, **given)] * 3)
    return {"copy": ways[best], "copy_by": best, "bandwidths": ways, "bf16": bf16, "fp8": fp8}


def told(best: dict[str, Any]) -> str:
    """The ceilings as a line of text."""
    ways = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in best["bandwidths"].items())
    return (f"{torch.cuda.get_device_name()}: {best['copy'] / 1e12:.2f} TB/s by {best['copy_by']} (of: {ways}); "
            f"bf16 {best['bf16'] / 1e12:.0f}, FP8 {best['fp8'] / 1e12:.0f} TFLOP/s")  # fmt: skip
