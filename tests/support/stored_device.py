"""Kernels compiled on one machine and launched on another: what the gpu lane runs is what an artifact holds.

`record` finds the variants that cases launch, on a machine without a GPU; `StoredDevice` launches their binaries by the
runtime's launcher. A variant is found by what it is asked for: not by its source, which may be compiled by another
Triton there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomc.artifact.kernels import KernelFacts, read_kernels
from atomc.codegen.device import Recorder, Variant, type_of
from atomc.codegen.source import source_of
from atomc.ops.library import made
from atomc.runtime.launcher import Kernel, load_kernel
from atomc.targets import get_target
from tests.support.kernel_cases import Case


def label(
    kernel: Any, signature: Sequence[tuple[str, str]], constants: Mapping[str, Any], warps: int, stages: int
) -> str:
    """The name of a variant's binary."""
    source = source_of(kernel)
    known = [kernel.fn.__name__, source or kernel.fn.__module__, list(signature), sorted(map(str, constants.items()))]
    return hashlib.sha256(json.dumps([*known, warps, stages]).encode()).hexdigest()[:20]


def label_of(variant: Variant) -> str:
    """The name of a recorded variant's binary."""
    return label(variant.kernel, variant.signature, dict(variant.constants), variant.warps, variant.stages)


def record(case: Case, target: str) -> list[Variant]:
    """The variants that a case launches."""
    recorder = Recorder(get_target(target), case.tokens)
    try:
        case.host(recorder, *[_meta(a) for a in case.make()])
    except (AssertionError, RuntimeError):
        if not recorder.launches:  # else the case looked at results, and a meta tensor has none
            raise
    return recorder.variants


def _meta(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_meta(a) for a in argument]
    return argument.to("meta") if isinstance(argument, Tensor) else argument


class StoredDevice:
    """Launches binaries of a folder; memory is poisoned, so that what a kernel does not write is seen."""

    def __init__(self, folder: Path, target: str) -> None:
        self.target, self.tokens = get_target(target), 0
        self._folder, self._facts = folder, read_kernels(folder)
        self._loaded: dict[str, Kernel] = {}
        self.libraries: frozenset[str] = frozenset()
        self.offered: set[str] = set()
        self.made: set[str] = set()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Poisoned memory."""
        out = torch.empty(tuple(shape), dtype=dtype, device="cuda")
        if out.numel():
            out.view(torch.uint8).fill_(0xFF)
        return out

    def library(self, name: str, arguments: Callable[[], Sequence[Tensor]]) -> bool:
        """Make the call, if it is one of `libraries`."""
        self.offered.add(name)
        if name not in self.libraries or not made(name, arguments()):
            return False
        self.made.add(name)
        return True

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: Mapping[str, Any], constants: Mapping[str, Any],
        warps: int = 4, stages: int = 3, origin: str = "",
    ) -> None:  # fmt: skip
        """Launch the stored binary of a variant."""
        name = label(kernel, [(k, type_of(v)) for k, v in args.items()], constants, warps, stages)
        if name not in self._loaded:
            facts: KernelFacts = self._facts[name]
            self._loaded[name] = load_kernel(self._folder / "kernels" / f"{name}.bin", facts, 0)
        given = [float(v) if isinstance(v, float) else v for v in args.values()]
        if all(grid):
            self._loaded[name].launch(list(grid), given, torch.cuda.current_stream().cuda_stream)
