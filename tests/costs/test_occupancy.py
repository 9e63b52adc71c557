"""Occupancy by each limit, against the vendors' rules worked by hand."""

from __future__ import annotations

import msgspec
import pytest

from atomc.artifact.kernels import KernelFacts
from atomc.costs.occupancy import occupancy
from atomc.targets import get_target

FACTS = KernelFacts(
    name="k", target="h100", signature=[], warps=4, wavefront=32, stages=3, shared=0, registers=32, spills=0,
    scalar_spills=0, matrix={}, loads=0, wide_loads=0, constants={},
)  # fmt: skip


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "expected"),
    [
        ("h100", 4, 32, 0, "64/64 (wavefronts)"),  # 64 K registers hold 64 warps of 32 lanes and registers
        ("h100", 4, 33, 0, "48/64 (registers)"),  # 40 a lane: 12 warps a sub-partition
        ("h100", 4, 255, 0, "8/64 (registers)"),
        ("h100", 8, 64, 113 * 1024, "16/64 (shared memory)"),  # with a block's own KiB two have the 228 KiB of an SM
        ("h100", 8, 64, 113 * 1024 + 1, "8/64 (shared memory)"),
        ("h100", 1, 16, 0, "32/64 (workgroups)"),
        ("mi355x", 4, 64, 0, "32/32 (wavefronts)"),
        ("mi355x", 4, 129, 0, "12/32 (registers)"),  # 136 of 512: 3 waves a SIMD
        ("mi355x", 4, 64, 65536, "8/32 (shared memory)"),  # 52 granules of 1,280 bytes: two of 160 KiB
        ("mi300x", 4, 64, 32769, "4/32 (shared memory)"),
        ("mi355x", 1, 16, 0, "32/32 (wavefronts)"),
        ("mi300x", 1, 65, 0, "28/32 (registers)"),
        ("mi300x", 2, 16, 0, "32/32 (wavefronts)"),
    ],
)
def test_occupancy(target: str, warps: int, registers: int, shared: int, expected: str) -> None:
    facts = msgspec.structs.replace(FACTS, warps=warps, registers=registers, shared=shared)
    assert str(occupancy(facts, get_target(target))) == expected
