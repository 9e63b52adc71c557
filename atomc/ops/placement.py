"""Placements: which part of a tensor a rank of a mesh holds. What operators make of them: `placement_rules.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from atomc.errors import AtomcError


class PlacementError(AtomcError):
    """An operator cannot have inputs placed so; the message says which, and where they come from."""


@dataclass(frozen=True)
class Mesh:
    """Named axes with their sizes, the outer first; a rank is its coordinates in row-major order."""

    axes: tuple[tuple[str, int], ...]

    @property
    def ranks(self) -> int:
        return math.prod(size for _, size in self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    def size(self, axis: str) -> int:
        """Ranks along an axis; 1 if the mesh has it not."""
        return dict(self.axes).get(axis, 1)

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Where a rank is on each axis."""
        found = []
        for _, size in reversed(self.axes):
            rank, at = divmod(rank, size)
            found.append(at)
        return tuple(reversed(found))

    def groups(self, axis: str) -> list[list[int]]:
        """The ranks that differ in that axis alone, ascending: the members of each process group."""
        if axis not in self.names:
            return [[rank] for rank in range(self.ranks)]
        at = self.names.index(axis)
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.ranks):
            where = self.coordinate(rank)
            found.setdefault(where[:at] + where[at + 1 :], []).append(rank)
        return list(found.values())


@dataclass(frozen=True)
class Replicate:
    """Every rank holds all of it."""

    def __str__(self) -> str:
        return "Replicate"


@dataclass(frozen=True)
class Shard:
    """Every rank holds a part along `dim`.

    Attributes:
        parts: the dim is that many equal parts end to end, and each of them is cut (gate rows, then up rows).
        by: what says who holds a row: nothing (its number), `destination` (lying in order of the ranks they go to),
            `expert` (each where its experts are), `slot` (and its choices are numbers of the rank's own experts), `own`
            (picked of whole tokens, for the rank's own experts), `column` (each rank's columns of all rows, on every
            rank; along the axes that cut those rows, `block`).
    """

    dim: int
    parts: int = 1
    by: Literal["", "destination", "expert", "slot", "own", "column", "block"] = ""

    def __str__(self) -> str:
        more = (f", parts={self.parts}" if self.parts > 1 else "") + (f", by {self.by}" if self.by else "")
        return f"Shard({self.dim}{more})"


@dataclass(frozen=True)
class Partial:
    """Every rank holds a tensor of the full shape, and the value is their sum.

    `own`: of choices, where each rank knows those of its own experts and has -1 for the rest: what runs experts reads
    it, and nothing else.
    """

    reduce: Literal["sum", "own"] = "sum"

    def __str__(self) -> str:
        return f"Partial({self.reduce})"


Placement = Replicate | Shard | Partial
REPLICATE: Final = Replicate()
PARTIAL: Final = Partial()
OWN: Final = Partial("own")


@dataclass(frozen=True)
class Operand:
    """A tensor argument: its placement on the axis at hand, its sizes there (symbols by their example), its dtype."""

    placement: Placement
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Size:
    """A number as an argument, by its example; `own`: the rank's own: of rows, so that what is made of it is a part, or
    what it has first."""

    own: bool
    value: int = 1


@dataclass(frozen=True)
class Call:
    """One use of an operator: its arguments with tensors as operands, and the sizes of its results."""

    op: str
    args: tuple[Any, ...]
    results: tuple[tuple[int, ...], ...]

    def operands(self) -> list[Operand | None]:
        """The tensor arguments in order, lists opened; None where an optional one is left out."""
        found: list[Any] = []
        for arg in self.args:
            found += arg if isinstance(arg, (list, tuple)) else [arg]
        return [a for a in found if a is None or isinstance(a, Operand)]

    def first(self) -> Operand:
        """The first tensor argument."""
        operand = self.operands()[0]
        assert operand is not None
        return operand
