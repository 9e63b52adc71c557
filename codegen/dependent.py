"""Programmatic dependent launch: a kernel that may be launched before the one before it on its stream has ended.

Contract:
    Every kernel compiled for a target with `dependent_launch` waits at its first instruction for the end of the grid
    before it, with all that it wrote, and then lets the grid after it begin to wait. So its launch and the drain of the
    one before overlap, and no kernel touches memory earlier than it would have: a grid ends only after its own wait, so
    by induction all before it on the stream have ended. Launched without the attribute, the two instructions do
    nothing.

Source: PTX ISA, griddepcontrol; CUDA C++ programming guide, programmatic dependent launch and synchronization.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

ENTRY: Final = re.compile(r"^// %bb\.0:.*\n", re.MULTILINE)  # where LLVM begins a function's first block
WAITS: Final = "griddepcontrol.wait;"
CONSTANT: Final = "ld.global.nc"
LETS: Final = "griddepcontrol.launch_dependents;"


def waiting(ptx: str) -> str:
    """A kernel's PTX that waits for the grid before it first.

    Raises:
        ValueError: it has not one entry, or it reads by the path that takes memory for constant while a kernel runs,
            which memory that the grid before it still writes is not.
    """
    if CONSTANT in ptx:
        raise ValueError(f"it has {CONSTANT}, which sees no write of the grid before it")
    if len(ENTRY.findall(ptx)) != 1:
        raise ValueError(f"its PTX has {len(ENTRY.findall(ptx))} functions, and one is expected")
    return ENTRY.sub(lambda entry: f"{entry.group()}\t{WAITS}\n\t{LETS}\n", ptx)


@cache
def source() -> str:
    """This module's text: what it does to a kernel is part of the kernel's key."""
    return Path(__file__).read_text(encoding="utf-8")


@contextmanager
def waiting_kernels() -> Iterator[None]:
    """What Triton compiles within waits for the grid before it."""
    import triton

    def add_wait(*stage: Any) -> tuple[str, str]:
        if stage:  # (backend, stages, options, language, capability), once for each compile; else it asks for a key
            stages = stage[1]
            make: Callable[[Any, Any], str] = stages["ptx"]
            stages["ptx"] = lambda src, metadata: waiting(make(src, metadata))
        return WAITS, WAITS

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.add_stages_inspection_hook = add_wait
        yield
