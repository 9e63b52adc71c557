"""Watching a run: every slot is what the plan says it is, and its memory is what the plan predicts.

For tests and `atomc verify`; a watched step is several times slower.
"""

from __future__ import annotations

import torch

from atomc.artifact.buffers import slot_bytes
from atomc.artifact.expr import evaluate
from atomc.artifact.plan import CallPlan, RegionPlan, SlotInfo
from atomc.errors import AtomcError
from atomc.runtime.bind import Environment, Sizes


class PlanMismatchError(AtomcError):
    """A step left something that the plan does not say."""


class MemoryWatch:
    """Compares every result with its slot and the live temporaries with the plan's prediction, step by step.

    Attributes:
        peaks: most live bytes of temporaries in each region, without alignment. steps: how many steps were seen.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.steps = 0

    def before(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        """Nothing is looked at before a step."""

    def after(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        """Check step `at` before its releases.

        Raises:
            PlanMismatchError: names the slot and both values.
        """
        self.steps += 1
        for slot in region.steps[at].outputs:
            if slot is not None:
                _check_result(region, at, slot, env, sizes)
        live = _live_bytes(region, env)
        predicted = predicted_bytes(region, at, sizes)
        if live != predicted:
            raise _mismatch(region, at, f"{live} bytes of temporaries are live, the plan predicts {predicted}")
        self.peaks[region.name] = max(live, self.peaks.get(region.name, 0))


def predicted_bytes(region: RegionPlan, at: int, sizes: Sizes) -> int:
    """Bytes of temporaries live during step `at`, by the plan."""
    return sum(
        slot_bytes(s, sizes)
        for s in region.slots
        if s.role == "temporary" and s.base is None and s.first <= at <= s.last
    )


def _check_result(region: RegionPlan, at: int, slot: int, env: Environment, sizes: Sizes) -> None:
    info: SlotInfo = region.slots[slot]
    tensor = env[slot]
    shape, dtype = [evaluate(s, sizes) for s in info.shape], getattr(torch, info.dtype)
    if list(tensor.shape) != shape or tensor.dtype != dtype:
        found = f"{list(tensor.shape)} {tensor.dtype}"
        raise _mismatch(region, at, f"{info.name} is {found}, the plan says {shape} {dtype}")
    # With sizes of 1 a reshape that the plan counts as a copy may turn out a view; the other way there is no excuse.
    if info.base is not None and _storage(tensor) != _storage(env[info.base]):
        raise _mismatch(region, at, f"{info.name} is no view of {region.slots[info.base].name}")


def _live_bytes(region: RegionPlan, env: Environment) -> int:
    """Bytes of the distinct storages of temporaries, less those that a value, an input or a constant also has."""
    others = {_storage(env[i]) for i, s in enumerate(region.slots) if s.role != "temporary" and env[i] is not None}
    held = {
        _storage(env[i]): env[i].untyped_storage().nbytes()
        for i, s in enumerate(region.slots)
        if s.role == "temporary" and env[i] is not None
    }
    return sum(size for storage, size in held.items() if storage not in others)


def _storage(tensor: torch.Tensor) -> int:
    storage: int = tensor.untyped_storage()._cdata
    return storage


def _mismatch(region: RegionPlan, at: int, what: str) -> PlanMismatchError:
    step = region.steps[at]
    return PlanMismatchError(f"region {region.name}, step {at} ({step.op}, {step.source}): {what}.")
