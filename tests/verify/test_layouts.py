"""The static rules on layouts in a plan, on regions small enough to read: no model is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

import atomc.ops  # noqa: F401  defines torch.ops.atom
from atomc.artifact.check_layouts import check_layouts, check_results
from atomc.artifact.check_region import Problems, operator_of
from atomc.artifact.plan import Arg, DType, RegionInput, RegionPlan, Slot, SlotInfo, Step

ACT, TILE = "e4m3:1x128:e8m0", "e4m3:128x128:e8m0"
INDEX = "e2m1:1x32:e8m0"
ROWS = f"128:{INDEX}+0"


class Building:
    """A region, step by step."""

    def __init__(self) -> None:
        self.slots: list[SlotInfo] = []
        self.inputs: list[RegionInput] = []
        self.steps: list[Step] = []

    def input(self, role: Any, name: str, dtype: str, *shape: int | str) -> Slot:
        self.inputs.append(RegionInput(len(self.slots), role, name))
        return self._slot(name, role, dtype, shape)

    def step(self, op: str, args: list[Arg], *results: tuple[Any, ...]) -> list[Slot]:
        made = [self._slot(f"{op}_{len(self.slots)}", "temporary", r[0], r[1:]) for r in results]
        self.steps.append(Step(f"atom.{op}.default", args, {}, [s.id for s in made], [], "model.py:1"))
        return made

    def _slot(self, name: str, role: Any, dtype: str, shape: tuple[Any, ...]) -> Slot:
        self.slots.append(SlotInfo(name, role, list(shape), dtype, None, 0, 0, None))
        return Slot(len(self.slots) - 1)

    def problems(self) -> list[str]:
        region = RegionPlan("r", self.inputs, {}, self.slots, [], self.steps, 0)
        found = Problems()
        check_layouts(found, region, operator_of)
        check_results(found, region, operator_of)
        return found.found


def linear() -> Building:
    """A weight in tiles, expanded; an activation, rounded."""
    b = Building()
    codes = b.input("weight", "wq.weight", "float8_e4m3fn", 200, 300)
    scales = b.input("weight", "wq.scale", "float8_e8m0fnu", 2, 3)
    b.input("weight", "wo.scale", "float8_e8m0fnu", 2, 3)
    x = b.input("value", "x", "float32", "T", 300)
    b.step("dequantize", [codes, scales, TILE, DType("float32")], ("float32", 200, 300))
    pair = b.step("quantize", [x, ACT], ("float8_e4m3fn", "T", 300), ("float8_e8m0fnu", "T", 3))
    b.step("dequantize", [*pair, ACT, DType("float32")], ("float32", "T", 300))
    return b


def index(write: bool = True, read: bool = True) -> Building:
    """Index rows written and read, not fused; rotated or not."""
    b = Building()
    cache = b.input("state", "index_rows", "uint8", "blocks", 68 * 4)
    x, q = b.input("value", "x", "float32", "N4", 128), b.input("value", "q", "float32", "T", 4, 128)
    table, ends = b.input("batch", "block_table", "int32", "B", 7), b.input("batch", "csa_ends", "int32", "N4")
    tokens = [b.input("batch", n, "int32", "T") for n in ("positions", "requests")]
    start, weights = b.input("batch", "query_start", "int32", "B+1"), b.input("value", "w", "float32", "T", 4)
    if write:
        (x,) = b.step("hadamard", [x], ("float32", "N4", 128))
    (packed,) = b.step("pack_rows", [x, ROWS], ("uint8", "N4", 68))
    b.step("compressed_packed_insert", [cache, packed, table, ends, *tokens, 4, ROWS])
    if read:
        (q,) = b.step("hadamard", [q], ("float32", "T", 4, 128))
    pair = b.step("quantize", [q, INDEX], ("int8", "T", 4, 64), ("float8_e8m0fnu", "T", 4, 4))
    (q,) = b.step("dequantize", [*pair, INDEX, DType("float32")], ("float32", "T", 4, 128))
    b.step("index_topk", [q, weights, cache, table, tokens[1], tokens[0], start, 4, 5, ROWS], ("int32", "T", 5))
    return b


def test_what_a_compiler_writes_has_no_problems() -> None:
    assert linear().problems() == []
    assert index().problems() == []
    assert index(write=False, read=False).problems() == []


def slot(b: Building, at: int, **changed: Any) -> None:
    b.slots[at] = msgspec.structs.replace(b.slots[at], **changed)


def args(b: Building, step: int, change: Callable[[list[Arg]], None]) -> None:
    change(b.steps[step].args)


def put(at: int, value: Arg) -> Callable[[list[Arg]], None]:
    def change(found: list[Arg]) -> None:
        found[at] = value

    return change


LINEAR: dict[str, tuple[Callable[[Building], None], str]] = {
    "no layout": (lambda b: args(b, 0, put(2, "e4m3:tile:e8m0")), "'e4m3:tile:e8m0' is no layout"),
    "codes of the other dialect": (lambda b: slot(b, 0, dtype="float8_e4m3fnuz"), f"wq.weight in {TILE}: codes"),
    "text of the other dialect": (lambda b: args(b, 0, put(2, "e4m3fnuz:128x128:e8m0")), "has float8_e4m3fnuz"),
    "scales in float32": (lambda b: slot(b, 1, dtype="float32"), f"wq.weight in {TILE}: scales are float32"),
    "scales transposed": (lambda b: slot(b, 1, shape=[3, 2]), f"wq.weight in {TILE}: scales have shape [3, 2]"),
    "smaller tiles": (lambda b: args(b, 0, put(2, "e4m3:64x64:e8m0")), "scales have shape [2, 3]"),
    "groups of an activation": (lambda b: args(b, 2, put(2, "e4m3:1x32:e8m0")), "layout of [11, 300] has [11, 10]"),
    "scales of another weight": (lambda b: args(b, 0, put(1, Slot(2))), "read with the scales 'wo.scale'"),
    "codes as numbers": (lambda b: args(b, 1, put(0, Slot(0))), "reads codes of 'wq.weight' without their scales"),
    "result of another dtype": (lambda b: slot(b, 4, dtype="bfloat16"), "is [200, 300] bfloat16; the operator gives"),
    "rounded to another layout": (lambda b: args(b, 1, put(1, "e4m3:1x64:e8m0")), "result quantize_6 is"),
    "not enough codes": (lambda b: slot(b, 5, shape=["T", 150]), "quantize_5"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_a_pair_that_is_not_its_layout_is_refused(name: str) -> None:
    change, said = LINEAR[name]
    b = linear()
    change(b)
    assert any(said in p for p in b.problems()), b.problems()


def queries(b: Building) -> int:
    """The slot that `index_topk` reads."""
    found = b.steps[-1].args[0]
    assert isinstance(found, Slot)
    return found.id


CACHE: dict[str, tuple[Callable[[Building], None], str]] = {
    "no row layout": (lambda b: args(b, 2, put(7, "128:rows")), "is no row layout"),
    "half a row on a page": (lambda b: slot(b, 0, shape=["blocks", 100]), "'index_rows' has pages of 100 bytes"),
    "a plain cache": (lambda b: slot(b, 0, dtype="float32", shape=["blocks", 4, 128]), "is ['blocks', 4, 128] float32"),
    "packed, not told": (lambda b: args(b, 6, put(9, "")), "'index_rows' is packed, but the step names no row layout"),
    "two layouts": (lambda b: args(b, 6, put(9, "128:e2m1:1x128:e8m0+0")), "'index_rows' in 128:e2m1:1x128:e8m0+0"),
    "rows of another width": (lambda b: slot(b, queries(b), shape=["T", 4, 64]), "the step has 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHE)
def test_a_cache_that_is_not_its_layout_is_refused(name: str) -> None:
    change, said = CACHE[name]
    b = index()
    change(b)
    assert any(said in p for p in b.problems()), b.problems()


@pytest.mark.parametrize("write", [True, False])
def test_a_rotation_on_one_side_is_refused(write: bool) -> None:
    (problem,) = index(write=write, read=not write).problems()
    assert "index rows 'index_rows' are" in problem
    assert ("are rotated by step" in problem) == write
