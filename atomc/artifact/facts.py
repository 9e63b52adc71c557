"""What a plan amounts to: how often each region is used, the operators of a step, and the bytes of everything."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from atomc.artifact.expr import evaluate
from atomc.artifact.manifest import Serving
from atomc.artifact.plan import DTYPE_BYTES, ProgramPlan, RegionPlan, Slot, StateTensor

Regions = Mapping[str, RegionPlan]
# Parameters in an element of each dtype; tables of ids and E8M0 scales have none.
_NUMBERS = dict.fromkeys(
    ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "int8"), 1
)


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
    """All weights: how many tensors, how many floating-point numbers in them, how many bytes, scales included.

    `prepared`: bytes of what is made of them when the artifact is loaded, and stays.
    """

    tensors: int
    parameters: int
    bytes: int
    prepared: int


def weights(program: ProgramPlan, regions: Regions) -> Weights:
    """Counted from the plan, so also for an artifact without weights."""
    tensors = parameters = size = prepared = 0
    for region, used in uses(program).items():
        slots, halves = regions[region].slots, _packed_slots(regions[region])
        names = {item.name for item in regions[region].inputs if item.role == "weight"}
        for item in regions[region].inputs:
            if item.role == "weight":
                slot = slots[item.slot]
                count = math.prod(evaluate(n, {}) for n in slot.shape)
                tensors += used
                numbers = count * _NUMBERS.get(slot.dtype, 0) * (2 if item.slot in halves else 1)
                parameters += used * numbers * (not is_scale(item.name, names))
                size += used * count * DTYPE_BYTES[slot.dtype]
        made = [s for s in slots if s.role == "prepared" and s.base is None]
        prepared += used * sum(math.prod(evaluate(n, {}) for n in s.shape) * DTYPE_BYTES[s.dtype] for s in made)
    return Weights(tensors, parameters, size, prepared)


def _packed_slots(region: RegionPlan) -> set[int]:
    """Slots of int8 that hold two FP4 codes to a byte: those that go with an e2m1 layout."""
    return {
        arg.id
        for step in (*region.prepare, *region.steps)
        if any(isinstance(text, str) and text.startswith("e2m1:") for text in step.args)
        for arg in step.args
        if isinstance(arg, Slot) and region.slots[arg.id].dtype == "int8"
    }


def is_scale(name: str, names: Collection[str]) -> bool:
    """Whether a weight holds the scales of another: `X.scale` beside `X.weight`, or beside `X`."""
    base = name.removesuffix(".scale")
    return base != name and (base in names or f"{base}.weight" in names)


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


@dataclass(frozen=True)
class MemoryPlan:
    """What a batch of requests of one length needs, in bytes.

    Attributes:
        weights: packed, as in the artifact. prepared: made of them when the artifact is loaded.
        rows: of compressed rows and index rows, which grow with the context, to the token.
        window: of window rows, in pages. partial: of the compressors' unfinished windows.
        arena, values: of the largest step.
    """

    weights: int
    prepared: int
    rows: int
    window: int
    partial: int
    arena: int
    values: int

    @property
    def total(self) -> int:
        return self.weights + self.prepared + self.rows + self.window + self.partial + self.arena + self.values


def memory_plan(program: ProgramPlan, regions: Regions, serving: Serving, requests: int, context: int) -> MemoryPlan:
    """The memory of `requests` requests of `context` tokens each."""
    known, sizes = weights(program, regions), pool_bytes(program.states)
    return MemoryPlan(
        weights=known.bytes,
        prepared=known.prepared,
        rows=math.ceil(requests * context * sizes["blocks"] / serving.block_tokens),
        window=requests * window_pages(serving) * sizes["window_pages"],
        partial=requests * sizes["slots"],
        arena=program.arena_bytes,
        values=program.values_bytes,
    )


def bytes_text(count: float) -> str:
    """A size to read: `1.5 MiB`."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
