"""The device that a kernel family's host function talks to: it allocates, and it launches.

Contract:
    A host function computes one operator of `atomc.ops` with the operator's own arguments, by `device.empty` and
    `device.launch` alone; it never reads a tensor's data, so the same function runs on a GPU, in Triton's interpreter,
    and on meta tensors, where what it launches is recorded and compiled ahead of time.

Terms:
    bucket     steps of at most `device.tokens` tokens; the choice of a configuration may depend on it.
    variant    a kernel with its argument types and constants: what is compiled, once, into one binary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from atomc.codegen.tuning import STATIC
from atomc.ops.library import made
from atomc.targets import Target

# Triton's name of each dtype; E8M0 scales and packed FP4 are bytes to a kernel.
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
    torch.int8: "i8", torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e4m3fnuz: "fp8e4b8",
    torch.float8_e5m2: "fp8e5", torch.float8_e8m0fnu: "u8", torch.bool: "i1",
}  # fmt: skip


class Device(Protocol):
    """Where a host function runs.

    Attributes:
        target: what it compiles for. tokens: the most tokens of a step in this bucket.
    """

    target: Target
    tokens: int

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory; it is the operator's until the next step of the plan."""

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: Mapping[str, Any], constants: Mapping[str, Any],
        warps: int = 4, stages: int = 3, origin: str = STATIC,
    ) -> None:  # fmt: skip
        """Launch a Triton kernel; `args` are run-time arguments by parameter name, in the kernel's order.

        `origin`: who chose the configuration.
        """

    def library(self, name: str, arguments: Callable[[], Sequence[Tensor]]) -> bool:
        """Offer a library's call (`atomc.ops.library`) in place of what is launched next; true if it was made.

        `arguments` launches what goes before it, and gives its tensors.
        """


@dataclass
class TorchDevice:
    """Runs kernels through Triton itself: on a GPU, or on the CPU in the interpreter (`TRITON_INTERPRET=1`).

    Attributes:
        libraries: names of the library's calls to make, where they are offered and fit. offered, made: which were.
    """

    target: Target
    tokens: int
    device: str = "cuda"
    libraries: frozenset[str] = frozenset()
    offered: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Poisoned, so that what a kernel does not write is seen."""
        out = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        out.view(torch.uint8).fill_(0xFF) if out.numel() else None
        return out

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: Mapping[str, Any], constants: Mapping[str, Any],
        warps: int = 4, stages: int = 3, origin: str = STATIC,
    ) -> None:  # fmt: skip
        """Launch through Triton's own launcher."""
        given = {name: _bytes(value) for name, value in args.items()}
        kernel[grid](**given, **constants, num_warps=warps, num_stages=stages)

    def library(self, name: str, arguments: Callable[[], Sequence[Tensor]]) -> bool:
        """Make the call, if it is one of `libraries`."""
        self.offered.add(name)
        if name not in self.libraries or not made(name, arguments()):
            return False
        self.made.add(name)
        return True


def _bytes(value: Any) -> Any:
    """Tensors of a dtype that Triton has no name for, as bytes."""
    if isinstance(value, Tensor) and value.dtype == torch.float8_e8m0fnu:
        return value.view(torch.uint8)
    return value


@dataclass(frozen=True)
class Variant:
    """What is compiled.

    Attributes:
        kernel: the Triton function. signature: run-time parameter -> Triton type, in order.
        constants: compile-time parameters. warps, stages: of the launch.
        aligned: parameters that are multiples of 16 (pointers all are).
    """

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int
    aligned: frozenset[str]

    @property
    def name(self) -> str:
        """The kernel's name."""
        name: str = self.kernel.fn.__name__
        return name


@dataclass
class Recorder:
    """Runs host functions on meta tensors and keeps the variants they launch, with each launch's grid."""

    target: Target
    tokens: int
    launches: list[tuple[Variant, tuple[int, ...]]] = field(default_factory=list)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A meta tensor."""
        return torch.empty(tuple(shape), dtype=dtype, device="meta")

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: Mapping[str, Any], constants: Mapping[str, Any],
        warps: int = 4, stages: int = 3, origin: str = STATIC,
    ) -> None:  # fmt: skip
        """Record the launch."""
        signature = tuple((name, type_of(value)) for name, value in args.items())
        aligned = frozenset(name for name, kind in signature if kind.startswith("*"))
        variant = Variant(kernel, signature, tuple(sorted(constants.items())), warps, stages, aligned)
        self.launches.append((variant, tuple(grid)))

    def library(self, name: str, arguments: Callable[[], Sequence[Tensor]]) -> bool:
        """Record what goes before the call, and go on with what does without it."""
        arguments()
        return False

    @property
    def variants(self) -> list[Variant]:
        """Each distinct variant once."""
        return list(dict.fromkeys(variant for variant, _ in self.launches))


def type_of(value: Any) -> str:
    """Triton's type of a run-time argument: a pointer, a 32-bit integer or float; None is a null pointer."""
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if value is None:
        return "*i8"
    if isinstance(value, bool):
        raise TypeError("a flag is a constant of a kernel, not an argument")
    return "i32" if isinstance(value, (int, torch.SymInt)) else "fp32"


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)
