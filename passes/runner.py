"""What a pass is, and the one function that runs a pipeline of them.

Contract:
    A pass is a frozen dataclass; its fields are its options; `run` does one rewrite of the graph and reports it.
    Only the runner lints, checks invariants, times, dumps and fingerprints. A pass that expects matches says how many
    (`Context.expected`), and a miss is an error with the nearest candidate: never silence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch.fx import GraphModule

from atomc.ops.placement import Placement
from atomc.passes.graph import PassError, readable
from atomc.recipes import Choice, Recipe, TensorSpec


@dataclass(frozen=True)
class Match:
    """One place a pass rewrote: the model source line and the module path."""

    where: str
    module: str


@dataclass(frozen=True)
class Refusal:
    """One place a pass looked at and left, with the reason."""

    where: str
    reason: str


@dataclass
class Report:
    """What one pass did to one graph."""

    matches: list[Match] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


@dataclass(frozen=True)
class Decision:
    """How one weight, activation or cache is stored, and who decided (`atomc explain`).

    Attributes:
        kind: weight, activation or cache. name: the weight's path, `input of` one, or the state field.
        shape: of the values; sizes of a step by their symbol. layout: text, or a dtype.
        bytes: of a weight; of one token's activation; of one cache row. Scales included.
        stored: what it was before: the checkpoint's layout, or a dtype.
        origin: stored (the very bytes), exact (the same numbers), or quantized (rounded).
        lowering: what the target does with it. by: the rule. where: the model's source line.
    """

    kind: Literal["weight", "activation", "cache"]
    name: str
    shape: list[int | str]
    layout: str
    bytes: int
    stored: str
    origin: str
    lowering: str
    by: str
    where: str


def _no_spec(recipe: Recipe) -> TensorSpec:
    raise PassError("this pipeline knows no checkpoint, so no shape of a weight that is packed")


@dataclass(frozen=True)
class Chunked:
    """What a graph of two micro-batches is called with (`passes.chunk`).

    Attributes:
        inputs: placeholder of the whole -> its placeholders in the halves. results: of one half.
        symbols: size symbol of the whole, which the first half keeps -> that of the second half.
        second: places of the results that the second half gives, where some moved over a border (`passes.borders`);
            None: all. carried: how many results come after them, for the moved nodes of the next region.
        given: placeholders of what the region before carries. given_sizes: size symbols in them that the region has
            not otherwise -> what they mean, in the second half.
    """

    inputs: Mapping[str, tuple[str, str]]
    results: int
    symbols: Mapping[str, str]
    second: tuple[int, ...] | None = None
    carried: int = 0
    given: tuple[str, ...] = ()
    given_sizes: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Context:
    """What passes may know beside the graph.

    Attributes:
        region: the name of the graph, for messages.
        expected: pass name -> number of matches the model promises in this region; absent: any number.
        weights: weight placeholder -> recipe; passes that change weights change recipes.
        module_paths: weight placeholder -> parameter name in the model.
        states: state placeholder -> its field. state_specs: field -> shape of one unit of its pool and dtype, where a
            pass changed them.
        dtype: the compute dtype. spec_of: shape and dtype of what a recipe gives. choice: how scales are chosen.
        decisions: what a pass decided on layouts.
        placements: placeholder -> mesh axis -> what a rank holds of it, where the graph is one of many ranks'.
        sizes: placeholder -> symbol, of sizes that the ranks agree on before a step.
        chunked: how the graph was cut in two micro-batches.
    """

    region: str
    expected: dict[str, int] = field(default_factory=dict)
    weights: dict[str, Recipe] = field(default_factory=dict)
    module_paths: dict[str, str] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    state_specs: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    spec_of: Callable[[Recipe], TensorSpec] = _no_spec
    choice: Choice = field(default_factory=Choice)
    decisions: list[Decision] = field(default_factory=list)
    placements: dict[str, dict[str, Placement]] = field(default_factory=dict)
    sizes: dict[str, str] = field(default_factory=dict)
    chunked: Chunked | None = None


Invariant = Callable[[GraphModule], str | None]
INVARIANTS: dict[str, Invariant] = {}


def invariant(name: str) -> Callable[[Invariant], Invariant]:
    """Register a check: returns None, or a sentence that says what does not hold."""

    def decorate(check: Invariant) -> Invariant:
        INVARIANTS[name] = check
        return check

    return decorate


@dataclass(frozen=True)
class Pass:
    """Base of all passes. `requires`, `ensures`, `breaks` name invariants of INVARIANTS."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: GraphModule, ctx: Context) -> Report:
        """Rewrite gm in place."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """The name in tables and dumps; passes with several instances override it."""
        return self.name

    def fingerprint(self) -> str:
        """A hash of the pass's options and of the source of every module they and the pass come from."""
        options = {f.name: _stable(getattr(self, f.name)) for f in dataclasses.fields(self)}
        text = json.dumps([_stable(type(self)), options], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _stable(value: Any) -> Any:
    """A value as JSON that is the same in every process: code by its module's source, data by its contents."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value).__qualname__, {f.name: _stable(getattr(value, f.name)) for f in dataclasses.fields(value)}]
    if callable(value):
        module = inspect.getmodule(value)
        return [value.__qualname__, "" if module is None else _source_hash(module)]
    if isinstance(value, Mapping):
        return {str(k): _stable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_stable(v) for v in value]
    return sorted(map(str, value)) if isinstance(value, frozenset) else repr(value)


@cache
def _source_hash(module: ModuleType) -> str:
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()


@dataclass(frozen=True)
class Row:
    """One line of the table `atomc explain` prints."""

    index: int
    label: str
    expected: int | None
    report: Report
    nodes_before: int
    nodes_after: int
    seconds: float
    fingerprint: str


def run_pipeline(
    pipeline: tuple[Pass, ...],
    gm: GraphModule,
    ctx: Context,
    dump: Path | None = None,
    stop_after: str | None = None,
    after: tuple[Pass, ...] = (),
) -> list[Row]:
    """Run the passes in order, verifying the graph after each.

    Args:
        dump: folder for `NN_pass.py`, the graph after each pass (and `00_captured.py` before the first).
        stop_after: label of the pass after which to stop. after: passes that have run on the graph before.
    Raises:
        PassError: an invariant is missing or broken, or a pass found fewer or more matches than promised.
    """
    held: frozenset[str] = frozenset()
    for step in after:
        held = (held - step.breaks) | step.ensures
    rows: list[Row] = []
    if not after:
        _dump(dump, 0, "captured", gm)
    for index, step in enumerate(pipeline, start=1 + len(after)):
        _require(step, held, ctx)
        before, start = len(gm.graph.nodes), time.perf_counter()
        report = step.run(gm, ctx)
        gm.graph.lint()
        gm.recompile()
        seconds = time.perf_counter() - start
        _dump(dump, index, step.label, gm)
        held = (held - step.breaks) | step.ensures
        _verify(step, held, gm, ctx)
        expected = ctx.expected.get(step.label)
        if expected is not None and len(report.matches) != expected:
            raise PassError(_miss(step, ctx, expected, report))
        rows.append(Row(index, step.label, expected, report, before, len(gm.graph.nodes), seconds, step.fingerprint()))
        if step.label == stop_after:
            break
    return rows


def _require(step: Pass, held: frozenset[str], ctx: Context) -> None:
    if missing := step.requires - held:
        raise PassError(
            f"{ctx.region}: pass {step.label!r} requires {sorted(missing)}, but earlier passes ensured {sorted(held)}. "
            "Add a pass that ensures it, or reorder the pipeline."
        )


def _verify(step: Pass, held: frozenset[str], gm: GraphModule, ctx: Context) -> None:
    for name in sorted(held):
        if problem := INVARIANTS[name](gm):
            raise PassError(f"{ctx.region}: after pass {step.label!r}, invariant {name!r} does not hold: {problem}")


def _miss(step: Pass, ctx: Context, expected: int, report: Report) -> str:
    lines = [
        f"{ctx.region}: pass {step.label!r} found {len(report.matches)} matches; the model promises {expected}.",
        *(f"  matched at {m.where} ({m.module})" for m in report.matches),
        *(f"  refused at {r.where}: {r.reason}" for r in report.refusals),
    ]
    return "\n".join(lines)


def _dump(folder: Path | None, index: int, label: str, gm: GraphModule) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{index:02d}_{label}.py").write_text(readable(gm), encoding="utf-8")
