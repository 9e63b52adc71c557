"""A step that kernels of an artifact compute, apart from its run: how to launch it again, on other arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomc.artifact.expr import evaluate
from atomc.artifact.plan import Arg, RegionPlan, Slot, SlotInfo, Step, slots_in
from atomc.runtime import gpu as device
from atomc.runtime.bind import Environment, Sizes
from atomc.runtime.loader import runnable
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

    def run(self, arguments: dict[str, Any], written: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """Launch it: its results, and what it has made of the arguments that it writes; tensors on the CPU.

        Raises:
            VerifyError: this machine has no such device.
        """
        gpu = self._loaded()
        env: Environment = [None] * len(self.plan.slots)
        for slot, value in self._placed(arguments):
            env[slot] = moved(value, gpu.device)
        device.LaunchStep(self.step, self.plan, gpu).run(env, self._sizes(arguments))
        results = tuple(None if slot is None else moved(env[slot], "cpu") for slot in self.step.outputs)
        slots = {n: next(slots_in(self.given[n])) for n in written if isinstance(arguments.get(n), Tensor)}
        return results, {name: moved(env[slot], "cpu") for name, slot in slots.items()}

    def _loaded(self) -> device.Gpu:
        if self.gpu is not None:
            return self.gpu
        if self.target not in runnable():
            raise VerifyError(f"The step is compiled for {self.target}; this machine runs {', '.join(runnable())}.")
        return device.Gpu(self.folder, self.plan.arena_bytes)

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
    """A plan of one step."""
    return RegionPlan("step", [], {}, slots, [], [step], arena_bytes)


def misplaced(step: Step, slots: list[SlotInfo], env: Environment, sizes: Sizes, arena: Tensor) -> str:
    """Which result of a launched step is not what or where the plan says; empty if none."""
    for slot in step.outputs:
        if slot is None:
            continue
        info, tensor = slots[slot], env[slot]
        shape, dtype = [evaluate(s, sizes) for s in info.shape], getattr(torch, info.dtype)
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            return f"{info.name} is {list(tensor.shape)} {tensor.dtype}, the plan says {shape} {dtype}"
        at = tensor.data_ptr() - arena.data_ptr()
        if info.offset is not None and at != info.offset:
            return f"{info.name} is at byte {at} of the arena, the plan says {info.offset}"
    return ""
