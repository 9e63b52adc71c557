"""Sizes of a rank's graph and plan beside those of one rank's, by the names of their symbols."""

from collections.abc import Mapping
from typing import Final

from atomc.ops.placement import Mesh

AGREED: Final = "P"  # rows of a message, at least every rank's tokens: all ranks agree on it before a step
INDEX: Final = {"dp": "dp_index", "tp": "tp_index"}  # a rank's index on each axis
COUNTED: Final = "X"  # X0, X1, ...: numbers of rows that only running tells


def bounds(one: Mapping[str, int], mesh: Mesh, counted: int) -> dict[str, int]:
    """The largest values of the sizes of a rank, by those of one rank alone; `counted`: how many are counted."""
    most = one["T"]
    return {
        **one, AGREED: most, **{INDEX[axis]: size - 1 for axis, size in mesh.axes},
        **{f"{COUNTED}{i}": most for i in range(counted)},
    }  # fmt: skip
