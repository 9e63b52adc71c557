"""The loader: reads an artifact, refuses a damaged or foreign one, maps its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from atomc.artifact.manifest import Manifest
from atomc.artifact.plan import ProgramPlan, RegionPlan
from atomc.artifact.store import ArtifactError, decode, read_manifest, verify

RUNNABLE = frozenset({"cpu"})


@dataclass(frozen=True)
class LoadedArtifact:
    """A verified artifact: manifest, plans by region, weights by `prefix + name` (memory-mapped)."""

    folder: Path
    manifest: Manifest
    program: ProgramPlan
    regions: dict[str, RegionPlan]
    weights: dict[str, Tensor]


def load(folder: Path, progress: Callable[[str], None] = lambda _: None) -> LoadedArtifact:
    """Verify every file's hash, then read the plan and map the weights.

    Raises:
        ArtifactError: damaged, of another schema, compiled without weights, or for a target this machine cannot run.
    """
    manifest = read_manifest(folder)
    verify(folder, manifest, progress)
    if manifest.target not in RUNNABLE:
        raise ArtifactError(
            f"{folder} is compiled for {manifest.target}; this runtime runs {', '.join(sorted(RUNNABLE))}. "
            "Compile the model for a target that it runs."
        )
    if not manifest.with_weights:
        raise ArtifactError(
            f"{folder} was compiled with --no-weights and can only be inspected. Compile it with weights."
        )
    program, regions = read_plan(folder)
    weights = read_weights(folder, manifest)
    for call in program.calls:
        for item in regions[call.region].inputs:
            if item.role == "weight" and call.prefix + item.name not in weights:
                raise ArtifactError(
                    f"{folder}: the plan needs weight {call.prefix + item.name!r}, which no file holds."
                )
    return LoadedArtifact(folder, manifest, program, regions, weights)


def read_plan(folder: Path) -> tuple[ProgramPlan, dict[str, RegionPlan]]:
    """The program and its regions, from `plan/`."""
    program = decode((folder / "plan" / "program.json").read_bytes(), ProgramPlan, "plan/program.json")
    regions = {}
    for name in sorted({call.region for call in program.calls}):
        path = folder / "plan" / f"{name}.json"
        if not path.is_file():
            raise ArtifactError(f"{folder}: the program calls region {name!r}, but plan/{name}.json is missing.")
        regions[name] = decode(path.read_bytes(), RegionPlan, f"plan/{name}.json")
    return program, regions


def read_weights(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """All weights, mapped from the safetensors files the manifest lists."""
    weights: dict[str, Tensor] = {}
    for name in sorted(manifest.files):
        if not name.endswith(".safetensors"):
            continue
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  a safe_open is no dict
                    weights[key] = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"{folder / name} cannot be read: {error}. Compile or copy the artifact again."
            ) from error
    return weights
