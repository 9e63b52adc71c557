"""One region of a plan, checked: its slots, steps, lifetimes, releases and arena. See `atomc.artifact.check`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, Final

import torch

import atomc.ops  # noqa: F401  defines torch.ops.atom
from atomc.artifact.buffers import aligned, of_bucket, slot_bytes
from atomc.artifact.check_layouts import check_layouts, check_results
from atomc.artifact.expr import ExpressionError, evaluate, names_in, parse
from atomc.artifact.names import Names
from atomc.artifact.order import apart, check_streams, held_until, owners_of
from atomc.artifact.plan import (
    ALIGNMENT,
    DTYPE_BYTES,
    PROBES,
    Arg,
    DType,
    RegionPlan,
    Size,
    Slot,
    SlotInfo,
    Step,
    slots_in,
    slots_of,
)  # fmt: skip
from atomc.artifact.store import ArtifactError
from atomc.ops.library import CALLS
from atomc.parallel.kinds import NAMESPACE, WAIT
from atomc.parallel.sizes import COUNTED, of_half

NAMESPACES: Final = ("aten", "atom", NAMESPACE)
# Operators that return a view where they can and a copy where they must.
MAY_COPY: Final = frozenset({"aten::reshape", "aten::contiguous", "aten::to", "aten::flatten"})
MOST_SHOWN: Final = 20


class Problems:
    """What was found, in order."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, where: str, what: str) -> None:
        self.found.append(f"{where}: {what}")

    def raise_for(self, folder: str) -> None:
        """Raise `ArtifactError` if anything was found."""
        if not self.found:
            return
        lines = [f"  {p}" for p in self.found[:MOST_SHOWN]]
        if len(self.found) > MOST_SHOWN:
            lines.append(f"  … and {len(self.found) - MOST_SHOWN} more")
        plural = "s" if len(self.found) > 1 else ""
        raise ArtifactError(
            f"{folder}: the plan cannot run ({len(self.found)} problem{plural}):\n" + "\n".join(lines)
            + "\nCompile the model again."
        )  # fmt: skip


def sizes(shape: Iterable[int | str], symbols: Mapping[str, int]) -> list[int]:
    """A shape's sizes for given symbols."""
    return [evaluate(s, symbols) for s in shape]


def operator_of(name: str) -> torch._ops.OpOverload | None:
    """`aten.mul.Tensor` -> the operator; None if there is none in the namespaces a plan may use."""
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in NAMESPACES:
        return None
    if parts[0] == NAMESPACE:
        import_module("torch.distributed._functional_collectives")  # defines them; one rank needs none
    found: Any = torch.ops
    for part in parts:
        found = getattr(found, part, None) if part.isidentifier() and not part.startswith("__") else None
    return found if isinstance(found, torch._ops.OpOverload) else None


def check_region(
    problems: Problems, region: RegionPlan, batch: Mapping[str, list[int | str]], bounds: Mapping[str, int]
) -> None:
    """Add what is wrong with a region; later checks rely on earlier ones, so the first that finds something ends it."""
    where = f"plan/{region.name}.json"
    checks = (_slots, _inputs, _steps, _layouts, _results_of_layouts, _lifetimes, _streams, _arena)
    for check in checks:
        own = Problems()
        check(own, region, batch, bounds)
        problems.found += [f"{where}: {p}" for p in own.found]
        if own.found:
            return


def _layouts(problems: Problems, region: RegionPlan, batch: object, bounds: object) -> None:
    check_layouts(problems, region, operator_of)


def _results_of_layouts(problems: Problems, region: RegionPlan, batch: object, bounds: object) -> None:
    check_results(problems, region, operator_of)


