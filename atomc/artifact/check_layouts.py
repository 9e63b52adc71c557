"""Layouts in a region's plan: codes, scales and cache pages are what the texts beside them say, on every side of them.

Contract:
    After the checks, of every step: each layout's text means something; codes and scales have the dtype and the shape
    that it demands, so bytes of one dialect are never read as the other and groups of 32 never as 128; a weight's codes
    are read with the scales of the same weight, and nowhere without; a cache has whole rows on its pages, and all steps
    that write or read it name one row layout; index rows and the queries scored with them are rotated both, or neither.

Terms:
    pair       the arguments `codes`, `scales`, `layout` of an operator; or `X`, `X_scales`, `X_layout`
    rotated    through the Hadamard transform: its own step, or inside of a fused one (`atomc.passes.rotation` holds
               graphs to the same rule)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from atomc.artifact.expr import evaluate
from atomc.artifact.names import Names
from atomc.artifact.plan import PROBES, RegionPlan, Slot, SlotInfo, Step
from atomc.artifact.shapes import like, results_of
from atomc.formats import Layout, RowLayout

CACHES: Final = ("cache", "window")
INDEX_READERS: Final = ("atom.index_topk.default", "atom.index_rope_topk.default")
FUSED_WRITER: Final = "atom.compressor_pool_norm_rope_insert.default"
WRITERS: Final = {  # operators that store rows -> the argument that they store
    "atom.packed_insert.default": "packed", "atom.compressed_packed_insert.default": "packed",
    "atom.cache_insert.default": "x", "atom.compressed_insert.default": "x",
}  # fmt: skip
_THROUGH: Final = ("atom.dequantize.default", "atom.quantize.default", "atom.pack_rows.default")
PROBE: Final = PROBES[0]


class Adds(Protocol):
    """Takes problems: `Problems` of `check_region`."""

    def add(self, where: str, what: str) -> None:
        """A problem and the place of it."""


@dataclass(frozen=True)
class Given:
    """A step with its arguments by name, defaults included."""

    where: str
    step: Step
    op: torch._ops.OpOverload
    arguments: dict[str, Any]

    def slot(self, name: str) -> int | None:
        value = self.arguments.get(name)
        return value.id if isinstance(value, Slot) else None


def check_layouts(problems: Adds, region: RegionPlan, resolve: Callable[[str], torch._ops.OpOverload | None]) -> None:
    """Add what is wrong with the layouts of a region whose steps are right in themselves; `resolve` finds operators."""
    named = {item.slot: item.name for item in region.inputs}
    steps = list(given_steps(region, resolve))
    producers = {slot: given for given in steps for slot in given.step.outputs if slot is not None}
    for given in steps:
        for problem in (*_texts(given), *_pairs(given, region, named), *_caches(given, region, named)):
            problems.add(given.where, problem)
    for where, problem in (*_bare(steps, region, named), *_one_layout(steps, region, named)):
        problems.add(where, problem)
    for where, problem in _rotation(steps, producers, named):
        problems.add(where, problem)


def check_results(problems: Adds, region: RegionPlan, resolve: Callable[[str], torch._ops.OpOverload | None]) -> None:
    """Add what is wrong with the results of steps that have a layout: dtypes and shapes that the operator gives."""
    for given in given_steps(region, resolve):
        if any(isinstance(v, str) and v for v in given.arguments.values()):
            for problem in _results(given, region):
                problems.add(given.where, problem)


def given_steps(region: RegionPlan, resolve: Callable[[str], torch._ops.OpOverload | None]) -> Iterator[Given]:
    """The steps of a region, those that run once first, with their arguments by name; `resolve` finds operators."""
    names = Names(region)
    for phase, steps in (("prepare", region.prepare), ("step", region.steps)):
        for at, step in enumerate(steps):
            op = resolve(step.op)
            assert op is not None, "the steps were checked before"
            schema = op._schema.arguments
            positional = [a.name for a in schema if not a.kwarg_only]
            arguments = {a.name: a.default_value for a in schema if a.has_default_value()}
            arguments |= dict(zip(positional, step.args, strict=False)) | step.kwargs
            yield Given(names.place(phase, at, step), step, op, arguments)


def _name(slot: int, region: RegionPlan, named: dict[int, str]) -> str:
    return named.get(slot, region.slots[slot].name)


# -- texts and pairs ---------------------------------------------------------------------------------------------------


def _texts(given: Given) -> Iterator[str]:
    for name, value in given.arguments.items():
        if isinstance(value, str) and value and (name == "rows" or name.endswith("layout")):
            try:
                (RowLayout if name == "rows" else Layout).parse(value)
            except (ValueError, TypeError, OverflowError) as error:
                yield f"argument {name!r}: {error}"


def pairs_of(given: Given) -> Iterator[tuple[str, str, str]]:
    """Names of the arguments codes, scales, layout."""
    for name in given.arguments:
        if name == "codes" and "layout" in given.arguments:
            yield "codes", "scales", "layout"
        elif f"{name}_scales" in given.arguments and f"{name}_layout" in given.arguments:
            yield name, f"{name}_scales", f"{name}_layout"


def _pairs(given: Given, region: RegionPlan, named: dict[int, str]) -> Iterator[str]:
    for codes_name, scales_name, layout_name in pairs_of(given):
        codes, scales = given.slot(codes_name), given.slot(scales_name)
        layout = _parsed(given.arguments[layout_name])
        if codes is None or scales is None or layout is None:
            continue
        what = f"{_name(codes, region, named)} in {layout}"
        yield from _held(what, region.slots[codes], region.slots[scales], layout)
        if region.slots[codes].role == "weight":
            expected = named[codes].removesuffix(".weight") + ".scale"
            if (found := _name(scales, region, named)) != expected:
                yield f"{what}: read with the scales {found!r}; its own are {expected!r}"


def _held(what: str, codes: SlotInfo, scales: SlotInfo, layout: Layout) -> Iterator[str]:
    """What is wrong with a pair's dtypes and shapes."""
    storage, kind = _short(layout.element.storage), _short(layout.scale_dtype)
    if codes.dtype != storage and not (layout.element.packed == 2 and codes.dtype == "uint8"):
        yield f"{what}: codes are {codes.dtype}; that layout has {storage}"
        return
    if scales.dtype != kind:
        yield f"{what}: scales are {scales.dtype}; that layout has {kind}"
    shape = _sizes(codes)
    values = (*shape[:-1], shape[-1] * layout.element.packed)
    if len(values) < (2 if layout.rows > 1 else 1):
        yield f"{what}: codes of shape {codes.shape} have no rows"
    elif _sizes(scales) != (expected := layout.scale_shape(values)):
        yield f"{what}: scales have shape {scales.shape}; that layout of {list(values)} has {list(expected)} at {PROBE}"


