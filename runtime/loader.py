"""The loader: reads an artifact, refuses a damaged or foreign one, checks its plan, maps its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atomc.artifact.agreement import prove_layout
from atomc.artifact.check import check_program, check_weights
from atomc.artifact.kernels import check_kernels
from atomc.artifact.manifest import Manifest
from atomc.artifact.order import buckets_of
from atomc.artifact.plan import ProgramPlan, RegionPlan
from atomc.artifact.ranks import FILE, RanksPlan, find, part_recipe
from atomc.artifact.store import ArtifactError, decode, read_manifest, verify
from atomc.recipes import Concat, Load, Recipe, Slice, TensorSpec
from atomc.runtime.errors import ServingError


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


@dataclass(frozen=True)
class LoadedRank:
    """A verified artifact as one rank of a layout has it.

    Attributes:
        program: of one rank. plan: the layout. regions: of its forms. weights: the rank's parts.
    """

    folder: Path
    manifest: Manifest
    program: ProgramPlan
    plan: RanksPlan
    rank: int
    regions: dict[str, RegionPlan]
    weights: dict[str, Tensor]


def load(folder: Path, progress: Callable[[str], None] = lambda _: None) -> LoadedArtifact:
    """Verify every file's hash, read and check the plan, map the weights.

    Raises:
        ArtifactError: damaged, of another schema, compiled without weights, for a target this machine cannot run, or
            with a plan that cannot run.
    """
    manifest = _verified(folder, progress)
    program, regions = read_plan(folder)
    weights = read_weights(folder, manifest)
    check_program(str(folder), manifest, program, regions, weights)
    check_kernels(folder, regions)
    return LoadedArtifact(folder, manifest, program, regions, weights)


def load_rank(folder: Path, layout: str, rank: int, progress: Callable[[str], None] = lambda _: None) -> LoadedRank:
    """`load` for a rank of a layout: its plan is checked and proven, and of each weight that is cut its part is read.

    Raises:
        ArtifactError: as `load`; the layout's plan cannot run, or is for a GPU.
        NoLayoutError: the artifact has it not. CollectivesError: the ranks would not agree.
        ServingError: the layout has no such rank.
    """
    manifest = _verified(folder, progress)
    program, regions = read_plan(folder)
    plan = find(read_ranks(folder), layout, str(folder))
    if not 0 <= rank < plan.mesh.ranks:
        raise ServingError(f"Rank {rank} of {plan.layout}: its ranks are 0 to {plan.mesh.ranks - 1}.")
    if manifest.arch:
        raise ArtifactError(f"{folder}: {plan.layout} for {manifest.target}: ranks run on the cpu as yet.")
    every = regions | read_regions(folder, plan.regions())
    check_program(str(folder), manifest, program, every, ranks=[plan])
    prove_layout(plan, program, every, buckets_of(manifest.serving.max_batch_tokens))
    weights = read_weights(folder, manifest, Parts(plan, rank, program))
    for form in plan.forms:
        check_weights(str(folder), plan.program(form, program), every, weights)
    return LoadedRank(folder, manifest, program, plan, rank, {n: every[n] for n in plan.regions()}, weights)


def _verified(folder: Path, progress: Callable[[str], None]) -> Manifest:
    """The manifest of an artifact that is whole, has weights, and is for this machine."""
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
    return manifest


def read_plan(folder: Path) -> tuple[ProgramPlan, dict[str, RegionPlan]]:
    """The program and its regions, from `plan/`.

    Raises:
        ArtifactError: a file is missing or is no plan.
    """
    program = decode(_read(folder, "program"), ProgramPlan, "plan/program.json")
    return program, read_regions(folder, sorted({call.region for call in program.calls}))


def read_ranks(folder: Path) -> list[RanksPlan]:
    """The layouts on many ranks; none where the artifact is for one.

    Raises:
        ArtifactError: the file is no such plan.
    """
    if not (folder / "plan" / FILE).exists():
        return []
    plans = decode(_read(folder, FILE.removesuffix(".json")), list[RanksPlan], f"plan/{FILE}")
    if twice := [name for name, n in Counter(plan.layout for plan in plans).items() if n > 1]:
        raise ArtifactError(f"{folder}: plan/{FILE} has the layout {twice[0]} twice. Compile the model again.")
    return plans


def read_regions(folder: Path, names: list[str]) -> dict[str, RegionPlan]:
    """Regions by name.

    Raises:
        ArtifactError: a name is none, a file is missing or is no plan.
    """
    if bad := [name for name in names if not name.isidentifier()]:
        raise ArtifactError(f"{folder}: plan/program.json calls {bad[0]!r}, which is no name of a region.")
    return {name: decode(_read(folder, name), RegionPlan, f"plan/{name}.json") for name in names}


def _read(folder: Path, name: str) -> bytes:
    path = folder / "plan" / f"{name}.json"
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): {folder} is not a whole artifact.") from error


@dataclass(frozen=True)
class Parts:
    """Which part of each weight a rank of a layout holds."""

    plan: RanksPlan
    rank: int
    program: ProgramPlan

    def read(self, file: Any, key: str) -> Tensor:
        """The rank's part of a tensor of an open safetensors file; of one that is cut, no more than that is read."""
        prefix = max((c.prefix for c in self.program.calls if key.startswith(c.prefix)), key=len, default="")
        cuts = self.plan.cuts.get(key.removeprefix(prefix), [])
        if not cuts:
            whole: Tensor = file.get_tensor(key)
            return whole
        data = file.get_slice(key)
        spec = TensorSpec(tuple(data.get_shape()), torch.uint8)  # cutting asks for sizes alone
        return _read_part(data, part_recipe(cuts, self.plan.mesh, self.rank, key, spec), {}).contiguous()


def _read_part(data: Any, recipe: Recipe, within: dict[int, tuple[int, int]]) -> Tensor:
    """What a recipe of slices and joins gives of a tensor on disk; `within`: rows of its dims, where not all."""
    match recipe:
        case Slice(source=source, dim=dim, start=start, stop=stop):
            low, high = within.get(dim, (0, stop - start))
            return _read_part(data, source, {**within, dim: (start + low, start + high)})
        case Concat(parts=parts, dim=dim) if dim not in within:
            return torch.cat([_read_part(data, part, within) for part in parts], dim)
        case Load():
            ranges = [slice(*within.get(dim, (0, size))) for dim, size in enumerate(data.get_shape())]
            found: Tensor = data[tuple(ranges)]
            return found
    raise AssertionError(recipe)


def read_weights(folder: Path, manifest: Manifest, parts: Parts | None = None) -> dict[str, Tensor]:
    """All weights, mapped from the safetensors files the manifest lists; of a rank its parts.

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
                    weights[key] = file.get_tensor(key) if parts is None else parts.read(file, key)
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(
                f"{folder / name} cannot be read: {error}. Compile or copy the artifact again."
            ) from error
    return weights
