"""Steps on a GPU: kernels of the artifact, launched into memory that the plan has placed; torch's own for the rest.

Contract:
    Results and scratch of a launched step are views of one arena, at the offsets of the plan. A value that passes
    between regions has two buffers, written in turns: a call may read the old value while it writes the new one.
    Nothing is compiled, and a launched step allocates nothing on the device.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from atomc.artifact.expr import evaluate, parse
from atomc.artifact.kernels import read_kernels
from atomc.artifact.order import STREAMS
from atomc.artifact.plan import DTYPE_BYTES, Bucket, Launch, LibraryCall, RegionPlan, SlotInfo
from atomc.ops.library import CALLS, missing
from atomc.runtime.bind import Environment, Getter, Sizes, getter_of
from atomc.runtime.launcher import Kernel, LaunchError, load_kernel
from atomc.runtime.streams import Streams

LOG: Final = logging.getLogger(__name__)


class Gpu:
    """A device with an artifact's kernels loaded, and the arena that its regions share."""

    def __init__(self, folder: Path, arena_bytes: int, device: int | None = None) -> None:
        device = torch.cuda.current_device() if device is None else device
        self.index, self.device = device, torch.device("cuda", device)
        self.arena = torch.empty(max(arena_bytes, 1), dtype=torch.uint8, device=self.device)
        self._missing: dict[str, str] = {}
        self.kernels: dict[str, Kernel] = {
            key: load_kernel(folder / "kernels" / f"{key}.bin", facts, device)
            for key, facts in read_kernels(folder).items()
        }
        self.side = [torch.cuda.Stream(self.device) for _ in range(STREAMS - 1)]
        self.streams: Streams | None = None  # of the capture that goes on

    def synchronize(self) -> None:
        """Wait for what has been launched. Raises `RuntimeError` if a kernel failed."""
        torch.cuda.synchronize(self.device)

    def missing(self, call: str) -> str:
        """Why a library's call cannot be made here; empty: it can. Tried once."""
        if call not in self._missing:
            self._missing[call] = missing(call, self.device)
            if why := self._missing[call]:
                LOG.warning("This torch has no %s for this device (%s): the artifact's own kernels run.", call, why)
        return self._missing[call]

    @contextmanager
    def on_streams(self, aside: bool, dependent: bool) -> Iterator[None]:
        """While a capture goes on in it, launches go to the plan's streams; `aside`: not to the main one alone.

        `dependent`: launches that can begin before the one before them ends.
        """
        if torch.cuda.is_current_stream_capturing():
            main = torch.cuda.current_stream(self.device)
            self.streams = Streams(main, self.side if aside else [], dependent)
        try:
            yield
        finally:
            self.streams = None

    def join(self) -> None:
        """All launches of a region are made."""
        if self.streams is not None:
            self.streams.join()


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
        buffer, offset = (gpu.arena, info.offset or 0) if buffer is None else (buffer, 0)
        dtype: torch.dtype = getattr(torch, info.dtype)
        whole = (buffer.numel() - offset) // dtype.itemsize * dtype.itemsize
        self.base = buffer[offset : offset + whole].view(dtype)
        self.shape = [parse(s) if isinstance(s, str) else s for s in info.shape]

    def tensor(self, sizes: Sizes) -> Tensor:
        """Uninitialised memory of the slot's shape."""
        shape = [s if isinstance(s, int) else s(sizes) for s in self.shape]
        strides, stride = [0] * len(shape), 1
        for dim in range(len(shape) - 1, -1, -1):
            strides[dim] = stride
            stride *= shape[dim]
        return self.base.as_strided(shape, strides)  # one call: a step makes hundreds of these