def _results(given: Given, region: RegionPlan) -> Iterator[str]:
    """Results against what the operator gives for arguments of these shapes."""
    try:
        made = results_of(given.op, given.step, region, PROBE)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
        yield f"does not run at {PROBE}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return
    for slot, (shape, dtype) in zip(given.step.outputs, made, strict=False):
        if slot is None:
            continue
        info = region.slots[slot]
        if (shape, dtype) != like(info, PROBE):
            found = f"{list(shape)} {_short(dtype)}"
            yield f"result {info.name} is {info.shape} {info.dtype}; the operator gives {found} at {PROBE}"


def _bare(steps: list[Given], region: RegionPlan, named: dict[int, str]) -> Iterator[tuple[str, str]]:
    """Codes that are read without their scales: FP8 anywhere, and weights that have scales."""
    weights = {name for slot, name in named.items() if region.slots[slot].role == "weight"}
    scaled = {
        slot
        for slot, name in named.items()
        if region.slots[slot].role == "weight" and name.removesuffix(".weight") + ".scale" in weights
    }
    for given in steps:
        told = {given.slot(name) for pair in pairs_of(given) for name in pair[:2]}
        kept = {region.slots[s].dtype for s in given.step.outputs if s is not None}
        for value in given.arguments.values():
            if not isinstance(value, Slot) or value.id in told:
                continue
            dtype = region.slots[value.id].dtype
            # A view or a copy hands them on as they are.
            if (value.id in scaled or dtype.startswith(("float8_e4m3", "float8_e5m2"))) and (
                dtype not in kept or given.step.op.startswith("atom.")
            ):
                yield given.where, f"reads codes of {_name(value.id, region, named)!r} without their scales"


def _parsed(text: Any) -> Layout | None:
    try:
        return Layout.parse(text) if isinstance(text, str) and text else None
    except (ValueError, TypeError, OverflowError):
        return None  # said already


# -- caches ------------------------------------------------------------------------------------------------------------


