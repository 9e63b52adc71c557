"""A GPU that is the cpu: kernels are the operators' own functions, into an arena at the plan's offsets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import atomc.runtime.executor as executor
import atomc.runtime.gpu as gpu
import atomc.runtime.loader as loader
import atomc.verify.launched as launched
from atomc.artifact.plan import RegionPlan, Step
from atomc.ops import OPS
from atomc.runtime.bind import Environment, Sizes, value_of
from atomc.runtime.graphs import Staging, buckets_of
from atomc.verify.watching import StepWatch
from atomc.verify.wide import results_of

GARBAGE = 0xAB
Fault = Callable[[Step, list[Tensor], Environment, "FakeGpu"], None]  # after a step has run


def nothing(step: Step, results: list[Tensor], env: Environment, device: FakeGpu) -> None:
    """Nothing goes wrong."""


class FakeGpu:
    """What a `Gpu` is, without kernels."""

    fault: Fault = staticmethod(nothing)

    def __init__(self, folder: Path, arena_bytes: int, device: int = 0) -> None:
        self.index, self.device = device, torch.device("cpu")
        self.arena = torch.full((max(arena_bytes, 1),), GARBAGE, dtype=torch.uint8)
        self.kernels = {path.stem for path in (folder / "kernels").glob("*.bin")}

    def synchronize(self) -> None:
        """Nothing runs."""

    join = synchronize

    def on_streams(self, aside: bool, dependent: bool) -> AbstractContextManager[None]:
        """There is one stream."""
        return nullcontext()


class FakeLaunch:
    """What a `LaunchStep` is: results and scratch are full of garbage when the operator runs."""

    def __init__(self, at: int, plan: RegionPlan, device: FakeGpu, buffers: Mapping[int, Tensor]) -> None:
        step = plan.steps[at]
        self.step, self.device, self.release = step, device, step.release
        assert all(launch.kernel in device.kernels for bucket in step.buckets for launch in bucket.launches)
        scratch = [slot for bucket in step.buckets for slot in bucket.scratch]
        made = [slot for slot in (*step.outputs, *scratch) if slot is not None]
        self.memory = {s: gpu.Memory(plan.slots[s], device, buffers.get(s)) for s in made}  # type: ignore[arg-type]

    def run(self, env: Environment, sizes: Sizes) -> None:
        """Compute the step with the operator's function."""
        scratch = next(b.scratch for b in self.step.buckets if sizes["T"] <= b.tokens)
        made = {slot: self.memory[slot].tensor(sizes) for slot in (*self.step.outputs, *scratch) if slot is not None}
        for tensor in made.values():
            if tensor.numel():
                tensor.view(-1).view(torch.uint8).fill_(GARBAGE)
        args = [value_of(a, env, sizes) for a in self.step.args]
        kwargs = {k: value_of(v, env, sizes) for k, v in self.step.kwargs.items()}
        results = results_of(OPS[self.step.op.split(".")[1]].cpu(*args, **kwargs))
        for slot, result in zip(self.step.outputs, results, strict=True):
            if slot is not None:
                made[slot].copy_(result)
        for slot, tensor in made.items():
            env[slot] = tensor
        FakeGpu.fault(self.step, [made[s] for s in self.step.outputs if s is not None], env, self.device)


class FakeGraphs:
    """What `DecodeGraphs` is to who never replays one: captured by runs of padding, as those are."""

    def __init__(
        self, staging: Staging, most: int, slot: int, run: Callable[[Mapping[str, Tensor], int], Tensor]
    ) -> None:
        for bucket in buckets_of(most):
            staging.put_decode(None, bucket, slot)
            run(staging.views(staging.decode_shapes(bucket)), bucket)


def elsewhere(method: Callable[..., None]) -> Callable[..., None]:
    """As within a run on a GPU: what is made without saying where is made there, and there is no such memory here."""

    def run(*args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            method(*args, **kwargs)

    return run


def install(patch: pytest.MonkeyPatch, fault: Fault = nothing) -> None:
    """This machine has an H100 from here on, on which `fault` happens."""
    patch.setattr(FakeGpu, "fault", staticmethod(fault))
    for module in (executor, gpu):
        patch.setattr(module, "Gpu", FakeGpu)
        patch.setattr(module, "LaunchStep", FakeLaunch)
    patch.setattr(executor, "DecodeGraphs", FakeGraphs)
    patch.setattr(executor, "on_device", lambda tensors, _: {name: tensor.clone() for name, tensor in tensors.items()})
    for name in ("before", "after"):
        patch.setattr(StepWatch, name, elsewhere(getattr(StepWatch, name)))
    for module in (loader, launched):
        patch.setattr(module, "device_arch", lambda: "sm_90")
