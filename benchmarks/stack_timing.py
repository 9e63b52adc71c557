"""Rows of the benchmarks of layer stacks, and how a step is timed: on the device, and on the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from stack_roofline import least


@dataclass
class Row:
    """One measurement of a stack.

    Attributes:
        who: what ran. step: `decode` or `prefill`. requests, context: of a decode step. tokens, chunks: of a prompt.
        device_s, wall_s: medians. replay_s: of a decode step's graph alone, one after the other. bytes, flops: what the
            step must touch and compute, in the formats of the stack.
        floor_s: the least time, by the rates measured in the same run; `share_of_floor` of the replay's or the
            device's time, and `share_of_copy` the bytes' part alone. compile_s: before the first step. reason: why it
            was not measured.
    """

    who: str
    step: str
    requests: int = 1
    context: int | None = None
    tokens: int | None = None
    chunks: int | None = None
    device_s: float | None = None
    wall_s: float | None = None
    replay_s: float | None = None
    bytes: float | None = None
    flops: dict[str, float] | None = None
    floor_s: float | None = None
    share_of_floor: float | None = None
    share_of_copy: float | None = None
    compile_s: float | None = None
    reason: str | None = None

    def known(self) -> dict[str, Any]:
        """What is known of it."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def compare(self, best: dict[str, Any]) -> None:
        """With the least time at the rates `best`: of copies, of matrix products."""
        if self.bytes is not None and self.flops is not None and self.device_s is not None:
            self.floor_s = least(self.bytes, self.flops, best)
            seconds = self.replay_s or self.device_s
            self.share_of_floor = self.floor_s / seconds
            self.share_of_copy = self.bytes / best["copy"] / seconds


def stepped(
    step: Callable[[], Any], repeat: int, device: str = "cuda", before: Callable[[], None] = lambda: None,
    most: float = 8.0,
) -> dict[str, float]:  # fmt: skip
    """Median seconds of a step on the device and on the clock; `before` runs before each, untimed; `most` s in all.

    Two steps go before, and more until 0.3 s are over: an idle GPU runs at a fraction of its clock.
    """
    cuda = device == "cuda"
    began, on_device, on_clock = time.perf_counter(), [], []
    warm = 2
    while len(on_clock) < repeat + warm and (len(on_clock) <= warm or time.perf_counter() - began < most):
        if len(on_clock) >= warm and time.perf_counter() - began < 0.3 and warm < 1000:
            warm = len(on_clock) + 1
        before()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        if cuda:
            events[0].record()
        step()
        if cuda:
            events[1].record()
            torch.cuda.synchronize()
        on_clock.append(time.perf_counter() - start)
        on_device.append(events[0].elapsed_time(events[1]) / 1e3 if cuda else on_clock[-1])
    return {"device_s": statistics.median(on_device[warm:]), "wall_s": statistics.median(on_clock[warm:])}


def replayed(graph: Callable[[], Any], count: int = 50) -> float:
    """Seconds of one of `count` replays that follow one another."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    graph()
    events[0].record()
    for _ in range(count):
        graph()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3 / count


def why(error: BaseException) -> str:
    """An error in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:5])[:400]}"


def attempt(
    row: Row, step: Callable[[], Any], repeat: int, device: str, before: Callable[[], None] = lambda: None
) -> Row:
    """The row with its times, or with the reason why there are none: memory, most often."""
    try:
        times = stepped(step, repeat, device, before)
    except (RuntimeError, TypeError, ValueError) as error:
        row.reason = why(error)
        return row
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()
    row.device_s, row.wall_s = times["device_s"], times["wall_s"]
    return row