def _slots(problems: Problems, region: RegionPlan, batch: object, bounds: Mapping[str, int]) -> None:
    count = len(region.slots)
    for at, info in enumerate(region.slots):
        where = f"slot {at} ({info.name})"
        if info.dtype not in DTYPE_BYTES:
            problems.add(where, f"dtype {info.dtype!r} is unknown")
        for size in info.shape:
            try:
                values = [parse(size, set(bounds))(s) if isinstance(size, str) else size for s in (*PROBES, bounds)]
            except ExpressionError as error:
                problems.add(where, error.message)
            else:
                if min(values) < 0:
                    problems.add(where, f"size {size!r} is negative")
        if info.base is not None and not (
            0 <= info.base < count and info.base != at and region.slots[info.base].base is None
        ):
            problems.add(where, f"base {info.base} is no other slot with a storage of its own")


def _inputs(problems: Problems, region: RegionPlan, batch: Mapping[str, list[int | str]], bounds: object) -> None:
    seen: set[object] = set()
    for item in region.inputs:
        where = f"input {item.role} {item.name!r}"
        if not 0 <= item.slot < len(region.slots):
            problems.add(where, f"slot {item.slot} is out of range")
            continue
        info = region.slots[item.slot]
        if seen & {item.slot, (item.role, item.name)}:
            problems.add(where, "the slot or the name is bound twice")
        seen |= {item.slot, (item.role, item.name)}
        if item.role != info.role or item.role == "temporary" or info.base is not None:
            problems.add(where, f"slot {item.slot} ({info.name}) is a {info.role} and cannot be bound so")
        if item.role == "weight" and any(isinstance(s, str) for s in info.shape):
            problems.add(where, f"a weight of symbolic shape {info.shape}")
        if item.role == "batch":
            shape = batch.get(item.name)
            if shape is None or info.dtype != "int32" or any(sizes(shape, p) != sizes(info.shape, p) for p in PROBES):
                problems.add(where, f"{info.shape} {info.dtype}; a batch has {shape} int32")
    for name, slot in region.outputs.items():
        if not 0 <= slot < len(region.slots) or region.slots[slot].role != "value":
            problems.add(f"output {name!r}", f"slot {slot} is no value")


def _steps(problems: Problems, region: RegionPlan, batch: object, bounds: Mapping[str, int]) -> None:
    inputs = {item.slot for item in region.inputs}
    taken = set(inputs)  # released ones too: a slot has one value in its life
    names, counted = Names(region), set[str]()
    defined = inputs | _prepared(problems, region, names, taken, set(bounds))
    for at, step in enumerate(region.steps):
        where = names.place("step", at, step)
        op = operator_of(step.op)
        if op is None:
            problems.add(where, "no such operator in aten or atom")
            return
        for problem in (*_call(step, op, region, defined, set(bounds)), *_results(step, op, region, taken)):
            problems.add(where, problem)
        for problem in _counts(step, counted, set(bounds)):
            problems.add(where, problem)
        made = {s for s in step.outputs if s is not None} | _scratch(step)
        for problem in _launches(step, region, defined | made, bounds):
            problems.add(where, problem)
        if gone := [s for s in step.release if s not in defined | made]:
            problems.add(where, f"releases {gone}, which are not there")
        taken |= made
        defined = (defined | made) - set(step.release)
    for name, slot in region.outputs.items():
        if slot not in defined:
            problems.add(f"output {name!r}", f"slot {slot} ({region.slots[slot].name}) is not there at the end")


def _counts(step: Step, known: set[str], symbols: set[str]) -> Iterable[str]:
    """Counted sizes: known before they are used, given a value once, by what counts."""
    given = [a for arg in (*step.args, *step.kwargs.values()) for a in (arg if isinstance(arg, list) else [arg])]
    used = set().union(*(names_in(a.expr) for a in given if isinstance(a, Size)))
    if early := sorted(n for n in used if n.startswith(COUNTED) and n not in known):
        yield f"sizes {early} are used before they are counted"
    if step.sizes and step.op != "atom.host_sizes.default":
        yield f"gives {step.sizes} a value; it counts nothing"
    if wrong := sorted(n for n in step.sizes if n in known or n not in symbols or not n.startswith(COUNTED)):
        yield f"gives {wrong} a value, which are no sizes that are still to be counted"
    known.update(step.sizes)


