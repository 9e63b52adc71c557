"""Which layout a run has: as `--parallel` says it, of those that the artifact holds, for as many ranks as there are."""

from __future__ import annotations

from pathlib import Path

from atomc.artifact.ranks import find
from atomc.parallel.layout import Layout, parse_layout
from atomc.runtime.errors import ServingError
from atomc.runtime.loader import read_ranks


def layout_of(parallel: str | None) -> Layout | None:
    """The layout that all ranks share a model by; None: each has the whole model.

    Raises:
        LayoutError: the text is none.
    """
    layout = None if parallel is None else parse_layout(parallel)
    return None if layout is None or layout.ranks == 1 else layout


def check_layout(artifact: Path, parallel: str | None, size: int, target: str = "cpu") -> None:
    """Whether `size` ranks can run this layout of the artifact, which is for `target`.

    Raises:
        LayoutError: the text is none. NoLayoutError: the artifact has it not. ServingError: it is for another number of
            ranks, or for a target that runs no layouts yet.
    """
    if parallel is None:
        return
    layout, plans = parse_layout(parallel), read_ranks(artifact)
    if layout.ranks > 1:
        find(plans, parallel, str(artifact))
        if target != "cpu":
            raise ServingError(
                f"--parallel {layout}: {artifact} is for {target}, and ranks that share a model run on the cpu as yet. "
                "Compile it with --target cpu, or start without --parallel."
            )
    if layout.ranks != size:
        fitting = [each for each in ("dp=1", *(plan.layout for plan in plans)) if parse_layout(each).ranks == size]
        other = f"choose {' or '.join(fitting)}" if fitting else f"compile the model for a layout of {size}"
        ranks, are = ("1 rank" if layout.ranks == 1 else f"{layout.ranks} ranks"), "is" if size == 1 else "are"
        raise ServingError(f"--parallel {layout} is for {ranks}, and {size} {are} started. Start as many, or {other}.")