def _caches(given: Given, region: RegionPlan, named: dict[int, str]) -> Iterator[str]:
    """Pages hold whole rows of the layout that a step names, and plain pages are not read as packed ones."""
    text = given.arguments.get("rows")
    if not isinstance(text, str) and "rows" in given.arguments:
        return  # not a text: a tensor of row numbers
    for name in CACHES:
        slot = given.slot(name)
        if slot is None:
            continue
        info, what = region.slots[slot], _name(slot, region, named)
        if not text:
            if info.dtype == "uint8":
                yield f"cache {what!r} is packed, but the step names no row layout"
            continue
        try:
            rows = RowLayout.parse(text)
        except (ValueError, TypeError, OverflowError):
            continue  # said already
        if info.dtype != "uint8" or len(info.shape) != 2 or not isinstance(info.shape[1], int):
            yield f"cache {what!r} is {info.shape} {info.dtype}; pages of {text} are [pages, bytes] uint8"
        elif info.shape[1] % rows.row_bytes or not info.shape[1]:
            yield f"cache {what!r} has pages of {info.shape[1]} bytes; rows of {text} take {rows.row_bytes}"
        elif (width := _width(given, region)) is not None and width != rows.narrow + rows.wide:
            yield f"cache {what!r} has rows of {rows.narrow + rows.wide} channels in {text}; the step has {width}"


def _width(given: Given, region: RegionPlan) -> int | None:
    """Channels of the rows that a step writes or reads, where an argument says."""
    for name in ("kv", "weight", "q") if given.step.op != FUSED_WRITER else ("weight",):
        slot = given.slot(name)
        if slot is not None and region.slots[slot].shape:
            last = region.slots[slot].shape[-1]
            return last if isinstance(last, int) else None
    return None


def _one_layout(steps: list[Given], region: RegionPlan, named: dict[int, str]) -> Iterator[tuple[str, str]]:
    """All steps name one layout for a cache."""
    first: dict[int, Given] = {}
    for given in steps:
        if not isinstance(text := given.arguments.get("rows"), str):
            continue
        for slot in (s for name in CACHES if (s := given.slot(name)) is not None):
            known = first.setdefault(slot, given)
            if (other := known.arguments["rows"]) != text:
                what = f"cache {_name(slot, region, named)!r} in {text or 'full'}"
                yield given.where, f"{what}; {known.where} has it in {other or 'full'}"


# -- index rotation ----------------------------------------------------------------------------------------------------


def _rotation(steps: list[Given], producers: dict[int, Given], named: dict[int, str]) -> Iterator[tuple[str, str]]:
    """Index rows and index queries are rotated both, or neither."""
    for reader in (given for given in steps if given.step.op in INDEX_READERS):
        cache, read = reader.slot("cache"), _reads_rotated(reader, producers)
        for writer in (given for given in steps if cache is not None and given.slot("cache") == cache):
            written = _writes_rotated(writer, producers)
            if written is None or written == read:
                continue
            sides = ("rotated", "not rotated") if written else ("not rotated", "rotated")
            name = named.get(cache, str(cache)) if cache is not None else "?"
            yield reader.where, f"index rows {name!r} are {sides[0]} by {writer.where}; the queries here are {sides[1]}"


def _reads_rotated(reader: Given, producers: dict[int, Given]) -> bool:
    if reader.step.op == INDEX_READERS[1]:
        return bool(reader.arguments["layout"])
    return _is_rotated(reader.slot("q"), producers)


def _writes_rotated(writer: Given, producers: dict[int, Given]) -> bool | None:
    """None for a step that writes no rows."""
    if writer.step.op == FUSED_WRITER:
        return bool(writer.arguments["rotate"])
    stored = WRITERS.get(writer.step.op)
    return None if stored is None else _is_rotated(writer.slot(stored), producers)


def _is_rotated(slot: int | None, producers: dict[int, Given]) -> bool:
    """Whether a tensor comes out of the rotation, rounded since or not."""
    while slot is not None and slot in producers:
        given = producers[slot]
        if given.step.op == "atom.hadamard.default":
            return True
        if given.step.op not in _THROUGH:
            return False
        slot = next((s for n in ("codes", "x") if (s := given.slot(n)) is not None), None)
    return False


def _sizes(info: SlotInfo) -> tuple[int, ...]:
    return tuple(evaluate(s, PROBE) for s in info.shape)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
