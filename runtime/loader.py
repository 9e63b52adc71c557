"""The loader: reads an artifact, refuses a damaged or foreign one, checks its plan, maps its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atomc.artifact.check import check_program
from atomc.artifact.kernels import check_kernels
from atomc.artifact.manifest import Manifest
from atomc.artifact.plan import ProgramPlan, RegionPlan
from atomc.artifact.store import ArtifactError, decode, read_manifest, verify


def device_arch() -> str:
    """The instruction set of this machine's GPU, as a manifest names it; empty without one."""
    if not torch.cuda.is_available():
        return ""
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(0).gcnArchName
        return name.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


@dataclass(frozen=True)
class LoadedArtifact:
    """A verified artifact: manifest, plans by region, weights by `prefix + name` (memory-mapped)."""

    folder: Path
    manifest: Manifest
    program: ProgramPlan
    regions: dict[str, RegionPlan]
    weights: dict[str, Tensor]


def load(folder: Path, progress: Callable[[str], None] = lambda _: None) -> LoadedArtifact:
    """Verify every file's hash, read and check the plan, map the weights.

    Raises:
        ArtifactError: damaged, of another schema, compiled without weights, for a target this machine cannot run, or
            with a plan that cannot run.
    """
    manifest = read_manifest(folder)
    verify(folder, manifest, progress)
    if (manifest.arch == "") != (manifest.target == "cpu"):
        raise ArtifactError(
            f"{folder}/manifest.json names target {manifest.target} and arch {manifest.arch!r}, which do not go "
            "together: it was changed after the compile. Compile the model again."
        )
    if manifest.arch not in ("", device_arch()):
        here = f"has {device_arch()}" if device_arch() else "has no GPU"
        raise ArtifactError(
            f"{folder} is compiled for {manifest.target} ({manifest.arch}), and this machine {here}. Compile the model "
            "for a target that it runs; --target cpu runs anywhere."
        )
    if not manifest.with_weights:
        raise ArtifactError(
            f"{folder} was compiled with --no-weights and can only be inspected. Compile it with weights."
        )
    program, regions = read_plan(folder)
    weights = read_weights(folder, manifest)
    check_program(str(folder), manifest, program, regions, weights)
    check_kernels(folder, regions)
    return LoadedArtifact(folder, manifest, program, regions, weights)


def read_plan(folder: Path) -> tuple[ProgramPlan, dict[str, RegionPlan]]:
    """The program and its regions, from `plan/`.

    Raises:
        ArtifactError: a file is missing or is no plan.
    """
    program = decode(_read(folder, "program"), ProgramPlan, "plan/program.json")
    names = sorted({call.region for call in program.calls})
    if bad := [name for name in names if not name.isidentifier()]:
        raise ArtifactError(f"{folder}: plan/program.json calls {bad[0]!r}, which is no name of a region.")
    return program, {name: decode(_read(folder, name), RegionPlan, f"plan/{name}.json") for name in names}


def _read(folder: Path, name: str) -> bytes:
    path = folder / "plan" / f"{name}.json"
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): {folder} is not a whole artifact.") from error


def read_weights(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """All weights, mapped from the safetensors files the manifest lists.

    Raises:
        ArtifactError: a file is not safetensors, or two hold a tensor of one name.
    """
    weights: dict[str, Tensor] = {}
    for name in sorted(manifest.files):
        if not name.endswith(".safetensors"):
            continue
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  a safe_open is no dict
                    if key in weights:
                        raise ArtifactError(f"{folder / name}: tensor {key!r} is in two files. Compile it again.")
                    weights[key] = file.get_tensor(key)
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(
                f"{folder / name} cannot be read: {error}. Compile or copy the artifact again."
            ) from error
    return weights
