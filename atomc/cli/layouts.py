"""Layouts on many ranks in tables: what a rank sends in a step of each kind, and what was proven of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atomc.artifact.agreement import Proven


def as_data(found: Proven) -> dict[str, Any]:
    """Everything that `--json` writes of a layout."""
    return {
        "layout": found.plan.layout, "ranks": found.plan.mesh.ranks, "steps": found.plan.steps,
        "collectives": {form: [str(c) for c in sent] for form, sent in found.collectives.items()},
        "bytes_a_row": {kind: found.bytes_a_row(form) for kind, form in found.plan.steps.items()},
        "overlap": {kind: {"form": o.form, "least_rows": o.least} for kind, o in found.plan.overlap.items()},
        "why": found.plan.why,
        "longest_step": found.proof.longest, "kinds_of_steps": found.proof.steps,
    }  # fmt: skip


def line(found: Proven) -> str:
    """A layout in a summary."""
    from atomc.report import kinds_of_steps

    steps = ", ".join(f"{kind} by {form}" for kind, form in kinds_of_steps(found))
    proof = (
        f"{found.proof.longest} collectives a step at most, alike on all ranks in {found.proof.steps} kinds of steps"
    )
    why = "".join(f"; {kind}: {text}" for kind, text in sorted(found.plan.why.items()))
    return f"{found.plan.layout}: {steps}; {proof}{why}"


def show(found: list[Proven]) -> None:
    """A row for each layout and kind of step."""
    from atomc.cli.console import stdout, table
    from atomc.report import RANKS_HEAD, rank_rows

    stdout().print(table("ranks of each layout", RANKS_HEAD, rank_rows(found), right=(1, 4)))


def verify(artifact: Path, json: bool) -> None:
    """`atomc verify --collectives`."""
    from atomc.cli.console import emit_json, stdout
    from atomc.verify.collectives import verify_collectives

    start = time.perf_counter()
    found = verify_collectives(artifact)
    seconds = time.perf_counter() - start
    if json:
        emit_json({"artifact": artifact, "seconds": round(seconds, 3), "layouts": [as_data(one) for one in found]})
        return
    show(found)
    for one in found:
        stdout().print(line(one), highlight=False)
    stdout().print(f"proven in {seconds:.1f} s", highlight=False)
