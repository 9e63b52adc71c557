"""Static buffer planning: offsets in one arena for buffers with lifetimes, so that no two live ones overlap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from atomc.artifact.expr import evaluate
from atomc.artifact.plan import CallPlan, RegionPlan

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "int64": 8, "bool": 1}
ALIGNMENT = 256  # bytes; the widest vector access and the allocation granularity of every target


@dataclass(frozen=True)
class Buffer:
    """A buffer of `size` bytes, live from step `first` to step `last`, both included."""

    id: int
    size: int
    first: int
    last: int

    def meets(self, other: Buffer) -> bool:
        """Whether the two are live at one time."""
        return self.first <= other.last and other.first <= self.last


def place(buffers: list[Buffer]) -> tuple[dict[int, int], int]:
    """Offsets by id, and the arena's size: largest buffer first, each at the lowest free offset (best known greedy)."""
    offsets: dict[int, int] = {}
    placed: list[Buffer] = []
    total = 0
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.first, b.id)):
        size, offset = _aligned(buffer.size), 0
        for other in sorted((p for p in placed if p.meets(buffer)), key=lambda p: offsets[p.id]):
            if offset + size <= offsets[other.id]:
                break
            offset = max(offset, offsets[other.id] + _aligned(other.size))
        offsets[buffer.id] = offset
        placed.append(buffer)
        total = max(total, offset + size)
    return offsets, total


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def program_values_bytes(calls: list[CallPlan], regions: dict[str, RegionPlan], bounds: Mapping[str, int]) -> int:
    """Bytes of the values that pass between calls, with those of equal lifetime parts sharing one arena.

    A value lives from the call that produces it to the last call that reads it before it is produced again.
    """
    born: dict[str, tuple[int, int]] = {}  # name -> (size, call that produced it)
    last: dict[str, int] = {}
    buffers: list[Buffer] = []

    def retire(name: str) -> None:
        size, first = born[name]
        buffers.append(Buffer(len(buffers), size, first, last[name]))

    for at, call in enumerate(calls):
        region = regions[call.region]
        for item in region.inputs:
            if item.role == "value":
                last[call.binds.get(item.name, item.name)] = at
        for name, slot in region.outputs.items():
            if name in born:
                retire(name)
            info = region.slots[slot]
            count = math.prod(evaluate(s, bounds) for s in info.shape)
            born[name], last[name] = (count * DTYPE_BYTES[info.dtype], at), at
    for name in born:
        retire(name)
    return place(buffers)[1]
