"""`mesh_of`: how many ranks a layout shares requests among, and how many run the same ones."""

from __future__ import annotations

from typing import NamedTuple

from atomc.runtime.errors import ServingError


class RankMesh(NamedTuple):
    """`dp` data-parallel ranks of `tp` ranks each; rank `d * tp + t`."""

    dp: int
    tp: int

    @property
    def size(self) -> int:
        return self.dp * self.tp


def read_mesh(parallel: str) -> RankMesh:
    """The axes in a layout's text, `dp=2,tp=2,moe=ep`; what else it says is for whoever loads the artifact.

    Raises:
        ServingError: an axis is no number of ranks.
    """
    found = {"dp": 1, "tp": 1}
    for part in parallel.split(","):
        axis, _, size = (each.strip() for each in part.partition("="))
        if axis not in found:
            continue
        if not (size.isascii() and size.isdigit()) or int(size) < 1:
            raise ServingError(f"--parallel {parallel}: {axis}={size} is no number of ranks; it must be 1 or more.")
        found[axis] = int(size)
    return RankMesh(**found)


def mesh_of(parallel: str | None, size: int) -> RankMesh:
    """The mesh of a run of `size` ranks; without a layout each has the whole model.

    Raises:
        ServingError: the layout is for another number of ranks.
    """
    if parallel is None:
        return RankMesh(size, 1)
    mesh = read_mesh(parallel)
    if mesh.size != size:
        raise ServingError(f"--parallel {parallel} is for {mesh.size} ranks, and {size} are started.")
    return mesh
