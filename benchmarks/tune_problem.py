"""What `benchmarks.tune` asks of a problem that it tunes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Protocol

import torch
from torch import Tensor

from atomc.codegen.device import Device, TorchDevice
from atomc.codegen.kernels.gemm import Tiles
from atomc.codegen.kernels.moe_config import Config

SAMPLE = {16: 1, 64: 64, 256: 256, 1024: 1024, 8192: 8192}  # tokens that stand for a bucket; 16 is for decode
Configuration = Tiles | Config


def table_of(found: Configuration) -> dict[str, int | bool]:
    """What goes into the table."""
    if isinstance(found, Config):
        return found.table
    return {f.name: getattr(found, f.name) for f in fields(found) if f.name != "origin"}


class JitDevice(TorchDevice):
    """Allocates without poison: that would be timed too."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)


class Problem(Protocol):
    """A kernel with the constants of one problem, in one bucket.

    Attributes:
        kernel: as `codegen.tuning` names it. tokens: of the bucket. key: the problem, as `codegen.tuning` looks it up.
        bytes, flops: of one call.
    """

    @property
    def kernel(self) -> str: ...

    @property
    def tokens(self) -> int: ...

    @property
    def key(self) -> dict[str, int | str]: ...

    @property
    def bytes(self) -> float: ...

    @property
    def flops(self) -> float: ...

    def calls(self, device: Device, sets: int, place: str = "cuda") -> list[Callable[[], Tensor]]:
        """Calls on `sets` sets of random inputs; one set may be of fewer experts: it is for a compile."""

    def agrees(self, given: Tensor, expected: Tensor) -> bool:
        """Whether two results are one, within their rounding."""

    def candidates(self, device: Device) -> list[Configuration]:
        """Configurations worth trying, the static model's first."""
