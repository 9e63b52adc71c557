"""Buffers and their lifetimes: what a plan must find room for, and the least room there can be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from atomc.artifact.expr import evaluate
from atomc.artifact.plan import ALIGNMENT, DTYPE_BYTES, CallPlan, RegionPlan, SlotInfo
from atomc.parallel.sizes import AGREED, COUNTED, HALVES, of_half


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


def aligned(size: int) -> int:
    """`size` rounded up to the arena's alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def slot_bytes(info: SlotInfo, symbols: Mapping[str, int]) -> int:
    """Bytes of a slot's elements for given symbol values."""
    return math.prod(evaluate(s, symbols) for s in info.shape) * DTYPE_BYTES[info.dtype]


def of_bucket(symbols: Mapping[str, int], tokens: int) -> dict[str, int]:
    """The largest sizes of a step of at most `tokens` tokens: logits are of tokens, so there are no more of them.

    Of a rank's step `tokens` is what the ranks agreed on, so that no rank has more, or sends more to another.
    """
    whole = ("T", "L", AGREED)
    small = {*whole, *(of_half(name, half) for name in whole for half in HALVES)}
    small |= {name for name in symbols if name.startswith(COUNTED)}
    return {name: min(size, tokens) if name in small else size for name, size in symbols.items()}


def lower_bound(buffers: Sequence[Buffer]) -> int:
    """The most bytes live at one time; no placement needs less."""
    births = {b.first for b in buffers}
    return max((sum(aligned(b.size) for b in buffers if b.first <= at <= b.last) for at in births), default=0)


def value_buffers(
    calls: Sequence[CallPlan], regions: Mapping[str, RegionPlan], symbols: Mapping[str, int]
) -> list[Buffer]:
    """The values that pass between calls; time is counted in calls, and values of one storage are one buffer.

    A value lives from the call that produces it to the last call that reads it before it is produced again.
    """
    living: dict[str, int] = {}  # name -> index in `found`
    found: list[Buffer] = []
    for at, call in enumerate(calls):
        region = regions[call.region]
        storages: dict[int, int] = {}  # slot -> index
        for item in region.inputs:
            if item.role == "value":
                index = storages[item.slot] = living[call.binds.get(item.name, item.name)]
                found[index] = replace(found[index], last=at)
        for name, slot in region.outputs.items():
            base = region.slots[slot].base
            owner = slot if base is None else base
            if owner not in storages:
                storages[owner] = len(found)
                found.append(Buffer(len(found), slot_bytes(region.slots[owner], symbols), at, at))
            living[name] = storages[owner]
    return found
