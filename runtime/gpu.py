"""Steps on a GPU: kernels of the artifact, launched into memory that the plan has placed; torch's own for the rest.

Contract:
    Results and scratch of a launched step are views of one arena, at the offsets of the plan. A value that passes
    between regions has two buffers, written in turns: a call may read the old value while it writes the new one.
    Nothing is compiled, and a launched step allocates nothing on the device.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from atomc.artifact.expr import evaluate, parse
from atomc.artifact.kernels import read_kernels
from atomc.artifact.plan import DTYPE_BYTES, Bucket, Launch, RegionPlan, SlotInfo, Step
from atomc.runtime.bind import Environment, Getter, Sizes, getter_of
from atomc.runtime.launcher import Kernel, LaunchError, load_kernel


class Gpu:
    """A device with an artifact's kernels loaded, and the arena that its regions share."""

    def __init__(self, folder: Path, arena_bytes: int, device: int = 0) -> None:
        self.index, self.device = device, torch.device("cuda", device)
        self.arena = torch.empty(max(arena_bytes, 1), dtype=torch.uint8, device=self.device)
        self.kernels: dict[str, Kernel] = {
            key: load_kernel(folder / "kernels" / f"{key}.bin", facts, device)
            for key, facts in read_kernels(folder).items()
        }

    def stream(self) -> int:
        """The handle of the stream that steps run on."""
        handle: int = torch.cuda.current_stream(self.device).cuda_stream
        return handle


class Values:
    """The buffers of values that pass between regions. Calls take theirs in the order in which they run."""

    def __init__(self, bounds: Mapping[str, int], device: torch.device) -> None:
        self.bounds, self.device = bounds, device
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._writes: Counter[str] = Counter()

    def take(self, name: str, info: SlotInfo) -> Tensor:
        """Bytes for a value that a call writes: not those where the value is that it may read."""
        count = math.prod(evaluate(n, self.bounds) for n in info.shape)
        size, place = count * DTYPE_BYTES[info.dtype], (name, self._writes[name] % 2)
        self._writes[name] += 1
        if place not in self._buffers or self._buffers[place].numel() < size:
            self._buffers[place] = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
        return self._buffers[place]


class Memory:
    """Where one slot lives: at its offset in the arena, or at the front of a buffer of its own."""

    def __init__(self, info: SlotInfo, gpu: Gpu, buffer: Tensor | None = None) -> None:
        if buffer is None and info.offset is None:
            raise LaunchError(f"{info.name} is made by a kernel, and the plan gives it no memory. Compile it again.")
        self.buffer, self.offset = (gpu.arena, info.offset or 0) if buffer is None else (buffer, 0)
        self.dtype: torch.dtype = getattr(torch, info.dtype)
        self.shape = [parse(s) if isinstance(s, str) else s for s in info.shape]

    def tensor(self, sizes: Sizes) -> Tensor:
        """Uninitialised memory of the slot's shape."""
        shape = [s if isinstance(s, int) else s(sizes) for s in self.shape]
        size = math.prod(shape) * self.dtype.itemsize
        return self.buffer[self.offset : self.offset + size].view(self.dtype).view(shape)


class BoundLaunch:
    """One launch: its kernel, grid and arguments as functions of the environment and the sizes."""

    def __init__(self, launch: Launch, gpu: Gpu) -> None:
        self.kernel = gpu.kernels[launch.kernel]
        self.grid = [parse(g) if isinstance(g, str) else g for g in launch.grid]
        self.arguments: list[Getter] = [getter_of(a) for a in launch.args]

    def run(self, env: Environment, sizes: Sizes, stream: int) -> None:
        """Launch it; an empty grid has nothing to do."""
        grid = [g if isinstance(g, int) else g(sizes) for g in self.grid]
        if all(grid):
            self.kernel.launch(grid, [get(env, sizes) for get in self.arguments], stream)


class LaunchStep:
    """A step of the plan that kernels compute."""

    def __init__(self, step: Step, plan: RegionPlan, gpu: Gpu, buffers: Mapping[int, Tensor]) -> None:
        self.gpu, self.release = gpu, step.release
        self.outputs = [
            (slot, Memory(plan.slots[slot], gpu, buffers.get(slot))) for slot in step.outputs if slot is not None
        ]
        self.buckets = [self._bucket(bucket, plan) for bucket in step.buckets]

    def _bucket(self, bucket: Bucket, plan: RegionPlan) -> tuple[int, list[tuple[int, Memory]], list[BoundLaunch]]:
        scratch = [(slot, Memory(plan.slots[slot], self.gpu)) for slot in bucket.scratch]
        return bucket.tokens, scratch, [BoundLaunch(launch, self.gpu) for launch in bucket.launches]

    def run(self, env: Environment, sizes: Sizes) -> None:
        """Launch the bucket of the step's tokens."""
        _, scratch, launches = next(b for b in self.buckets if sizes["T"] <= b[0])
        for slot, memory in (*self.outputs, *scratch):
            env[slot] = memory.tensor(sizes)
        stream = self.gpu.stream()
        for launch in launches:
            launch.run(env, sizes, stream)


def on_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors moved to a device, one after the other."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}