def _scratch(step: Step) -> set[int]:
    return {slot for bucket in step.buckets for slot in bucket.scratch}


def _launches(step: Step, region: RegionPlan, there: set[int], bounds: Mapping[str, int]) -> Iterable[str]:
    """What is wrong with the launches of a step: buckets in order, grids of sizes, slots that are there."""
    tokens = [bucket.tokens for bucket in step.buckets]
    if tokens != sorted(set(tokens)) or any(n < 1 for n in tokens):
        yield f"its buckets are for {tokens} tokens"
    elif tokens and tokens[-1] < (most := bounds[of_half("T", 0) if region.halves else "T"]):
        yield f"its buckets end at {tokens[-1]} tokens, and a step may have {most}"
    if wrong := sorted(s for s in _scratch(step) if not 0 <= s < len(region.slots)):
        yield f"scratch slots {wrong} are out of range"
        return
    for call in (bucket.library for bucket in step.buckets if bucket.library is not None):
        if call.name not in CALLS:
            yield f"library call {call.name} is not one of {sorted(CALLS)}"
        if gone := [a.id for a in call.args if isinstance(a, Slot) and a.id not in there]:
            yield f"library call {call.name} takes slots {gone}, which are not there"
    for launch in (launch for bucket in step.buckets for launch in bucket.every_launch):
        if not 1 <= len(launch.grid) <= 3:
            yield f"kernel {launch.kernel} has a grid of {len(launch.grid)} dimensions"
        sizes = [Size(g) if isinstance(g, str) else g for g in launch.grid]
        for value in (*sizes, *(a for a in launch.args if isinstance(a, Size))):
            if problem := _misfit(value, "SymInt", set(bounds)):
                yield f"kernel {launch.kernel}: a size {problem}"
        if gone := [a.id for a in launch.args if isinstance(a, Slot) and a.id not in there]:
            yield f"kernel {launch.kernel} takes slots {gone}, which are not there"


def _prepared(problems: Problems, region: RegionPlan, names: Names, taken: set[int], symbols: set[str]) -> set[int]:
    """Check the steps that run once: they read weights and one another, and make slots of role `prepared`."""
    defined = {item.slot for item in region.inputs if item.role == "weight"}
    made: set[int] = set()
    for at, step in enumerate(region.prepare):
        where = names.place("prepare", at, step)
        op = operator_of(step.op)
        if op is None:
            problems.add(where, "no such operator in aten or atom")
            continue
        for problem in (*_call(step, op, region, defined, symbols), *_results(step, op, region, taken)):
            problems.add(where, problem)
        results = {s for s in step.outputs if s is not None and 0 <= s < len(region.slots)}
        if wrong := sorted(s for s in results if region.slots[s].role != "prepared"):
            problems.add(where, f"makes slots {wrong}, whose role is not prepared")
        if step.release:
            problems.add(where, f"releases {step.release}; what is prepared stays")
        taken |= results
        made |= results
        defined |= results
    return made


def _call(
    step: Step, op: torch._ops.OpOverload, region: RegionPlan, defined: set[int], symbols: set[str]
) -> Iterable[str]:
    """What is wrong with the arguments and results of a step."""
    schema = op._schema
    positional = [a for a in schema.arguments if not a.kwarg_only]
    if len(step.args) > len(positional):
        yield f"{len(step.args)} arguments; the operator takes {len(positional)}"
        return
    given: dict[str, Arg] = {a.name: arg for a, arg in zip(positional, step.args, strict=False)}
    if twice := sorted(given.keys() & step.kwargs.keys()):
        yield f"arguments {twice} are given twice"
    given |= step.kwargs
    for argument in schema.arguments:
        if argument.name not in given:
            if not argument.has_default_value():
                yield f"argument {argument.name!r} is missing"
            continue
        arg = given.pop(argument.name)
        if problem := _misfit(arg, str(argument.real_type), symbols):
            yield f"argument {argument.name!r} {problem}"
            continue
        for slot in slots_in(arg):
            if not 0 <= slot < len(region.slots) or slot not in defined:
                yield f"argument {argument.name!r} is slot {slot}, which is not there yet or no more"
            elif argument.alias_info is not None and argument.alias_info.is_write:
                yield from _written(slot, region)
    if given:
        yield f"the operator has no arguments {sorted(given)}"


