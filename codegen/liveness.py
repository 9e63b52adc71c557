"""Lifetimes: when each slot's storage is first and last used, what each step releases, and the arena's offsets.

Steps also get their streams here, for two buffers may share bytes only if no stream has both in use at one time.

Terms:
    owner    the slot whose storage a slot has: itself, or the one it views; a storage lives as long as any view of it.
    value    a slot that outlives the region, or came from before it; its memory is the program's, not the arena's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from atomc.artifact.buffers import Buffer
from atomc.artifact.order import apart, held_until
from atomc.artifact.plan import RegionInput, RegionPlan, Role, SlotInfo, Step, slots_of
from atomc.codegen.memory import place
from atomc.codegen.streams import assign


@dataclass(frozen=True)
class Value:
    """A slot before its lifetime is known. `bytes` at the largest sizes; `owner` may be the slot itself."""

    name: str
    role: Role
    shape: list[int | str]
    dtype: str
    owner: int
    bytes: int


def finish(
    region: str, inputs: list[RegionInput], outputs: dict[str, int], values: list[Value], prepare: list[Step],
    steps: list[Step],
) -> RegionPlan:  # fmt: skip
    """The region's plan from its slots and steps; outputs must not own an input's storage other than a value's."""
    kept = {values[slot].owner for slot in outputs.values()}
    values = [replace(v, role="value") if v.owner in kept and v.role == "temporary" else v for v in values]
    owner = [v.owner for v in values]
    steps = assign(steps, values, owner)
    first = _definitions(values, steps)
    last = _last_uses(values, steps, first)
    last.update(dict.fromkeys(kept, len(steps)))
    buffers = [
        Buffer(slot, v.bytes, first[slot], last[slot])
        for slot, v in enumerate(values)
        if v.owner == slot and v.role == "temporary"
    ]
    may_share = apart(steps, owner)
    offsets, arena = place(buffers, lambda a, b: a.meets(b) or not may_share(a.id, b.id))
    slots = [
        SlotInfo(
            name=v.name,
            role=v.role,
            shape=v.shape,
            dtype=v.dtype,
            base=None if v.owner == slot else v.owner,
            first=first[slot],
            last=last[v.owner],
            offset=offsets.get(slot),
        )
        for slot, v in enumerate(values)
    ]
    released: dict[int, list[int]] = {}
    for slot, info in enumerate(slots):
        if info.role == "temporary":
            released.setdefault(info.last, []).append(slot)
    final = [msgspec.structs.replace(step, release=released.get(at, [])) for at, step in enumerate(steps)]
    return RegionPlan(region, inputs, outputs, slots, prepare, final, arena)


def _definitions(values: list[Value], steps: list[Step]) -> list[int]:
    """The step that defines each slot; -1 for inputs and for what is prepared from weights."""
    first = [-1] * len(values)
    for at, step in enumerate(steps):
        for slot in (*step.outputs, *scratch_of(step)):
            if slot is not None:
                first[slot] = at
    return first


def _last_uses(values: list[Value], steps: list[Step], first: list[int]) -> dict[int, int]:
    """Owner -> the last step that reads, writes or defines its storage, through any view of it."""
    last: dict[int, int] = {}
    for slot, value in enumerate(values):
        last[value.owner] = max(last.get(value.owner, -1), first[slot])
    for at, step in enumerate(steps):
        for slot in (*slots_of(step), *scratch_of(step)):
            last[values[slot].owner] = max(last[values[slot].owner], at)
    for at, slot in held_until(steps):
        last[values[slot].owner] = max(last[values[slot].owner], at)
    return last


def scratch_of(step: Step) -> list[int]:
    """Scratch slots of all buckets of a step."""
    return [slot for bucket in step.buckets for slot in bucket.scratch]
