"""What each operator must do: bytes between it and memory, and FLOPs, as formulas from its arguments' shapes.

Contract:
    Every operator that has a kernel has a cost here, a function of its name's last part. Bytes are what must move
    however it is computed: each argument read once, each result written once, packed layouts with their scales; of
    tables, caches and experts only what is touched. FLOPs are those of the mathematics, a product and its sum as two,
    not what a kernel repeats; a few operations for each element stand for all that is not a product.

Terms:
    matrix, vector   products that matrix units can do; everything else, in float32
    of               the argument whose launches do the FLOPs: a kernel that multiplies with a weight takes that weight
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch

import atomc.ops  # noqa: F401  # registers the operators
from atomc.artifact.plan import DTYPE_BYTES, RegionPlan, Slot, SlotInfo, Step, slots_of
from atomc.costs.formula import Formula, formula, hit, least, rows
from atomc.errors import AtomcError
from atomc.formats import Layout, RowLayout
from atomc.ops import pointwise

T, B, C = formula("T"), formula("B"), formula("C")


class CostError(AtomcError):
    """An operator whose work nothing describes."""


@dataclass(frozen=True)
class Flops:
    """FLOPs, and the slot whose launches do them; `wide`: operands of the product that are float32."""

    of: int
    count: Formula
    kind: Literal["matrix", "vector"]
    wide: int = 0


@dataclass
class Work:
    """What an operator does.

    Attributes:
        traffic: slot -> bytes read or written of it. flops: in parts.
        partly: slots of which only that is touched, and not their whole. scores: slot -> bytes of the float32 scratch
            that a launch with that slot writes, where the memory is for the largest context.
    """

    traffic: dict[int, Formula] = field(default_factory=dict)
    flops: list[Flops] = field(default_factory=list)
    partly: set[int] = field(default_factory=set)
    scores: dict[int, Formula] = field(default_factory=dict)

    @property
    def bytes(self) -> Formula:
        """All of it."""
        return sum(self.traffic.values(), formula(0))

    def count(self, kind: str = "") -> Formula:
        """FLOPs of a kind, or all."""
        return sum((f.count for f in self.flops if kind in ("", f.kind)), formula(0))


class Call:
    """A step with its arguments by name, and the work being counted."""

    def __init__(self, step: Step, region: RegionPlan) -> None:
        namespace, name, overload = step.op.split(".")
        schema = getattr(getattr(getattr(torch.ops, namespace), name), overload)._schema.arguments
        self.arguments: dict[str, Any] = {a.name: a.default_value for a in schema if a.has_default_value()}
        self.arguments |= dict(zip([a.name for a in schema if not a.kwarg_only], step.args, strict=False)) | step.kwargs
        self.slots = region.slots
        self.results = [i for i in step.outputs if i is not None]
        self.work = Work({i: self.bytes(i) for i in (*slots_of(step), *self.results)})

    def slot(self, name: str) -> int:
        value = self.arguments[name]
        assert isinstance(value, Slot), f"{name} is {value}, no tensor"
        return value.id

    def has(self, name: str) -> bool:
        return isinstance(self.arguments.get(name), Slot)

    def info(self, name: str) -> SlotInfo:
        return self.slots[self.slot(name)]

    def width(self, name: str, dim: int = -1) -> int:
        """A size that is known when it is compiled."""
        size = self.info(name).shape[dim]
        assert isinstance(size, int), f"{name} has {size} in dim {dim}"
        return size

    def elements(self, slot: int) -> Formula:
        product = formula(1)
        for size in self.slots[slot].shape:
            product *= formula(size)
        return product

    def bytes(self, slot: int) -> Formula:
        return self.elements(slot) * DTYPE_BYTES[self.slots[slot].dtype]

    def touch(self, name: str, size: Formula) -> None:
        """Only so many bytes of an argument are read or written."""
        self.work.traffic[self.slot(name)] = size
        self.work.partly.add(self.slot(name))

    def does(self, of: str | int, count: Formula, kind: Literal["matrix", "vector"] = "matrix", wide: int = 0) -> None:
        slot = self.slot(of) if isinstance(of, str) else of
        self.work.flops.append(Flops(slot, count, kind, wide))

    def row_bytes(self, name: str) -> int:
        """Bytes of a row of a cache argument, scales included."""
        layout = self.arguments.get("rows")
        return RowLayout.parse(layout).row_bytes if layout else self.width(name) * DTYPE_BYTES[self.info(name).dtype]

    def wide(self, *names: str) -> int:
        return sum(self.info(name).dtype == "float32" for name in names)


def work_of(step: Step, region: RegionPlan) -> Work:
    """What a step that has kernels does.

    Raises:
        CostError: its operator has no cost.
    """
    cost = COSTS.get(step.op.split(".")[1])
    if cost is None:
        raise CostError(f"{step.op} ({step.source}) has kernels, but nothing says what it costs: add it to COSTS.")
    call = Call(step, region)
    cost(call)
    return call.work


# -- products ----------------------------------------------------------------------------------------------------------


def _linear(call: Call) -> None:
    x = "input" if call.has("input") else "x"
    call.does("weight", call.elements(call.results[0]) * 2 * call.width("weight"), wide=call.wide(x, "weight"))


def _bmm(call: Call) -> None:
    depth, wide = call.width("self"), call.wide("self", "mat2")
    call.does("mat2", call.elements(call.results[0]) * 2 * depth, wide=wide)


def _scaled(call: Call) -> None:
    depth = call.width("codes") * Layout.parse(call.arguments["layout"]).element.packed
    call.does("weight", call.elements(call.results[0]) * 2 * depth)


def _experts(call: Call) -> None:
    """Each expert that some token chooses is read once; all tokens choose alike (`hit`)."""
    experts, chosen = call.width("w13", 0), call.width("indices")
    for name in ("w13", "w13_scales", "w2", "w2_scales"):
        if call.has(name):
            call.touch(name, call.bytes(call.slot(name)) * (1 / experts) * hit(experts, chosen))
    for name in ("w13", "w2"):
        layout = call.arguments.get(f"{name}_layout")
        packed = Layout.parse(layout).element.packed if layout else 1
        wide = 2 * call.wide(name)  # both operands have its dtype
        call.does(name, T * (2 * chosen * call.width(name, 1) * call.width(name) * packed), wide=wide)


# -- attention, index --------------------------------------------------------------------------------------------------


def _attention(call: Call) -> None:
    """Scores and sums over a token's rows, 4 FLOPs a channel and head; a request's tokens share the rows they read."""
    most, ratio = call.arguments["window_size"], call.arguments["ratio"]
    seen, row = rows(most, 1), call.row_bytes("window")
    call.touch("window", least(B * C, T + B * (most - 1)) * row)
    if call.has("cache"):
        chosen = call.width("topk") if call.has("topk") else None
        every = B * C * (1 / ratio)
        call.touch("cache", (every if chosen is None else least(T * rows(chosen, ratio), every)) * row)
        seen += rows(chosen, ratio)
    call.does("window", T * seen * (4 * call.width("q", 1) * call.width("q")))


def _index(call: Call) -> None:
    """Every visible row is scored: a product for each head, then relu, weight and sum; then the selection."""
    heads, width, ratio = call.width("q", 1), call.width("q"), call.arguments["ratio"]
    call.touch("cache", B * C * (call.row_bytes("cache") / ratio))
    scored = T * rows(None, ratio)
    call.does("cache", scored * (2 * heads * width))
    call.does("cache", scored * (3 * heads), "vector")
    call.work.scores[call.slot("cache")] = scored * 4


# -- caches and compressors --------------------------------------------------------------------------------------------


def _insert(call: Call) -> None:
    source = "packed" if call.has("packed") else "x"
    call.touch("cache", formula(call.info(source).shape[0]) * call.row_bytes("cache"))


def _qk_insert(call: Call) -> None:
    call.touch("cache", formula(call.info("kv").shape[0]) * call.row_bytes("cache"))
    call.does("q", (call.elements(call.slot("q")) + call.elements(call.slot("kv"))) * 6, "vector")


def _pool(call: Call) -> None:
    """A completed window reads its entries: those of this step from kv and gate, a request's older ones from state."""
    ends, ring, width = formula(call.info("ends").shape[0]), call.width("state", 1), call.width("state")
    call.touch("state", least(ends, B) * (8 * ring * width))
    call.touch("cache", ends * call.row_bytes("cache"))
    call.does("cache", ends * (6 * ring * width), "vector")


