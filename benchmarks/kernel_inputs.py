"""Random inputs of operators, on any device (`meta` too): what the cases of `kernel_cases` are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atomc.formats import FP4_ACTIVATION, FP8_ACTIVATION, FP8_ROW_CHANNELS, Layout, RowLayout

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32
MAIN, INDEX = f"448:{FP8_ROW_CHANNELS}+64", f"128:{FP4_ACTIVATION}+0"
ACT = str(FP8_ACTIVATION)
PAGE, BLOCK = 64, 256  # window rows of a page; tokens of a block
TEMPLATE = 64  # pages of random rows that are made; the others repeat them


@dataclass
class Inputs:
    """Makes inputs on `device`; what is `kept` (experts) is made once."""

    device: str
    _kept: dict[Any, Any] = field(default_factory=dict)

    def normal(self, *shape: int, dtype: torch.dtype = BF16, size: float = 1.0) -> Tensor:
        """Normally distributed."""
        return torch.randn(shape, dtype=dtype, device=self.device) * size

    def arange(self, start: int, stop: int) -> Tensor:
        """Consecutive int32."""
        return torch.arange(start, stop, dtype=I32, device=self.device)

    def codes(self, shape: tuple[int, ...], layout: Layout) -> tuple[Tensor, Tensor]:
        """Codes without NaN and scales near those of a release."""
        stored = layout.code_shape(shape)
        if layout.element.bits == 4:
            codes = torch.randint(-128, 128, stored, dtype=torch.int8, device=self.device)
        else:
            codes = (torch.randn(stored, device=self.device) * 40).clamp(-440, 440).to(layout.element.storage)
        scales = torch.randint(115, 123, layout.scale_shape(shape), dtype=torch.uint8, device=self.device)
        return codes, scales.view(torch.float8_e8m0fnu)

    def pages(self, count: int, page: int, rows: str) -> Tensor:
        """A pool of packed pages [count, page bytes] with random rows."""
        layout = RowLayout.parse(rows)
        size = layout.page_bytes(page)
        if self.device == "meta":
            return torch.empty((count, size), dtype=torch.uint8, device="meta")
        made = torch.zeros((min(count, TEMPLATE), size), dtype=torch.uint8, device=self.device)
        flat = torch.arange(made.shape[0] * page, device=self.device)
        layout.store(made, flat, layout.pack(torch.randn(len(flat), layout.narrow + layout.wide, device=self.device)))
        return made[torch.randint(0, made.shape[0], (count,), device=self.device)]

    def table(self, requests: int, columns: int) -> Tensor:
        """Pages of each request, scattered; page 0 is reserved."""
        order = torch.randperm(requests * columns, device=self.device) + 1
        return order.view(requests, columns).int()

    def angles(self, tokens: int, pairs: int = 32) -> tuple[Tensor, Tensor]:
        """cos and sin [tokens, pairs]."""
        theta = torch.rand(tokens, pairs, device=self.device) * 6
        return theta.cos(), theta.sin()

    def kept(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave the first time."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    @property
    def names(self) -> set[Any]:
        """What is kept."""
        return set(self._kept)

    def drop(self) -> None:
        """Forget what is kept."""
        self._kept.clear()


@dataclass(frozen=True)
class Step:
    """Tokens of a step: `length` of each of `requests`, the last of each at position `context` - 1."""

    requests: int
    length: int
    context: int

    @property
    def tokens(self) -> int:
        """Of the step."""
        return self.requests * self.length

    @property
    def title(self) -> str:
        """As a table shows it."""
        new = f"decode {self.requests}" if self.length == 1 else f"prefill {self.length}"
        return f"{new} at {self.context}"

    def positions(self, at: Inputs) -> Tensor:
        """[T] int32."""
        return at.arange(self.context - self.length, self.context).repeat(self.requests)

    def owners(self, at: Inputs) -> Tensor:
        """The request of each token, [T] int32."""
        return at.arange(0, self.requests).repeat_interleave(self.length)

    def starts(self, at: Inputs) -> Tensor:
        """First token of each request, [B + 1] int32."""
        return at.arange(0, self.requests + 1) * self.length

    def visible(self, ratio: int) -> list[int]:
        """Compressed rows that each token of one request sees."""
        return [(p + 1) // ratio for p in range(self.context - self.length, self.context)]

    def ends(self, at: Inputs, ratio: int) -> Tensor:
        """Indices of the tokens that complete a window, [N] int32; -1 where none does."""
        found = [i for i, p in enumerate(range(self.context - self.length, self.context)) if (p + 1) % ratio == 0]
        every = [r * self.length + i for r in range(self.requests) for i in found]
        return torch.tensor(every or [-1], dtype=I32, device=at.device)
