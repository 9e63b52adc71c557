"""The plan checker: that a program's steps can run as written, whoever wrote them. It reads plans and runs nothing.

Contract:
    After `check_program` no step can miss a value, take one of the wrong kind, or write where it must not; every size
    parses; lifetimes, releases and offsets are those the steps imply. What an operator computes is not looked at.

Terms: see `atomc.artifact.plan`. A *problem* is one sentence that begins with the file and the place in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from torch import Tensor

from atomc.artifact.buffers import lower_bound, value_buffers
from atomc.artifact.check_region import Problems, check_region, sizes
from atomc.artifact.manifest import Manifest, Serving
from atomc.artifact.plan import DTYPE_BYTES, PROBES, ProgramPlan, RegionPlan, SlotInfo, of_batch
from atomc.artifact.ranks import FILE, RanksPlan
from atomc.parallel.sizes import HALVES, of_half, of_region

PROGRAM: Final = "plan/program.json"
RESULT: Final = "logits"
Specs = dict[str, tuple[list[list[int]], str]]  # name -> shape at each probe, dtype


def check_program(
    folder: str,
    manifest: Manifest,
    program: ProgramPlan,
    regions: Mapping[str, RegionPlan],
    weights: Mapping[str, Tensor] | None = None,
    ranks: Sequence[RanksPlan] = (),
) -> None:
    """Check a program and, where given, that the weights are exactly those it needs.

    Args:
        regions: all that there are. ranks: layouts on many ranks, whose forms are checked as programs; that their
            ranks agree is another proof (`atomc.artifact.agreement`).
    Raises:
        ArtifactError: lists the problems found.
    """
    problems = Problems()
    serving = manifest.serving
    _check_facts(problems, manifest, program)
    programs = {PROGRAM: program} | {
        f"plan/{FILE}: {plan.layout}, {form}": plan.program(form, program) for plan in ranks for form in plan.forms
    }
    halved = {f"plan/{FILE}: {p.layout}, {name}" for p in ranks for name, form in p.forms.items() if form.halves}
    called = {call.region for known in programs.values() for call in known.calls}
    done: set[str] = set()
    for where, known in programs.items():
        own = {name: regions[name] for name in sorted({c.region for c in known.calls}) if name in regions}
        for name in sorted(own.keys() - done):
            if own[name].name != name:
                problems.add(f"plan/{name}.json", f"its name is {own[name].name!r}")
            halves = own[name].halves
            check_region(problems, own[name], batch_shapes(serving, halves), of_region(known.symbols, halves))
        done |= own.keys()
        for name, region in own.items():
            if region.halves != (where in halved):
                problems.add(where, f"calls {name}, which {'has' if region.halves else 'has not'} two micro-batches")
        if not problems.found:  # calls are checked against regions that are right in themselves
            _check_calls(problems, where, known, own, serving, where in halved)
        if not problems.found:
            _check_memory(problems, where, known, own, known.symbols)
    for name in sorted(regions.keys() - called):
        problems.add(f"plan/{name}.json", "no call uses it")
    if weights is not None and not problems.found:
        _check_weights(problems, program, regions, weights)
    problems.raise_for(folder)


def batch_shapes(serving: Serving, halves: bool = False) -> dict[str, list[int | str]]:
    """Shape of each field of `atomc.ops.Batch`, or of those of its two micro-batches; all are int32."""
    whole: dict[str, list[int | str]] = {
        "ids": ["T"], "positions": ["T"], "requests": ["T"], "query_start": ["B+1"], "slots": ["B"],
        "window_table": ["B", serving.window_table_width], "block_table": ["B", serving.block_table_width],
        "csa_ends": ["N4"], "hca_ends": ["NH"], "logit_rows": ["L"],
    }  # fmt: skip
    if not halves:
        return whole
    return {of_batch(name, half): _halved(shape, half) for name, shape in whole.items() for half in HALVES}


def _halved(shape: Sequence[int | str], half: int) -> list[int | str]:
    return [re.sub(r"[A-Z]\w*", lambda m: of_half(m.group(), half), n) if isinstance(n, str) else n for n in shape]


def _check_facts(problems: Problems, manifest: Manifest, program: ProgramPlan) -> None:
    """Numbers that the manifest and the program both state, and that batches are built by."""
    where, serving, limits = "manifest.json", manifest.serving, manifest.limits
    if (config := manifest.files.get("config.json")) is None or config.sha256 != manifest.config_sha256:
        problems.add(where, "config_sha256 is not the hash of config.json")
    for name in limits.__struct_fields__:
        if (limit := getattr(limits, name)) != (fact := getattr(serving, name)):
            problems.add(where, f"limits.{name} is {limit}, serving.{name} is {fact}")
    least = dict.fromkeys(serving.__struct_fields__, 1) | {"bos_id": 0, "csa_ratio": 0, "hca_ratio": 0}
    for name, low in least.items():
        if isinstance(value := getattr(serving, name), int) and value < low:
            problems.add(where, f"serving.{name} is {value}, at least {low} is needed")
    if problems.found:
        return
    columns = -(-(serving.window + serving.max_batch_tokens) // serving.window_page) + 1
    if serving.window_table_width < columns:
        problems.add(where, f"serving.window_table_width is {serving.window_table_width}, {columns} are needed")
    if serving.block_table_width * serving.block_tokens < serving.max_context:
        problems.add(where, f"serving.block_table_width {serving.block_table_width} is less than the context")
    for ratio in (serving.csa_ratio, serving.hca_ratio):
        if ratio and serving.block_tokens % ratio:
            problems.add(where, f"serving.block_tokens {serving.block_tokens} is no multiple of ratio {ratio}")
    if program.symbols != serving.bounds():
        problems.add(PROGRAM, f"symbols are {program.symbols}, by the limits {serving.bounds()}")


def _check_calls(
    problems: Problems, file: str, program: ProgramPlan, regions: Mapping[str, RegionPlan], serving: Serving,
    halves: bool,
) -> None:  # fmt: skip
    """Each call's inputs exist when it runs, with the shape and dtype its region expects."""
    values: Specs = {}
    states = _states(problems, program)
    for at, call in enumerate(program.calls):
        where = f"{file}: call {at} ({call.region} {call.prefix!r})"
        region = regions.get(call.region)
        if region is None:
            problems.add(where, "there is no such region")
            continue
        wanted = {i.name for i in region.inputs if i.role == "value"}
        if foreign := sorted(call.binds.keys() - wanted):
            problems.add(where, f"binds {foreign}, which are no value inputs of the region")
        for item in region.inputs:
            info = region.slots[item.slot]
            if item.role == "value":
                name = call.binds.get(item.name, item.name)
                _expect(problems, where, f"value {name!r}", values.get(name), info)
            elif item.role == "state":
                name = call.prefix + item.name
                _expect(problems, where, f"state {name!r}", states.get(name), info)
        values |= {name: _spec(region.slots[slot]) for name, slot in region.outputs.items()}
    for name, rows in [(of_batch(RESULT, h), of_half("L", h)) for h in HALVES] if halves else [(RESULT, "L")]:
        logits = SlotInfo(name, "value", [rows, serving.vocab_size], "float32", None, 0, 0, None)
        _expect(problems, f"{file}: result", f"value {name!r}", values.get(name), logits)


