"""`BlockPool`: hands out the numbers of equal pieces of a cache (blocks, window pages, slots) and takes them back."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Numbers `reserved` to `count - 1`; the ones below `reserved` are dummies that are never handed out.

    Contract: a number has one owner at a time. Giving back what is not held, or taking from an empty pool, is a
    defect of the caller and raises `AssertionError`.
    """

    def __init__(self, name: str, count: int, *, reserved: int = 1) -> None:
        self.name = name
        self.capacity = max(0, count - reserved)
        self._reserved = reserved
        self._held = bytearray(count)
        self._free = list(range(count - 1, reserved - 1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.capacity - len(self._free)

    def take(self) -> int:
        """The number given back last, which is the one most likely to be still in a cache."""
        assert self._free, f"{self.name} pool: take from an empty pool of {self.capacity}"
        number = self._free.pop()
        self._held[number] = 1
        return number

    def give(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            assert self._held[number], f"{self.name} pool: {number} is given back but nobody holds it"
            self._held[number] = 0
            self._free.append(number)

    def check_idle(self) -> None:
        """Raises `AssertionError` unless every number is back, once: called whenever no request is left."""
        whole = sorted(self._free) == list(range(self._reserved, self._reserved + self.capacity))
        assert whole, f"{self.name} pool leaks while idle: {self.used} of {self.capacity} not given back"
