"""What a plan amounts to: how often each region is used, the operators of a step, and the bytes of everything."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from atomc.artifact.expr import evaluate
from atomc.artifact.manifest import Serving
from atomc.artifact.plan import DTYPE_BYTES, ProgramPlan, RegionPlan, StateTensor

Regions = Mapping[str, RegionPlan]
_NUMBERS = ("float32", "bfloat16", "float16", "float8_e4m3fn")  # dtypes of parameters; not of tables and scales


def uses(program: ProgramPlan) -> Counter[str]:
    """Region -> number of calls in a step."""
    return Counter(call.region for call in program.calls)


def operators(program: ProgramPlan, regions: Regions) -> Counter[str]:
    """Operator -> number of calls in a step of the model."""
    count: Counter[str] = Counter()
    for region, used in uses(program).items():
        for step in regions[region].steps:
            count[step.op] += used
    return count


@dataclass(frozen=True)
class Weights:
    """All weights that a step reads: how many tensors, how many floating-point numbers in them, how many bytes."""

    tensors: int
    parameters: int
    bytes: int


def weights(program: ProgramPlan, regions: Regions) -> Weights:
    """Counted from the plan, so also for an artifact without weights."""
    tensors = parameters = size = 0
    for region, used in uses(program).items():
        slots = regions[region].slots
        for item in regions[region].inputs:
            if item.role == "weight":
                slot = slots[item.slot]
                count = math.prod(evaluate(n, {}) for n in slot.shape)
                tensors += used
                parameters += used * count * (slot.dtype in _NUMBERS)
                size += used * count * DTYPE_BYTES[slot.dtype]
    return Weights(tensors, parameters, size)


def pool_bytes(states: Mapping[str, list[StateTensor]]) -> dict[str, int]:
    """Pool -> bytes of one of its units (a window page, a block, a slot) over all layers."""
    sizes = {"window_pages": 0, "blocks": 0, "slots": 0}
    for tensors in states.values():
        for tensor in tensors:
            sizes[tensor.pool] += math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
    return sizes


def window_pages(serving: Serving) -> int:
    """Most window pages that one request holds between two steps."""
    return -(-(serving.window - 1) // serving.window_page) + 1


@dataclass(frozen=True)
class StateBytes:
    """State of one request: what does not grow (its slot and window pages), and what 1,024 tokens of context add."""

    request: int
    per_1024_tokens: float

    def at(self, tokens: int) -> int:
        """Bytes of a request of that many tokens, blocks counted in parts."""
        return self.request + math.ceil(self.per_1024_tokens * tokens / 1024)


def state_bytes(program: ProgramPlan, serving: Serving) -> StateBytes:
    """State of one request, over all layers."""
    sizes = pool_bytes(program.states)
    fixed = sizes["slots"] + window_pages(serving) * sizes["window_pages"]
    return StateBytes(fixed, sizes["blocks"] * 1024 / serving.block_tokens)


def bytes_text(count: float) -> str:
    """A size to read: `1.5 MiB`."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
