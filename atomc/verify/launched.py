"""A step that kernels of an artifact compute, apart from its run: how to launch it again, on other arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from atomc.artifact.buffers import slot_bytes
from atomc.artifact.expr import evaluate
from atomc.artifact.plan import Arg, RegionPlan, Slot, SlotInfo, Step, slots_in
from atomc.runtime import gpu as device
from atomc.runtime.bind import Environment, Sizes
from atomc.runtime.loader import device_arch
from atomc.targets import get_target
from atomc.verify.errors import VerifyError


def moved(value: Any, device: torch.device | str, stride: Sequence[int] = ()) -> Any:
    """A copy on a device, with the strides that kernels are told of; also in lists. What is no tensor: as it is.

    Args:
        stride: to have; none: the tensor's own.
    """
    if isinstance(value, list):
        return [moved(v, device) for v in value]
    if not isinstance(value, Tensor):
        return value
    stride = stride or value.stride()
    if 0 in stride:  # expanded: several elements in one place
        stride = torch.empty(value.shape, device="meta").stride()
    copy = torch.empty_strided(value.shape, stride, dtype=value.dtype, device=device)
    if value.dtype.itemsize == 1:
        as_bytes(copy).copy_(as_bytes(value))  # not every device copies every 8-bit float
    else:
        copy.copy_(value)
    return copy


def device_of(values: Iterable[Any]) -> torch.device:
    """Where tensors are, those of lists too; the CPU where there are none."""
    tensors = (v for value in values for v in (value if isinstance(value, (list, tuple)) else (value,)))
    return next((v.device for v in tensors if isinstance(v, Tensor)), torch.device("cpu"))


def as_bytes(x: Tensor) -> Tensor:
    """The bits of a tensor: of numbers of one byte in its shape, of others flat."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x.reshape(-1).view(torch.uint8)


@dataclass(frozen=True)
class Launched:
    """How a step is launched.

    Attributes:
        target: of the artifact. folder: that has its `kernels`. plan: a region of this step alone, with all slots.
        given: the step's arguments as the plan has them, by name. sizes: of the run.
        gpu: the device with the kernels loaded; None: loaded when it is needed.
    """

    target: str
    folder: Path
    plan: RegionPlan
    given: dict[str, Arg]
    sizes: Sizes
    gpu: device.Gpu | None = None

    @property
    def step(self) -> Step:
        """The step."""
        return self.plan.steps[0]

    def kernels(self) -> set[str]:
        """The keys of the kernels that it may launch, before a library's call too."""
        buckets = self.step.buckets
        launches = [launch for b in buckets for launch in (*b.launches, *(b.library.launches if b.library else ()))]
        return {launch.kernel for launch in launches}

    def run(self, arguments: dict[str, Any], written: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """Launch it: its results, and what it has made of the arguments that it writes; where the arguments are.

        Raises:
            VerifyError: this machine has no such device.
        """
        gpu = self._loaded()
        env: Environment = [None] * len(self.plan.slots)
        for slot, value in self._placed(arguments):
            env[slot] = moved(value, gpu.device)
        sizes, home = self._sizes(arguments), device_of(arguments.values())
        device.LaunchStep(0, self.plan, gpu, self._buffers(gpu, sizes)).run(env, sizes)
        results = tuple(None if slot is None else moved(env[slot], home) for slot in self.step.outputs)
        slots = {n: next(slots_in(self.given[n])) for n in written if isinstance(arguments.get(n), Tensor)}
        return results, {name: moved(env[slot], home) for name, slot in slots.items()}

    def _loaded(self) -> device.Gpu:
        if self.gpu is not None:
            return self.gpu
        arch, found = get_target(self.target).arch, device_arch()
        if arch != found:
            here = f"has {found}" if found else "has no GPU"
            raise VerifyError(f"The step is compiled for {self.target} ({arch}), and this machine {here}.")
        return device.Gpu(self.folder, self.plan.arena_bytes)

    def _buffers(self, gpu: device.Gpu, sizes: Sizes) -> dict[int, Tensor]:
        """Memory of results that are values of the program, which have no place in the arena."""
        outside = [slot for slot in self.step.outputs if slot is not None and self.plan.slots[slot].offset is None]
        most = {slot: slot_bytes(self.plan.slots[slot], sizes) for slot in outside}
        return {slot: torch.empty(size, dtype=torch.uint8, device=gpu.device) for slot, size in most.items()}

    def _placed(self, arguments: dict[str, Any]) -> Iterator[tuple[int, Any]]:
        """Slots and their tensors."""
        for name, planned in self.given.items():
            value = arguments[name]
            parts = zip(planned, value, strict=True) if isinstance(planned, list) else [(planned, value)]
            yield from ((part.id, tensor) for part, tensor in parts if isinstance(part, Slot))

    def _sizes(self, arguments: dict[str, Any]) -> Sizes:
        """The run's, but for those that the arguments' shapes say: of fewer tokens, other launches."""
        found: Sizes = {}
        for slot, value in self._placed(arguments):
            named = zip(self.plan.slots[slot].shape, value.shape, strict=True)
            found |= {size: number for size, number in named if size in self.sizes}
        return self.sizes | found


def alone(step: Step, slots: list[SlotInfo], arena_bytes: int) -> RegionPlan:
    """A plan of one step, which waits for none."""
    return RegionPlan("step", [], {}, slots, [], [replace(step, stream=0, waits=[])], arena_bytes)


def misplaced(step: Step, slots: list[SlotInfo], env: Environment, sizes: Sizes, arena: Tensor) -> str:
    """Which result of a step on a GPU is not what the plan says, or of a launched one not where; empty if none."""
    for slot in step.outputs:
        if slot is None:
            continue
        info, tensor = slots[slot], env[slot]
        shape, dtype = [evaluate(s, sizes) for s in info.shape], getattr(torch, info.dtype)
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            return f"{info.name} is {list(tensor.shape)} {tensor.dtype}, the plan says {shape} {dtype}"
        at = tensor.data_ptr() - arena.data_ptr()
        if step.buckets and info.offset is not None and at != info.offset:
            return f"{info.name} is at byte {at} of the arena, the plan says {info.offset}"
    return ""