def _results(step: Step, op: torch._ops.OpOverload, region: RegionPlan, taken: set[int]) -> Iterable[str]:
    """What is wrong with the results of a step."""
    returns = op._schema.returns
    listed = len(returns) == 1 and str(returns[0].type).startswith("List")
    if step.op == "atom.host_sizes.default" and (step.outputs or not step.sizes):
        yield "counts go into sizes, not into slots"
    if not listed and len(step.outputs) != len(returns):
        yield f"{len(step.outputs)} results; the operator has {len(returns)}"
        return
    if len(set(step.outputs) - {None}) != len([s for s in step.outputs if s is not None]):
        yield "one slot takes two results"
    owners = {_owner(s, region) for s in slots_of(step) if 0 <= s < len(region.slots)}
    for index, slot in enumerate(step.outputs):
        if slot is None:
            continue
        if not 0 <= slot < len(region.slots):
            yield f"result slot {slot} is out of range"
            continue
        info = region.slots[slot]
        aliases = returns[0 if listed else index].alias_info is not None or step.op == WAIT
        if slot in taken:
            yield f"result slot {slot} ({info.name}) has a value already"
        if info.base is not None and not (aliases and info.base in owners):
            yield f"result slot {slot} ({info.name}) cannot be a view of slot {info.base}"
        if info.base is None and aliases and op._schema.name not in MAY_COPY:
            yield f"result slot {slot} ({info.name}) must be a view of an argument"


def _owner(slot: int, region: RegionPlan) -> int:
    base = region.slots[slot].base
    return slot if base is None else base


def _written(slot: int, region: RegionPlan) -> Iterable[str]:
    owner = _owner(slot, region)
    info, role = region.slots[owner], region.slots[owner].role
    if role in ("weight", "prepared", "batch") or (role == "value" and owner in {i.slot for i in region.inputs}):
        yield f"writes slot {slot} ({region.slots[slot].name}), which is or views {role} {info.name}"


def _misfit(arg: Arg, kind: str, symbols: set[str]) -> str | None:
    """Why an argument cannot be of a schema type (`Tensor`, `Optional[List[int]]`, …); None if it can."""
    if isinstance(arg, Size):
        try:
            parse(arg.expr, symbols)
        except ExpressionError as error:
            return f"is a bad size: {error.message}"
    if isinstance(arg, DType) and arg.name not in DTYPE_BYTES:
        return f"is the unknown dtype {arg.name!r}"
    if kind.startswith("Optional["):
        return None if arg is None else _misfit(arg, kind[9:-1], symbols)
    if kind.startswith("List["):
        if not isinstance(arg, list):
            return f"is {arg!r}, not a list"
        return next((p for a in arg if (p := _misfit(a, kind[5:-1], symbols))), None)
    number = isinstance(arg, (int, float)) and not isinstance(arg, bool)
    fits = {
        "Tensor": isinstance(arg, Slot) or number,  # torch makes a tensor of a number
        "int": isinstance(arg, Size) or (number and isinstance(arg, int) and -(1 << 63) <= arg < 1 << 63),
        "SymInt": isinstance(arg, Size) or (number and isinstance(arg, int) and -(1 << 63) <= arg < 1 << 63),
        "float": number,
        "bool": isinstance(arg, bool),
        "Scalar": number or isinstance(arg, (bool, Size)),
        "number": number or isinstance(arg, (bool, Size)),
        "ScalarType": isinstance(arg, DType),
        "str": isinstance(arg, str),
        "Any": isinstance(arg, str),  # the group of a collective
    }
    return None if fits.get(kind, False) else f"is {arg!r}, not {kind}"


