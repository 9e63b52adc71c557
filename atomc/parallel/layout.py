"""Layouts: what `--parallel` says, as data, and whether a model can be cut that way.

Terms:
    dp      ranks that each serve their own requests: attention and caches are whole on every one of them.
    tp      ranks that share the same requests: attention is cut by heads (spec 3.7), the vocabulary by rows.
    moe     how all dp·tp ranks share the routed experts: `tp` cuts every expert, `ep` gives each rank whole ones.
    rank    `dp index · tp + tp index`: the ranks of one tp group are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    heads: int
    groups: int
    experts: int
    inner: int
    vocabulary: int
    block: int = 1


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
        problems = [p for p in (self._heads(sizes), self._vocabulary(sizes), self._experts(sizes)) if p]
        if self.tbo != "off" and self.ranks == 1:
            problems.append(f"tbo={self.tbo} has nothing to overlap: one rank has no collectives; leave tbo out")
        if problems:
            raise LayoutError(f"--parallel {self}: " + "; ".join(problems) + ".")

    def _heads(self, sizes: ModelSizes) -> str | None:
        if sizes.groups % self.tp == 0 and sizes.heads % self.tp == 0:
            return None
        what = f"{sizes.groups} groups of attention heads" if sizes.groups % self.tp else f"{sizes.heads} heads"
        legal = [n for n in divisors(sizes.groups) if sizes.heads % n == 0]
        return f"tp={self.tp} does not divide the {what}; {_nearest('tp', self.tp, legal)}"

    def _vocabulary(self, sizes: ModelSizes) -> str | None:
        if sizes.vocabulary % self.tp == 0:
            return None
        legal = [n for n in divisors(sizes.vocabulary) if sizes.groups % n == 0]
        return f"tp={self.tp} does not divide the vocabulary of {sizes.vocabulary}; {_nearest('tp', self.tp, legal)}"

    def _experts(self, sizes: ModelSizes) -> str | None:
        units = sizes.experts if self.moe == "ep" else sizes.inner // sizes.block
        if self.ranks == 1:
            return None
        if units % self.ranks == 0 and (self.moe == "ep" or sizes.inner % sizes.block == 0):
            return None
        if self.moe == "ep":
            what = f"the {sizes.experts} experts"
        else:
            blocks = f" in blocks of {sizes.block}" if sizes.block > 1 else ""
            what = f"the {sizes.inner} columns{blocks} of an expert"
        axis, size, other = ("dp", self.dp, self.tp) if self.dp > 1 else ("tp", self.tp, 1)
        legal = [n // other for n in divisors(units) if n % other == 0]
        if axis == "tp":
            legal = [n for n in legal if sizes.groups % n == 0]
        return f"{self.ranks} ranks do not divide {what} (moe={self.moe}); {_nearest(axis, size, legal)}"


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


def _nearest(axis: str, size: int, legal: list[int]) -> str:
    below, above = [n for n in legal if n < size][-1:], [n for n in legal if n > size][:1]
    if not below and not above:
        return f"no {axis} fits"
    return "nearest legal: " + " or ".join(f"{axis}={n}" for n in below + above)
