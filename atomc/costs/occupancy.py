"""Occupancy: how many wavefronts of a kernel a compute unit holds at a time, and what holds back more."""

from __future__ import annotations

from dataclasses import dataclass

from atomc.artifact.kernels import KernelFacts
from atomc.targets import Target


@dataclass(frozen=True)
class Occupancy:
    """Workgroups and wavefronts of one compute unit, of `most` wavefronts; `limit`: the resource that is used up."""

    workgroups: int
    wavefronts: int
    most: int
    limit: str

    def __str__(self) -> str:
        return f"{self.wavefronts}/{self.most} ({self.limit})"


def occupancy(facts: KernelFacts, target: Target) -> Occupancy:
    """Of a kernel on a GPU, from its registers, shared memory and warps (`Residency` has the rules' figures)."""
    unit = target.residency
    assert unit is not None, f"{target.name} runs no kernel"
    lanes = target.register_file_bytes // 4 // unit.partitions // target.wavefront  # registers for each lane of a wave
    registers = _up(max(facts.registers, 1), unit.register_granule)
    shared = _up(facts.shared + unit.shared_reserved, unit.shared_granule)
    fits = {
        "wavefronts": unit.wavefronts // facts.warps,
        "registers": unit.partitions * (lanes // registers) // facts.warps,
        "shared memory": unit.shared_bytes // shared if shared else unit.workgroups,
        "workgroups": unit.workgroups if facts.warps == 1 else unit.barriers,
    }
    limit = min(fits, key=lambda name: fits[name])
    return Occupancy(fits[limit], fits[limit] * facts.warps, unit.wavefronts, limit)


def _up(size: int, granule: int) -> int:
    return -(-size // granule) * granule