def _lifetimes(problems: Problems, region: RegionPlan, batch: object, bounds: object) -> None:
    """`first`, `last` and the releases are those that the steps imply."""
    slots = region.slots
    owner = [_owner(at, region) for at in range(len(slots))]
    first = [-1] * len(slots)
    last = [-1] * len(slots)  # of the storage, at its owner
    prepared = {s for step in region.prepare for s in step.outputs if s is not None}
    inputs = {item.slot for item in region.inputs} | prepared
    for at, step in enumerate(region.steps):
        made = [*(s for s in step.outputs if s is not None), *_scratch(step)]
        for slot in made:
            first[slot] = at
        for slot in (*made, *slots_of(step)):
            last[owner[slot]] = at
    for at, slot in held_until(region.steps):
        last[owner[slot]] = max(last[owner[slot]], at)
    for slot in region.outputs.values():
        last[owner[slot]] = len(region.steps)
    released = {slot: at for at, step in enumerate(region.steps) for slot in step.release}
    for at, info in enumerate(slots):
        where = f"slot {at} ({info.name})"
        expected = first[at], last[owner[at]]
        if first[at] < 0 and at not in inputs:
            problems.add(where, "no input and no step gives it a value")
        elif (found := (info.first, info.last)) != expected:
            problems.add(
                where, f"lives from {found[0]} to {found[1]}; by the steps from {expected[0]} to {expected[1]}"
            )
        elif info.role == "temporary" and released.get(at) != info.last:
            problems.add(where, f"is released at step {released.get(at)}, not at its last use, step {info.last}")
        elif info.role != "temporary" and at in released:
            problems.add(where, f"a {info.role} is released at step {released[at]}")
        elif (info.role == "prepared") != (at in prepared):
            problems.add(where, f"role {info.role} of a slot that {'is' if at in prepared else 'is not'} prepared")
        kept = info.last == len(region.steps)
        if at not in inputs and (info.role == "value") != kept:
            problems.add(where, f"role {info.role} of a slot that {'outlives' if kept else 'ends in'} the region")


def _streams(problems: Problems, region: RegionPlan, batch: object, bounds: object) -> None:
    check_streams(problems, region.steps, region.slots)


def _arena(problems: Problems, region: RegionPlan, batch: object, bounds: Mapping[str, int]) -> None:
    """Temporaries with a storage have offsets inside the arena, and no two overlap in time and place.

    In time: in the order of the plan, or in that of its streams.
    """
    may_share = apart(region.steps, owners_of(region.slots))
    placed: list[tuple[int, SlotInfo, int, int]] = []
    tokens = {slot: b.tokens for step in region.steps for b in step.buckets for slot in b.scratch}
    for at, info in enumerate(region.slots):
        where = f"slot {at} ({info.name})"
        needs = info.role == "temporary" and info.base is None
        if needs != (info.offset is not None):
            problems.add(where, f"offset {info.offset}; it {'needs' if needs else 'must not have'} one")
        if not needs or info.offset is None:
            continue
        most = of_bucket(bounds, tokens[at]) if at in tokens else bounds  # scratch: of its bucket
        start, end = info.offset, info.offset + aligned(slot_bytes(info, most))
        if start < 0 or start % ALIGNMENT:
            problems.add(where, f"offset {start} is no multiple of {ALIGNMENT}")
        for other, known, low, high in placed:
            meet = info.first <= known.last and known.first <= info.last
            if start < high and low < end and (meet or not may_share(at, other)):
                places = f"bytes {start} to {end}, and {low} to {high}"
                problems.add(where, f"overlaps slot {other} ({known.name}): {places}")
        placed.append((at, info, start, end))
    end = max((high for *_, high in placed), default=0)
    if region.arena_bytes != end:
        problems.add("arena_bytes", f"{region.arena_bytes}, but the temporaries end at {end}")
