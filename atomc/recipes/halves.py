"""Pairs evaluated once: quantising gives codes and scales together, but each is a weight of its own.

Terms:
    half   one part, codes or scales, of what a `Quantize` or `Convert` gives.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import msgspec
import torch
from torch import Tensor

from atomc.recipes.steps import Convert, Part, Quantize, Recipe, children

HELD_BYTES: Final = 256 << 20
Half = Quantize | Convert
_OTHER: Final[dict[Part, Part]] = {"codes": "scales", "scales": "codes"}


class _Kept(NamedTuple):
    """Where a half lies in the slab."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    nbytes: int


class Halves:
    """Keeps the half that was made along with another until it is asked for; what does not fit is made again.

    What is kept lies in one mapping of its own, filled from the front, and from the front again when all is taken. As
    tensors, hundreds of them would be scattered over the heap among the much larger ones that come and go, and each
    would spoil a gap for the next: the heap grew by gigabytes.

    Args:
        recipes: all that will be evaluated: nothing is kept that none of them asks for.
        most: bytes kept at a time; the scales of a V4-Flash layer's experts, stacked, are half of the default.
    """

    def __init__(self, recipes: Iterable[Recipe], most: int = HELD_BYTES) -> None:
        self._wanted: Counter[Half] = Counter(half for recipe in recipes for half in _halves(recipe))
        self._kept: dict[Half, _Kept] = {}
        self._most, self._end = most, 0
        self._slab: mmap.mmap | None = None  # its pages take memory when they are first written

    def take(self, half: Half) -> Tensor | None:
        """The half if it is there; it is kept no longer."""
        self._wanted[half] -= 1
        kept = self._kept.pop(half, None)
        if kept is None or self._slab is None:
            return None
        data = torch.frombuffer(self._slab, dtype=torch.uint8, count=kept.nbytes, offset=kept.start).clone()
        if not self._kept:
            self._end = 0
            self._slab.madvise(mmap.MADV_DONTNEED)  # gives the pages back
        return data.view(kept.dtype).view(kept.shape)

    def part(self, half: Half, pair: tuple[Tensor, Tensor]) -> Tensor:
        """The half of a pair (codes, scales) that was asked for; the other is kept if it will be."""
        codes, scales = pair
        mine, rest = (codes, scales) if half.part == "codes" else (scales, codes)
        other = msgspec.structs.replace(half, part=_OTHER[half.part])
        if self._wanted[other] > 0 and other not in self._kept and 0 < rest.nbytes <= self._most - self._end:
            self._keep(other, rest)
        return mine

    def _keep(self, half: Half, data: Tensor) -> None:
        if self._slab is None:
            self._slab = mmap.mmap(-1, self._most)
        room = torch.frombuffer(self._slab, dtype=torch.uint8, count=data.nbytes, offset=self._end)
        room.copy_(data.contiguous().flatten().view(torch.uint8))
        self._kept[half] = _Kept(self._end, data.shape, data.dtype, data.nbytes)
        self._end += data.nbytes


def _halves(recipe: Recipe) -> Iterator[Half]:
    if isinstance(recipe, Half):
        yield recipe
    for child in children(recipe):
        yield from _halves(child)
