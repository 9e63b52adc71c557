"""Sizes of a rank's graph and plan beside those of one rank's, by the names of their symbols."""

from collections.abc import Mapping
from typing import Final

from atomc.ops.placement import Mesh

AGREED: Final = "P"  # rows of a message, at least every rank's tokens: all ranks agree on it before a step
INDEX: Final = {"dp": "dp_index", "tp": "tp_index"}  # a rank's index on each axis
COUNTED: Final = "X"  # X0, X1, ...: numbers of rows that only running tells
STEP: Final = ("T", "B", "N4", "NH", "L")  # sizes of a step: `artifact.plan.SYMBOLS` says of what
HALVES: Final = (0, 1)  # of a step in two micro-batches


def of_half(name: str, half: int) -> str:
    """A size of a step, or `P`, of one micro-batch: `T_0`."""
    return f"{name}_{half}"


def of_region(bounds: Mapping[str, int], halves: bool) -> dict[str, int]:
    """Those of the sizes that a region may use: of the whole step, or of its two micro-batches."""
    whole = {*STEP, AGREED}
    parts = {of_half(name, half) for name in whole for half in HALVES}
    return {name: size for name, size in bounds.items() if name not in (whole if halves else parts)}


def half_rows(most: int) -> tuple[int, int]:
    """Tokens, or rows of messages, of each half of a step of so many: it is cut at the middle."""
    return (most + 1) // 2, most // 2


def bounds(one: Mapping[str, int], mesh: Mesh, counted: int, halves: bool = False) -> dict[str, int]:
    """The largest values of the sizes of a rank, by those of one rank alone.

    Args:
        counted: how many are counted. halves: the sizes of two micro-batches too. A request, and a window that is
            completed, may be in either; of logits there is one row at least, and no more than tokens.
    """
    most = one["T"]
    found = {
        **one, AGREED: most, **{INDEX[axis]: size - 1 for axis, size in mesh.axes},
        **{f"{COUNTED}{i}": most for i in range(counted)},
    }  # fmt: skip
    for half in HALVES if halves else ():
        rows = half_rows(most)[half]
        found |= {of_half(name, half): one[name] for name in STEP}
        found |= {
            of_half("T", half): rows,
            of_half(AGREED, half): rows,
            of_half("L", half): min(max(one["L"], 1), rows),
        }
    return found
