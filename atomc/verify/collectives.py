"""Collectives of an artifact: what the ranks of each layout send one another, proven from its plan."""

from __future__ import annotations

from pathlib import Path

from atomc.artifact.agreement import Proven, prove_layouts
from atomc.artifact.check import check_program
from atomc.artifact.order import buckets_of
from atomc.artifact.store import ArtifactError, read_manifest, verify
from atomc.runtime.loader import read_plan, read_ranks, read_regions


def verify_collectives(folder: Path, hashed: bool = False) -> list[Proven]:
    """Check every layout's plan, and prove from its table of steps that its ranks issue the same collectives.

    Needs no weights and no GPU. `hashed`: the files were compared with the manifest before.

    Raises:
        ArtifactError: damaged, for one rank only, or with a plan that cannot run.
        CollectivesError: a sum is used before it is taken, or ranks would wait for one another for ever; names the
            step and the model's line.
    """
    manifest = read_manifest(folder)
    if not hashed:
        verify(folder, manifest)
    (program, regions), plans = read_plan(folder), read_ranks(folder)
    if not plans:
        raise ArtifactError(f"{folder} is for one rank, which has no collectives; compile it with --parallel.")
    names = sorted({name for plan in plans for name in plan.regions()})
    every = regions | read_regions(folder, names)
    check_program(str(folder), manifest, program, every, ranks=plans)
    buckets = buckets_of(manifest.serving.max_batch_tokens)
    return prove_layouts(plans, program, every, buckets)
