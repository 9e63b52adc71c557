"""A call of a graph as kernel launches: its host function is run on the call's fake values, once for each bucket.

Contract:
    Every argument of a launch is a slot, a size in the plan's symbols, a number or null. What the host function
    allocates is a result of the operator, or scratch that lives during the step. Within a bucket a host function
    launches the same kernels whatever the sizes: what it decides on fake sizes is held against real ones (`differs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from atomc.artifact.expr import evaluate
from atomc.artifact.plan import Bucket, Scalar, Size, Slot
from atomc.codegen.aot import key
from atomc.codegen.device import Recorder, Variant
from atomc.codegen.hosts import Host
from atomc.codegen.tuning import STATIC
from atomc.targets import Target

SizeOf = Callable[[Any], Scalar]
Place = tuple[int, str]


class Call(NamedTuple):
    """A launch; tensors among its arguments are still fake."""

    variant: Variant
    grid: tuple[Any, ...]
    arguments: list[Any]
    origin: str


@dataclass
class Offer:
    """A library's call, its arguments, and what is launched before it."""

    name: str
    arguments: list[Any]
    launches: list[Call]


@dataclass
class Made:
    """The launches of one bucket.

    Attributes:
        results: of the host function. allocated: everything it allocated, in order. library: what it offers instead.
    """

    tokens: int
    launches: list[Call]
    results: list[Tensor]
    allocated: list[Tensor]
    library: Offer | None


@dataclass
class SymbolicRecorder(Recorder):
    """Records launches with their symbolic grids and arguments."""

    calls: list[Call] = field(default_factory=list)
    offer: Offer | None = None
    allocated: list[Tensor] = field(default_factory=list)
    place: str = "cpu"

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A fake tensor; the caller runs the host function inside the values' fake mode."""
        made = torch.empty(tuple(shape), dtype=dtype, device=self.place)
        self.allocated.append(made)
        return made

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: Any, constants: Any, warps: int = 4, stages: int = 3,
        origin: str = STATIC,
    ) -> None:  # fmt: skip
        """Record a launch and its arguments."""
        super().launch(kernel, grid, args, constants, warps, stages)
        self.calls.append(Call(self.launches[-1][0], tuple(grid), list(args.values()), origin))

    def library(self, name: str, arguments: Callable[[], Sequence[Tensor]]) -> bool:
        """Record the call and what goes before it; a host function offers one at most."""
        if self.offer is not None:
            raise ValueError(f"a host function offers {self.offer.name} and {name}; a plan names one call")
        kept, self.calls = self.calls, []
        given = list(arguments())
        self.offer, self.calls = Offer(name, given, self.calls), kept
        return False


def record(
    host: Host, arguments: Sequence[Any], kwargs: dict[str, Any], target: Target, tokens: int, mode: FakeTensorMode
) -> Made:
    """Run a host function on fake arguments; to look at their sizes must not narrow them."""
    device = SymbolicRecorder(target, tokens)
    with mode, nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards():
        result = host(device, *arguments, **kwargs)
    results = [] if result is None else list(result) if isinstance(result, (list, tuple)) else [result]
    return Made(tokens, device.calls, results, device.allocated, device.offer)


def differs(
    bucket: Bucket, tokens: int, host: Host, arguments: Sequence[Any], kwargs: dict[str, Any], target: Target,
    size_of: SizeOf, symbols: Mapping[str, int],
) -> str:  # fmt: skip
    """How the plan's launches differ from what the host function launches for sizes `symbols`; empty: not at all.

    Args:
        tokens: the most rows of the call, as it was recorded for.
    """

    def real(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [real(v) for v in value]
        if isinstance(value, torch.SymInt):
            return _evaluated(size_of(value), symbols)
        if not isinstance(value, Tensor):
            return value
        shape, stride = ([real(n) for n in sizes] for sizes in (value.shape, value.stride()))
        return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")

    device = SymbolicRecorder(target, tokens, place="meta")
    host(device, *map(real, arguments), **kwargs)
    calls, launches = device.calls + (device.offer.launches if device.offer else []), bucket.every_launch
    if len(calls) != len(launches):
        return f"{len(launches)} launches, but {len(calls)} for {symbols}"
    offered, named = (x.name if x else "none" for x in (device.offer, bucket.library))
    if offered != named:
        return f"the library's call is {named}, but for {symbols} {offered}"
    for launch, (variant, grid, given, _) in zip(launches, calls, strict=True):
        planned = [_evaluated(g, symbols) for g in launch.grid]
        if launch.kernel != kernel_key(variant, target) or planned != list(grid):
            return f"{variant.name} has grid {launch.grid}, which is {planned}, but for {symbols} grid {list(grid)}"
        for known, value in zip(launch.args, given, strict=True):
            if isinstance(value, int) and _evaluated(known, symbols) != value:
                return f"{variant.name} is given {known}, but for {symbols} {value}"
    return ""


def _evaluated(size: Any, symbols: Mapping[str, int]) -> Any:
    return evaluate(size.expr if isinstance(size, Size) else size, symbols)


def argument(value: Any, slots: Mapping[Place, int], size_of: SizeOf) -> Scalar:
    """A launch's argument as the plan has it; `slots` maps where a fake tensor begins to its slot."""
    if isinstance(value, Tensor):
        if place(value) not in slots:
            raise ValueError(f"a kernel's argument {list(value.shape)} begins inside another tensor")
        return Slot(slots[place(value)])
    if value is None or isinstance(value, float):
        return value
    return size_of(value)


def place(value: Tensor) -> Place:
    """Where a tensor begins: its storage, and the offset in it."""
    return value.untyped_storage()._cdata, str(value.storage_offset())


def kernel_key(variant: Variant, target: Target) -> str:
    """The key of a kernel in the artifact."""
    return key(variant, target)
