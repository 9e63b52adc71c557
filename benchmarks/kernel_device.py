"""Kernels as an artifact holds them, for benchmarks: compiled ahead of time into a folder, launched by the runtime.

Contract:
    `record` finds what a host function launches, on meta tensors; `build` compiles it in parallel, on any machine;
    `BuiltDevice` launches the binaries. A folder is refused where the sources of the kernels have changed since.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import atomc.codegen
from atomc.artifact.kernels import KernelFacts, read_kernels, write_kernel
from atomc.codegen.aot import build_all, default_store, key
from atomc.codegen.device import Recorder, Variant, type_of
from atomc.codegen.source import source_of
from atomc.ops.library import made, missing
from atomc.runtime.launcher import Kernel, load_kernel
from atomc.targets import Target


def sources() -> str:
    """The hash of the kernels' sources and tuned tables."""
    files = sorted(f for f in Path(atomc.codegen.__path__[0]).rglob("*") if f.suffix in (".py", ".json"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def label(variant: Variant) -> str:
    """The name of a variant's binary: not of its compiler, which may be another Triton than the device's."""
    known = [
        source_of(variant.kernel) or variant.kernel.fn.__module__, variant.name, variant.signature,
        [(name, str(value)) for name, value in variant.constants], variant.warps, variant.stages,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:20]


def record(target: Target, tokens: int, host: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, Recorder]:
    """What a host function returns for meta tensors, and what it launches."""
    recorder = Recorder(target, tokens)
    return host(recorder, *arguments), recorder


def build(folder: Path, variants: Iterable[Variant], target: Target, jobs: int | None = None) -> int:
    """Compile into the folder what it has not; the number of binaries there that were asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "sources.txt"
    if stamp.exists() and stamp.read_text() != sources():
        raise SystemExit(f"{folder} holds kernels of other sources: remove it.")
    stamp.write_text(sources())
    (folder / "triton.txt").write_text(triton.__version__)
    wanted = {label(v): v for v in variants}
    missing = {name: v for name, v in wanted.items() if not (folder / "kernels" / f"{name}.bin").exists()}

    def told(what: str, done: int, count: int) -> None:
        if done % 20 == 0 or done == count:
            print(f"  {what}: {done} of {count}", flush=True)

    built = build_all(missing.values(), target, default_store(), jobs, told)
    for name, variant in missing.items():
        binary = built[key(variant, target)]
        write_kernel(folder, name, binary.data, binary.facts)
    return len(wanted)


@cache
def absent(name: str) -> str:
    """Why the GPU has no such call of a library; empty: it has."""
    return missing(name, torch.device("cuda"))


class BuiltDevice:
    """Launches the binaries of a folder, and makes the calls of libraries that a plan would.

    Attributes:
        tokens: of the bucket, set for each case. made: names of the library's calls that were made.
    """

    def __init__(self, folder: Path, target: Target) -> None:
        self.target, self.tokens = target, 0
        self._folder, self._facts = folder, read_kernels(folder)
        self._loaded: dict[Variant, Kernel] = {}
        self.made: set[str] = set()

    @property
    def triton(self) -> str:
        """The version that compiled them."""
        return (self._folder / "triton.txt").read_text()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory as it is: to poison it would be timed too."""
        return torch.empty(tuple(shape), dtype=dtype, device="cuda")

    def library(self, name: str, arguments: Callable[[], Sequence[Tensor]]) -> bool:
        """Make the call where the device has it and it takes so many rows, as the runtime does."""
        done = not absent(name) and made(name, arguments())
        self.made |= {name} if done else set()
        return done

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: Mapping[str, Any], constants: Mapping[str, Any],
        warps: int = 4, stages: int = 3, origin: str = "",
    ) -> None:  # fmt: skip
        """Launch the binary of a variant."""
        signature = tuple((name, type_of(value)) for name, value in args.items())
        variant = Variant(kernel, signature, tuple(sorted(constants.items())), warps, stages, frozenset())
        if variant not in self._loaded:
            name = label(variant)
            facts: KernelFacts = self._facts[name]
            self._loaded[variant] = load_kernel(self._folder / "kernels" / f"{name}.bin", facts, 0)
        given = [float(v) if isinstance(v, float) else v for v in args.values()]
        if all(grid):
            self._loaded[variant].launch(list(grid), given, torch.cuda.current_stream().cuda_stream)
