"""Layouts: what `--parallel` says, as data, and whether a model can be cut that way.

Terms:
    dp      ranks that each serve their own requests: attention and caches are whole on every one of them.
    tp      ranks that share the same requests: attention is cut by heads (spec 3.7), the vocabulary by rows.
    moe     how all dp·tp ranks share the routed experts: `tp` cuts every expert, `ep` gives each rank whole ones.
    rank    `dp index · tp + tp index`: the ranks of one tp group are neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, cast, get_args

from atomc.errors import AtomcError
from atomc.ops.placement import Mesh

Moe = Literal["tp", "ep"]
Tbo = Literal["auto", "prefill", "all", "off"]
_WORDS: Final[dict[str, tuple[str, ...]]] = {"moe": get_args(Moe), "tbo": get_args(Tbo)}


class LayoutError(AtomcError):
    """`--parallel` cannot be read, or the model cannot be cut so."""


@dataclass(frozen=True)
class ModelSizes:
    """The numbers of a model that a layout must divide.

    Attributes:
        heads, groups: attention heads, and the groups they are projected in. experts: routed ones. inner: columns of
            an expert's second product. vocabulary: rows of embedding and head.
        block: columns of `inner` that are rounded together (a block of the quantised activation or weight), 1 if none.
        cut: of further dims that are cut along `tp`, by what they are: how many, and how many at a time are rounded
            together, 0 for all of them.
    """

    heads: int
    groups: int
    experts: int
    inner: int
    vocabulary: int
    block: int = 1
    cut: Mapping[str, tuple[int, Sequence[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A way to put a model on `dp * tp` ranks. Prints as `--parallel` reads it, in one canonical order."""

    dp: int = 1
    tp: int = 1
    moe: Moe = "tp"
    tbo: Tbo = "off"

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    @property
    def mesh(self) -> Mesh:
        """The axes of more than one rank, the outer first."""
        return Mesh(tuple((name, size) for name, size in (("dp", self.dp), ("tp", self.tp)) if size > 1))

    def __str__(self) -> str:
        axes = [f"{name}={size}" for name, size in (("dp", self.dp), ("tp", self.tp)) if size > 1]
        words = [f"moe={self.moe}"] if axes else ["dp=1"]
        return ",".join((*axes, *words, *([f"tbo={self.tbo}"] if self.tbo != "off" else [])))

    def check(self, sizes: ModelSizes) -> None:
        """Whether the model can be cut so; all that cannot is in one error, each with the nearest that can.

        Raises:
            LayoutError
        """
        problems = list(self._problems(sizes))
        if problems:
            problems[-1] += f"; nearest legal: {' or '.join(map(str, self.nearest(sizes)))}"
        if self.tbo != "off" and self.ranks == 1:
            problems.append(f"tbo={self.tbo} has nothing to overlap: one rank has no collectives; leave tbo out")
        if problems:
            raise LayoutError(f"--parallel {self}: " + "; ".join(problems) + ".")

    def _problems(self, sizes: ModelSizes) -> Iterator[str]:
        heads = {"groups of attention heads": sizes.groups, "heads": sizes.heads}
        if (what := next((f"{n} {name}" for name, n in heads.items() if n % self.tp), None)) is not None:
            yield f"tp={self.tp} does not divide the {what}"
        if sizes.vocabulary % self.tp:
            yield f"tp={self.tp} does not divide the vocabulary of {sizes.vocabulary}"
        for what, (count, blocks) in sizes.cut.items():
            wrong = [n or count for n in blocks if self.tp > 1 and count % (self.tp * (n or count))]
            if wrong and count % self.tp == 0:
                yield f"tp={self.tp} cuts through the blocks of {wrong[0]} of the {count} {what}"
        if self.ranks == 1:
            return
        if self.moe == "ep" and sizes.experts % self.ranks:
            yield f"{self.ranks} ranks do not divide the {sizes.experts} experts (moe=ep)"
        if self.moe == "tp" and sizes.inner % (sizes.block * self.ranks):
            blocks_of = f" in blocks of {sizes.block}" if sizes.block > 1 else ""
            yield f"{self.ranks} ranks do not divide the {sizes.inner} columns{blocks_of} of an expert (moe=tp)"

    def nearest(self, sizes: ModelSizes) -> list[Layout]:
        """The legal layout with the most ranks of those with fewer, and that with the fewest of those with more."""
        units = sizes.experts if self.moe == "ep" else sizes.inner
        legal = [
            known
            for ranks in divisors(units)
            for tp in divisors(ranks)
            if not list((known := replace(self, dp=ranks // tp, tp=tp, tbo="off"))._problems(sizes))
        ]
        below = [n for n in legal if n.ranks <= self.ranks]
        above = [n for n in legal if n.ranks > self.ranks]

        def apart(other: Layout) -> tuple[int, int, int]:
            return abs(other.ranks - self.ranks), abs(other.tp - self.tp), abs(other.dp - self.dp)

        return [min(side, key=apart) for side in (below, above) if side]


def parse_layout(text: str) -> Layout:
    """The layout that `--parallel` spells: `dp=8,moe=tp`, `tp=4,dp=2,moe=ep`, in any order.

    What is left out is `dp=1`, `tp=1`, `moe=tp`, `tbo=off`.

    Raises:
        LayoutError: an unknown or repeated key, or a value that it cannot have.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals or key not in ("dp", "tp", *_WORDS):
            raise LayoutError(f"--parallel {text}: {part.strip()!r} is none of dp=N, tp=N, moe=tp|ep, {_spell('tbo')}.")
        if key in found:
            raise LayoutError(f"--parallel {text}: {key} is given twice.")
        found[key] = value
    sizes = {key: _size(text, key, found.get(key, "1")) for key in ("dp", "tp")}
    for key, words in _WORDS.items():
        if found.get(key, words[0]) not in words:
            raise LayoutError(f"--parallel {text}: {key}={found[key]} is unknown; choose {_spell(key)}.")
    return Layout(
        sizes["dp"], sizes["tp"], cast(Moe, found.get("moe", "tp")), cast(Tbo, found.get("tbo", "off"))
    )  # fmt: skip


def divisors(n: int) -> list[int]:
    """The divisors of n, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def _size(text: str, key: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()) or int(value) < 1:
        raise LayoutError(f"--parallel {text}: {key}={value} is no number of ranks; it must be 1 or more.")
    return int(value)


def _spell(key: str) -> str:
    return f"{key}=" + "|".join(_WORDS[key])