class BoundLaunch:
    """One launch: its kernel, grid and arguments as functions of the environment and the sizes."""

    def __init__(self, launch: Launch, gpu: Gpu) -> None:
        self.kernel = gpu.kernels[launch.kernel]
        self.grid = [parse(g) if isinstance(g, str) else g for g in launch.grid]
        self.arguments: list[Getter] = [getter_of(a) for a in launch.args]

    def run(self, env: Environment, sizes: Sizes, stream: int, dependent: Callable[[], bool] = bool) -> None:
        """Launch it; an empty grid has nothing to do. `dependent` is asked at a launch, whether it may be so."""
        grid = [g if isinstance(g, int) else g(sizes) for g in self.grid]
        if all(grid):
            self.kernel.launch(grid, [get(env, sizes) for get in self.arguments], stream, dependent())


class BoundLibrary:
    """A call of a library with the launches before it, on the current stream."""

    def __init__(self, call: LibraryCall, gpu: Gpu) -> None:
        self.call, self.launches = CALLS[call.name], [BoundLaunch(launch, gpu) for launch in call.launches]
        self.arguments = [getter_of(a) for a in call.args]

    def fits(self, env: Environment, sizes: Sizes) -> bool:
        """Whether the library takes so many rows."""
        return self.call.fits(self.arguments[0](env, sizes))

    def run(self, env: Environment, sizes: Sizes, stream: int) -> None:
        """Launch what goes before it, and make it."""
        for launch in self.launches:
            launch.run(env, sizes, stream)
        self.call.run(*[get(env, sizes) for get in self.arguments])


@dataclass(frozen=True)
class BoundBucket:
    """How a step of at most `tokens` tokens runs: by the library where it can, else by launches of its own."""

    tokens: int
    scratch: list[tuple[int, Memory]]
    launches: list[BoundLaunch]
    library: BoundLibrary | None

    def run(self, env: Environment, sizes: Sizes, stream: int, dependent: Callable[[], bool] = bool) -> bool:
        """Run it; its results and scratch are in place. Whether its last launch was one of its own."""
        if self.library is not None and self.library.fits(env, sizes):
            self.library.run(env, sizes, stream)
            return False
        for launch in self.launches:
            launch.run(env, sizes, stream, dependent)
        return True


class LaunchStep:
    """Step `at` of a region's plan, which kernels compute."""

    def __init__(self, at: int, plan: RegionPlan, gpu: Gpu, buffers: Mapping[int, Tensor]) -> None:
        step = plan.steps[at]
        self.gpu, self.release = gpu, step.release
        self.at, self.stream, self.waits = at, step.stream, step.waits
        self.awaited = any(at in other.waits for other in plan.steps)
        self.outputs = [
            (slot, Memory(plan.slots[slot], gpu, buffers.get(slot))) for slot in step.outputs if slot is not None
        ]
        self.buckets = [self._bucket(bucket, plan) for bucket in step.buckets]

    def _bucket(self, bucket: Bucket, plan: RegionPlan) -> BoundBucket:
        scratch = [(slot, Memory(plan.slots[slot], self.gpu)) for slot in bucket.scratch]
        library = None
        if bucket.library is not None and not self.gpu.missing(bucket.library.name):
            library = BoundLibrary(bucket.library, self.gpu)
        return BoundBucket(bucket.tokens, scratch, [BoundLaunch(x, self.gpu) for x in bucket.launches], library)

    def run(self, env: Environment, sizes: Sizes) -> None:
        """Launch the bucket of the step's tokens."""
        bucket = next(b for b in self.buckets if sizes["T"] <= b.tokens)
        for slot, memory in (*self.outputs, *bucket.scratch):
            env[slot] = memory.tensor(sizes)
        streams = self.gpu.streams
        if streams is None:
            bucket.run(env, sizes, torch.cuda.current_stream(self.gpu.device).cuda_stream)
            return
        handle = streams.enter(self.stream, self.waits).cuda_stream
        if not bucket.run(env, sizes, handle, partial(streams.launch, self.stream)):
            streams.foreign(self.stream)
        if self.awaited:
            streams.leave(self.at, self.stream)


def on_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors moved to a device, one after the other."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}