def _update(call: Call) -> None:
    kept = least(T, B * call.width("state", 1)) * (4 * call.width("state"))
    call.touch("state", kept * 2)
    for name in ("kv", "gate"):
        call.touch(name, kept)


# -- hyper-connections -------------------------------------------------------------------------------------------------


def _streams(call: Call) -> None:
    """Mixing: a product of all streams with `fn` in float32, Sinkhorn's steps, the weighted sums of streams."""
    streams, h = call.width("h", -2), call.elements(call.slot("h"))
    of = "fn" if call.has("fn") else "h"
    if call.has("fn"):
        call.does("fn", h * (2 * call.width("fn", 0)), wide=call.wide("h", "fn"))
    passes = (2 if call.has("fn") else 0) + (2 * (streams + 1) if call.has("y") else 0)
    call.does(of, h * passes, "vector")
    if iterations := call.arguments.get("iters"):
        lead = h * (1 / (streams * call.width("h")))
        call.does(of, lead * (4 * iterations * streams * streams), "vector")


# -- the rest ----------------------------------------------------------------------------------------------------------


def _each(operations: int) -> Callable[[Call], None]:
    """So many float32 operations for each element of the tensors that it reads."""

    def cost(call: Call) -> None:
        tensors = [value.id for value in call.arguments.values() if isinstance(value, Slot)]
        call.does(tensors[0], sum((call.elements(i) for i in tensors), formula(0)) * operations, "vector")

    return cost


