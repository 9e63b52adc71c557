"""The plan for many ranks: per layout, what a rank holds of each weight, and which calls a step of each kind makes.

Every rank of a layout runs the same calls. A step's kind is what all ranks agreed on before it, so that nothing that
one rank alone knows chooses between forms: the table has no place to say it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal, TypeAlias

import msgspec

from atomc.artifact.plan import CallPlan, ProgramPlan
from atomc.errors import AtomcError
from atomc.ops.placement import REPLICATE, Mesh, Placement, Shard
from atomc.parallel.layout import parse_layout
from atomc.recipes import Load, Recipe, TensorSpec, output_spec, part_of

Kind: TypeAlias = Literal["prefill", "decode"]
KINDS: Final[tuple[Kind, ...]] = ("prefill", "decode")
FILE: Final = "ranks.json"


class Cut(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A weight is cut along `dim` among the ranks of an axis; each of `parts` equal runs of the dim is."""

    axis: str
    dim: int
    parts: int = 1


class FormPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to run a step: the calls in order, and the memory that it takes (see `ProgramPlan`).

    `halves`: in two micro-batches (see `RegionPlan`).
    """

    calls: list[CallPlan]
    values_bytes: int
    arena_bytes: int
    halves: bool = False


class Overlap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From messages of `least` rows on, steps take a form in two micro-batches."""

    form: str
    least: int


class RanksPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layout.

    Attributes:
        layout: as `--parallel` says it. axes: of the mesh with their sizes, the outer first; a rank is its place in
            row-major order.
        symbols: largest values of the sizes, those of the ranks included.
        cuts: weight, by its name in a region -> how it is cut, the outer axis first; one that is not here is whole.
        forms: name -> what a step runs. steps: kind of a step -> form. A step is `prefill` where some rank computes a
            part of a prompt. overlap: kind of a step -> which of them take another form, in two micro-batches.
        why: kind of a step -> why it is, or is not, run so.
    """

    layout: str
    axes: list[tuple[str, int]]
    symbols: dict[str, int]
    cuts: dict[str, list[Cut]]
    forms: dict[str, FormPlan]
    steps: dict[Kind, str]
    overlap: dict[Kind, Overlap] = {}
    why: dict[Kind, str] = {}

    def form(self, kind: Kind, rows: int) -> str:
        """The form of a step of that kind with so many rows in a message, which all ranks know."""
        known = self.overlap.get(kind)
        return known.form if known is not None and rows >= known.least else self.steps[kind]

    @property
    def mesh(self) -> Mesh:
        return Mesh(tuple(self.axes))

    def program(self, form: str, whole: ProgramPlan) -> ProgramPlan:
        """A form as a program; state is a rank's own, of the shapes of one rank."""
        found = self.forms[form]
        return ProgramPlan(found.calls, self.symbols, whole.states, found.values_bytes, found.arena_bytes)

    def regions(self) -> list[str]:
        """Names of all regions that its forms call."""
        return sorted({call.region for form in self.forms.values() for call in form.calls})

    def placement(self, weight: str, axis: str) -> Placement:
        """How a weight lies along an axis."""
        return next((Shard(c.dim, c.parts) for c in self.cuts.get(weight, ()) if c.axis == axis), REPLICATE)


def cuts_of(placements: Mapping[str, Placement]) -> list[Cut]:
    """Placements by axis, the outer first, as cuts."""
    return [Cut(axis, p.dim, p.parts) for axis, p in placements.items() if isinstance(p, Shard)]


def part_recipe(cuts: Iterable[Cut], mesh: Mesh, rank: int, name: str, spec: TensorSpec) -> Recipe:
    """The recipe of a rank's part of the weight `name`, which has shape and dtype `spec` in the artifact.

    Raises:
        RecipeError: it cannot be cut so.
    """
    index = dict(zip(mesh.names, mesh.coordinate(rank), strict=True))
    recipe: Recipe = Load(name)
    for cut in cuts:
        at, count = index[cut.axis], mesh.size(cut.axis)
        recipe = part_of(recipe, cut.dim, at, count, lambda r: output_spec(r, lambda _: spec), cut.parts)
    return recipe


class NoLayoutError(AtomcError):
    """An artifact has no such layout; the message lists those that it has."""


def find(plans: Iterable[RanksPlan], layout: str, folder: str) -> RanksPlan:
    """The plan of a layout, spelled in any order.

    Raises:
        NoLayoutError, LayoutError
    """
    wanted = str(parse_layout(layout))
    known = {plan.layout: plan for plan in plans}
    if wanted not in known:
        raise NoLayoutError(
            f"{folder} is not compiled for {wanted}; it has {', '.join(['dp=1', *known])}. Choose one of these, or "
            f"compile the model again: `atomc compile MODEL --parallel {wanted}`, with a --parallel for each layout."
        )
    return known[wanted]
