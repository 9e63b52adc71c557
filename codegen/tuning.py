"""Configurations that were measured: JSON files of `python -m benchmarks.tune`, one for each GPU, in `codegen/tuned`.

Contract:
    A family asks with the name of its kernel, the problem's constants and the bucket's tokens, and gets the fields of
    its configuration, or nothing: then its static model chooses. A GPU without a file of its own takes that of a GPU
    with the same instruction set. Where a configuration came from goes with each launch into the plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Final

import msgspec

from atomc.artifact.plan import STATIC
from atomc.targets import TARGETS, Target

__all__ = ["STATIC", "Entry", "Table", "table_of", "trial", "tuned"]

FOLDER: Final = Path(__file__).parent / "tuned"
REACH: Final = 4  # a bucket takes what was measured for one of up to so many times its tokens, or its part,
FEW: Final = 64  # but not across this number of them, where the forms of the kernels change


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The best configuration of one kernel, problem and bucket, with its time and that of the static model's, in s.

    Attributes:
        triton: the version that compiled it, where that is not the table's: binaries may come from another machine.
    """

    kernel: str
    problem: dict[str, int | str]
    tokens: int
    config: dict[str, int | bool]
    seconds: float
    static_seconds: float
    triton: str = ""


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one kind of GPU was measured at.

    device, torch, triton: of the last run. commands: the runs, the last one last. note: what else there is to know.
    """

    target: str
    device: str
    torch: str
    triton: str
    commands: list[str]
    note: str
    entries: list[Entry]


_TRIAL: ContextVar[dict[str, dict[str, int | bool]] | None] = ContextVar("trial", default=None)


@contextmanager
def trial(kernel: str, config: Mapping[str, int | bool] | None) -> Iterator[None]:
    """Within it, that configuration is the tuned one of a kernel, whatever the problem; None: the static model's."""
    token = _TRIAL.set({**(_TRIAL.get() or {}), kernel: dict(config or {})})
    try:
        yield
    finally:
        _TRIAL.reset(token)


def tuned(
    target: Target, kernel: str, tokens: int, problem: Mapping[str, int | str]
) -> tuple[dict[str, int | bool], str] | None:
    """Fields of the configuration measured for a bucket of `tokens`, and where; None: nobody measured it."""
    if (tried := _TRIAL.get()) is not None and kernel in tried:
        return (tried[kernel], "trial") if tried[kernel] else None
    table = table_of(target)
    if table is None:
        return None
    known = [e for e in table.entries if (e.kernel, e.problem) == (kernel, problem)]
    near = [e for e in known if 1 / REACH <= e.tokens / tokens <= REACH and (e.tokens <= FEW) == (tokens <= FEW)]
    if not near:
        return None
    entry = min(near, key=lambda e: abs(math.log(e.tokens / tokens)))
    return dict(entry.config), f"tuned on {table.device} with Triton {entry.triton or table.triton}"


@cache
def table_of(target: Target) -> Table | None:
    """The table of a GPU, or of another one with its instruction set."""
    same = [target.name, *sorted(t.name for t in TARGETS.values() if t.arch == target.arch and t.is_gpu)]
    for name in same:
        path = FOLDER / f"{name}.json"
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=Table)
    return None
