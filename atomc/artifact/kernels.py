"""Kernels of an artifact: `kernels/KEY.bin`, a code object, and `kernels/KEY.json`, what is known of it.

A generated kernel has its source beside it, `kernels/KEY.py`, for readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from atomc.artifact.plan import RegionPlan

FOLDER = "kernels"


class KernelFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a code object without running it.

    Attributes:
        name: of the function in it. target: what it is compiled for. signature: Triton's types of its run-time
            arguments, in order. warps: of a workgroup; wavefront: lanes of one; stages: of its loops' pipelines.
            shared: bytes of shared memory (LDS).
        registers: 32-bit registers of a lane, AGPRs too. spills: bytes of them in memory. scalar_spills: of AMD's
            SGPRs.
        matrix: matrix instruction, with its types -> how often it is written. loads, wide_loads: global loads, those
            of 16 bytes. constants: the compile-time parameters, as text.
        dependent: it waits itself for the launch before it on its stream, and may so be launched before that one ends.
    """

    name: str
    target: str
    signature: list[str]
    warps: int
    wavefront: int
    stages: int
    shared: int
    registers: int
    spills: int
    scalar_spills: int
    matrix: dict[str, int]
    loads: int
    wide_loads: int
    constants: dict[str, str]
    dependent: bool = False


def write_kernel(folder: Path, key: str, data: bytes, facts: KernelFacts, source: str = "") -> None:
    """Write a code object, its facts and, of a generated kernel, its source into `folder/kernels`."""
    from atomc.artifact.store import encode

    (folder / FOLDER).mkdir(exist_ok=True)
    (folder / FOLDER / f"{key}.bin").write_bytes(data)
    (folder / FOLDER / f"{key}.json").write_bytes(encode(facts))
    if source:
        (folder / FOLDER / f"{key}.py").write_text(source, encoding="utf-8")


def check_kernels(folder: Path, regions: Mapping[str, RegionPlan]) -> None:
    """Check that an artifact has every kernel that its plan launches.

    Raises:
        ArtifactError: names the first one that it has not.
    """
    from atomc.artifact.store import ArtifactError

    there = {path.stem for path in (folder / FOLDER).glob("*.bin")} & {p.stem for p in (folder / FOLDER).glob("*.json")}
    for region in regions.values():
        for step in region.steps:
            for launch in (launch for bucket in step.buckets for launch in bucket.every_launch):
                if launch.kernel not in there:
                    raise ArtifactError(
                        f"{folder}: step {step.op} ({step.source}) of region {region.name} launches kernel "
                        f"{launch.kernel}, which is not in {FOLDER}/. Compile the model again."
                    )


def read_kernels(folder: Path) -> dict[str, KernelFacts]:
    """Key -> facts of every kernel of an artifact. Raises `ArtifactError` where a file is no such thing."""
    from atomc.artifact.store import decode

    found = sorted((folder / FOLDER).glob("*.json"))
    return {path.stem: decode(path.read_bytes(), KernelFacts, f"{FOLDER}/{path.name}") for path in found}