def _hash(call: Call) -> None:
    table = call.info("tid2eid")
    call.touch("tid2eid", T * (call.width("tid2eid") * DTYPE_BYTES[table.dtype]))
    call.does("logits", call.elements(call.slot("logits")) * 8, "vector")


def _copy(_: Call) -> None:
    """Bytes only."""


def _hadamard(call: Call) -> None:
    call.does("x", call.elements(call.slot("x")) * (2 * call.width("x")))


def _pointwise(call: Call) -> None:
    """One operation for each line and element of the results; a gather reads the rows that it takes."""
    inputs = [arg.id for arg in call.arguments["inputs"]]
    program = pointwise.parse(call.arguments["program"])
    for line in program.lines:
        if line.op in pointwise.GATHERS and isinstance(line.args[0], pointwise.Name):
            table, index = (_input(name, program) for name in (line.args[0], line.args[1]))
            if table is not None and index is not None:
                row = formula(DTYPE_BYTES[call.slots[inputs[table]].dtype])
                for size in call.slots[inputs[table]].shape[1:]:
                    row *= formula(size)
                call.work.traffic[inputs[table]] = call.elements(inputs[index]) * row
                call.work.partly.add(inputs[table])
    moved = pointwise.VIEWS | pointwise.CREATIONS | pointwise.GATHERS | {"aten.contiguous.default", "aten.to.dtype"}
    operations = sum(line.op not in moved for line in program.lines)
    if inputs and operations:
        largest = sum((call.elements(i) for i in call.results), formula(0))
        call.does(inputs[0], largest * operations, "vector")


def _input(value: Any, program: pointwise.Program) -> int | None:
    """The number of the input that a value of a program is made of, through its first arguments."""
    made = {line.result: line for line in program.lines}
    while value is not None:
        if isinstance(value, list):
            value = next((v for v in value if v is not None), None)
        elif isinstance(value, pointwise.Name) and value.text in made:
            value = made[value.text].args[0] if made[value.text].args else None
        else:
            return int(value.text[1:]) if isinstance(value, pointwise.Name) and value.text[0] == "a" else None
    return None


COSTS: Final[dict[str, Callable[[Call], None]]] = {
    "linear": _linear, "linear_fp32": _linear, "scaled_linear": _scaled, "scaled_grouped_output": _scaled,
    "bmm": _bmm, "moe_experts": _experts, "scaled_moe_experts": _experts,
    "clone": _copy, "contiguous": _copy, "reshape": _copy,
    "sparse_attention": _attention, "sparse_attention_inverse_rope": _attention,
    "sparse_attention_inverse_rope_quant": _attention, "index_topk": _index, "index_rope_topk": _index,
    "cache_insert": _insert, "packed_insert": _insert, "qk_norm_rope_insert": _qk_insert,
    "compressor_pool_norm_rope_insert": _pool, "compressor_update": _update,
    "hc_head": _streams, "hc_head_norm": _streams, "hc_post": _streams, "hc_pre": _streams, "hc_pre_norm": _streams,
    "hc_post_pre_norm": _streams, "hc_post_pre_norm_quant": _streams,
    "rms_norm": _each(4), "rms_norm_pair": _each(4), "rms_norm_pair_quant": _each(8), "rope": _each(3),
    "quantize": _each(4), "pack_rows": _each(4), "hadamard": _hadamard,
    "route_topk": _each(8), "route_hash": _hash, "swiglu": _each(5), "swiglu_quant": _each(9),
    "pointwise": _pointwise,
}  # fmt: skip
