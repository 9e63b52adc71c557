"""Static buffer planning: offsets in one arena for buffers with lifetimes, so that no two live ones overlap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from atomc.artifact.buffers import Buffer, aligned, value_buffers
from atomc.artifact.plan import CallPlan, RegionPlan

Meets = Callable[[Buffer, Buffer], bool]


def place(buffers: Sequence[Buffer], meets: Meets = Buffer.meets) -> tuple[dict[int, int], int]:
    """Offsets by id, and the arena's size: the better of two greedy orders, each buffer at its lowest free offset.

    `meets`: whether two buffers must not have the same bytes; where steps run side by side that is more than lifetimes.
    Largest first wins on most plans; oldest first on those whose large buffers hardly meet. Both are deterministic.
    """
    by_size = _greedy(sorted(buffers, key=lambda b: (-b.size, b.first, b.id)), meets)
    by_time = _greedy(sorted(buffers, key=lambda b: (b.first, -b.size, b.id)), meets)
    return min(by_size, by_time, key=lambda placed: placed[1])


def _greedy(buffers: Sequence[Buffer], meets: Meets) -> tuple[dict[int, int], int]:
    offsets: dict[int, int] = {}
    placed: list[Buffer] = []
    total = 0
    for buffer in buffers:
        size, offset = aligned(buffer.size), 0
        for other in sorted((p for p in placed if meets(p, buffer)), key=lambda p: offsets[p.id]):
            if offset + size <= offsets[other.id]:
                break
            offset = max(offset, offsets[other.id] + aligned(other.size))
        offsets[buffer.id] = offset
        placed.append(buffer)
        total = max(total, offset + size)
    return offsets, total


def program_values_bytes(
    calls: Sequence[CallPlan], regions: Mapping[str, RegionPlan], symbols: Mapping[str, int]
) -> int:
    """Bytes of the values that pass between calls, in an arena of their own."""
    return place(value_buffers(calls, regions, symbols))[1]