def _states(problems: Problems, program: ProgramPlan) -> Specs:
    found: Specs = {}
    for prefix, tensors in program.states.items():
        for tensor in tensors:
            name = prefix + tensor.name
            if name in found:
                problems.add(PROGRAM, f"state {name!r} is there twice")
            if tensor.dtype not in DTYPE_BYTES or any(s < 1 for s in tensor.shape):
                problems.add(PROGRAM, f"state {name!r} has shape {tensor.shape} and dtype {tensor.dtype!r}")
            found[name] = [[probe[tensor.pool], *tensor.shape] for probe in PROBES], tensor.dtype
    return found


def _spec(info: SlotInfo) -> tuple[list[list[int]], str]:
    return [sizes(info.shape, probe) for probe in PROBES], info.dtype


def _expect(
    problems: Problems, where: str, what: str, found: tuple[list[list[int]], str] | None, info: SlotInfo
) -> None:
    if found is None:
        problems.add(where, f"needs {what}, which nothing before it makes")
    elif found != _spec(info):
        problems.add(where, f"needs {what} as {info.shape} {info.dtype}; it is {found[0][0]} {found[1]} at {PROBES[0]}")


def _check_memory(
    problems: Problems, file: str, program: ProgramPlan, regions: Mapping[str, RegionPlan], bounds: Mapping[str, int]
) -> None:
    """The program's totals: the largest arena, and room for the values that are alive at one time."""
    largest = max((r.arena_bytes for r in regions.values()), default=0)
    if program.arena_bytes != largest:
        problems.add(file, f"arena_bytes is {program.arena_bytes}, the largest region's {largest}")
    least = lower_bound(value_buffers(program.calls, regions, bounds))
    if program.values_bytes < least:
        problems.add(file, f"values_bytes is {program.values_bytes}, but {least} are alive at one time")


def check_weights(
    folder: str, program: ProgramPlan, regions: Mapping[str, RegionPlan], weights: Mapping[str, Tensor]
) -> None:
    """Check that weights are exactly those that a program needs.

    Raises:
        ArtifactError: lists the problems found.
    """
    problems = Problems()
    _check_weights(problems, program, regions, weights)
    problems.raise_for(folder)


def _check_weights(
    problems: Problems, program: ProgramPlan, regions: Mapping[str, RegionPlan], weights: Mapping[str, Tensor]
) -> None:
    needed = dict(needed_weights(program, regions))
    for name, info in needed.items():
        if name not in weights:
            problems.add("weights", f"{name!r}, which the plan needs, is in no file")
            continue
        tensor = weights[name]
        found, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        if found != info.shape or dtype != info.dtype:
            problems.add("weights", f"{name!r} is {found} {dtype}; the plan says {info.shape} {info.dtype}")
    for name in sorted(weights.keys() - needed.keys()):
        problems.add("weights", f"{name!r} is in a file, but the plan needs no such weight")


def needed_weights(program: ProgramPlan, regions: Mapping[str, RegionPlan]) -> Iterable[tuple[str, SlotInfo]]:
    """(name, slot) of every weight of every call, in order."""
    for call in program.calls:
        region = regions[call.region]
        for item in region.inputs:
            if item.role == "weight":
                yield call.prefix + item.name, region.slots[item.slot]
