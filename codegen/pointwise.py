"""The generator: a program of `atom.pointwise` becomes one readable Triton kernel (`atomc.ops.pointwise`).

Contract: each operation is computed in fp32 (integers in their own type) and rounded to the dtype that torch gives it.
Terms:
    space     the shape of the results, as rows of the last dim: `row` counts the others, i0, i1, .. are its parts.
    index     how a value is addressed: a text for each of its dims. A view changes the index, a gather computes one.
    lane      the index of a dim that is reduced; where it is as long as the last dim of the space, that is its index.
Illegal: dims other than the first of unknown size; reductions of several lengths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from atomc.codegen.device import Device, cdiv, power_of_two
from atomc.codegen.source import kernel_of
from atomc.ops.pointwise import CREATIONS, REDUCTIONS, VIEWS, Line, Name, Program, parse

TILE: Final = 1024  # elements of a program, at most, unless a row that is reduced has more
TYPES: Final = {
    torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16", torch.int32: "tl.int32",
    torch.int64: "tl.int64", torch.bool: "tl.int1",
}  # fmt: skip
NAN = "propagate_nan=tl.PropagateNan.ALL"
COMPARISONS: Final = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
# Operator -> its expression; comparisons, casts, clamps and `where` are written apart.
EXPRESSIONS: Final[dict[str, str]] = {
    "abs": "tl.abs({0})", "add": "{0} + {1}", "contiguous": "{0}", "cos": "cosine({0})", "div": "{0} / {1}",
    "exp": "tl.exp({0})", "log": "tl.log({0})", "logical_and": "{0} & {1}", "logical_not": "{0} == 0",
    "logical_or": "{0} | {1}", "maximum": f"tl.maximum({{0}}, {{1}}, {NAN})",
    "minimum": f"tl.minimum({{0}}, {{1}}, {NAN})", "mul": "{0} * {1}", "neg": "-{0}", "reciprocal": "1.0 / {0}",
    "relu": f"tl.maximum({{0}}, 0.0, {NAN})", "rsqrt": "tl.rsqrt({0})", "rsub": "{1} - {0}",
    "sigmoid": "tl.sigmoid({0})", "silu": "{0} * tl.sigmoid({0})", "sin": "sine({0})", "sqrt": "tl.sqrt_rn({0})",
    "square": "{0} * {0}", "sub": "{0} - {1}",
}  # fmt: skip
HEADER: Final = '''"""{title}, generated from:

{program}
"""

import triton
import triton.language as tl
{imports}

@triton.jit
def {name}({arguments}, M, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """{results} of shape {shape}: ROWS rows, BLOCK columns of each."""
'''


@dataclass
class Writer:
    """Writes the lines of one kernel.

    Attributes:
        values: of the program, meta tensors: their shapes, strides and dtypes. space: leading dims, and the last.
        lanes: the length of what is reduced; 0: nothing is. gathered: inputs whose first size the kernel is told.
    """

    program: Program
    values: dict[str, Any]
    space: tuple[Any, ...]
    lanes: int
    lines: list[str] = field(default_factory=list)
    gathered: dict[str, str] = field(default_factory=dict)
    _made: dict[tuple[str, tuple[str, ...]], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_name = {line.result: line for line in self.program.lines}
        self._write("row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]")
        self._write("column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]")
        self._write(f"live, inside = row < M, (row < M) & (column < {self.space[-1]})")
        if self.lanes and self.lane == "lane":
            self._write("lane = tl.arange(0, LANES)[None, :]")
        inner = 1
        for dim in range(len(self.space) - 2, -1, -1):
            part = f"row // {inner}" if inner > 1 else "row"
            self._write(f"i{dim} = {part if dim == 0 else f'{part} % {self.space[dim]}'}")
            inner *= self.space[dim] if dim else 1

    @property
    def lane(self) -> str:
        return "column" if self.lanes == self.space[-1] else "lane"

    @property
    def index(self) -> tuple[str, ...]:
        """Of a result."""
        return (*(f"i{dim}" for dim in range(len(self.space) - 1)), "column")

    def _write(self, line: str) -> None:
        self.lines.append(line)

    def _mask(self, index: Sequence[str]) -> str:
        used = set(index)
        if "column" in used:
            return "inside"
        return f"live & (lane < {self.lanes})" if "lane" in used else "live"

    def value(self, name: str, index: tuple[str, ...]) -> str:
        """The variable that holds a value at an index; written when it is first needed."""
        place = (name, index)
        if place not in self._made:
            text = self._line(self.by_name[name], index) if name in self.by_name else self._load(name, index)
            variable = text
            if not re.fullmatch(r"\w+", text):
                variable = f"{name}_{len(self._made)}"
                self._write(f"{variable} = {text}")
            self._made[place] = variable
        return self._made[place]

    def _load(self, name: str, index: tuple[str, ...]) -> str:
        tensor = self.values[name]
        terms = [i if s == 1 else f"{i} * {s}" for i, s in zip(index, tensor.stride(), strict=True) if i != "0" and s]
        at = " + ".join([name, *terms])
        full = f"{at} + (row * 0)" if not terms else at
        return f"tl.load({full}, mask={self._mask(index)}, other=0)"

    def _line(self, line: Line, index: tuple[str, ...]) -> str:
        kind, made = line.op.split(".")[1], self.values[line.result]
        if line.op in VIEWS:
            return self._view(line, index)
        if line.op in CREATIONS:
            return self._creation(line, index)
        if kind in ("index", "embedding"):
            return self._gather(line, index)
        if line.op in REDUCTIONS:
            return self._reduction(line, index)
        return self._elementwise(line, kind, made.dtype, index)

    def _view(self, line: Line, index: tuple[str, ...]) -> str:
        source = line.args[0].text
        shape = self.values[source].shape
        if line.op == "aten.unsqueeze.default":
            dim = line.args[1] % (len(shape) + 1)
            return self.value(source, index[:dim] + index[dim + 1 :])
        kept = index[len(index) - len(shape) :]
        return self.value(source, self._broadcast(shape, kept))

    @staticmethod
    def _broadcast(shape: Sequence[Any], index: Sequence[str]) -> tuple[str, ...]:
        """The index of an operand: 0 along dims of size 1, and without those that it does not have."""
        kept = index[len(index) - len(shape) :]
        return tuple("0" if isinstance(n, int) and n == 1 else i for n, i in zip(shape, kept, strict=True))

    def _creation(self, line: Line, index: tuple[str, ...]) -> str:
        dtype = self.values[line.result].dtype
        if line.op == "aten.eye.default":
            return f"({index[0]} == {index[1]}).to({TYPES[dtype]})"
        value = {"zeros": 0, "ones": 1}.get(line.op.split(".")[1], line.args[-1])
        wide = f"tl.full((1, 1), {value}, {'tl.float32' if dtype.is_floating_point else TYPES[dtype]})"
        return wide if dtype == torch.float32 else f"{wide}.to({TYPES[dtype]})"

    def _gather(self, line: Line, index: tuple[str, ...]) -> str:
        table, rows = (line.args[0], line.args[1][0]) if line.op == "aten.index.Tensor" else line.args[:2]
        dims = self.values[rows.text].dim()
        at = self.value(rows.text, index[:dims])
        if line.op == "aten.index.Tensor":  # an index below 0 counts from the end
            size = self.gathered.setdefault(table.text, f"size_{table.text}")
            at = self._named(f"tl.where({at} < 0, {at} + {size}, {at})")
        return self.value(table.text, (self._named(f"{at}.to(tl.int64)"), *index[dims:]))

    def _named(self, text: str) -> str:
        """A variable for an index: equal texts are one."""
        place = (text, ())
        if place not in self._made:
            self._made[place] = f"at_{len(self._made)}"
            self._write(f"{self._made[place]} = {text}")
        return self._made[place]

    def _reduction(self, line: Line, index: tuple[str, ...]) -> str:
        source = self.values[line.args[0].text]
        keeps = len(index) == source.dim()
        lane = self.lane
        x = self.value(line.args[0].text, (*(index[:-1] if keeps else index), lane))
        wide, dtype = f"{x}.to(tl.float32)", TYPES[self.values[line.result].dtype]
        there = f"{lane} < {self.lanes}"
        if line.op == "aten.amax.default":
            return f'tl.max(tl.where({there}, {wide}, float("-inf")), 1)[:, None].to({dtype})'
        total = f"tl.sum(tl.where({there}, {wide}, 0.0), 1)[:, None]"
        return f"({total} / {self.lanes}).to({dtype})" if line.op == "aten.mean.dim" else f"{total}.to({dtype})"

    def _elementwise(self, line: Line, kind: str, dtype: torch.dtype, index: tuple[str, ...]) -> str:
        tensors = [self.values[a.text] for a in line.args if isinstance(a, Name)]
        if kind == "to":
            x = self._operand(line.args[0], index)
            return f"({x} != 0)" if dtype == torch.bool else f"{x}.to({TYPES[dtype]})"
        if kind == "where":
            chosen, a, b = (self._operand(arg, index) for arg in line.args)
            return f"tl.where({chosen}, {a}, {b}).to({TYPES[dtype]})"
        inner = dtype
        if dtype == torch.bool:  # compared in the type that both have
            inner = tensors[0].dtype if len(tensors) == 1 else torch.promote_types(tensors[0].dtype, tensors[1].dtype)
            if not inner.is_floating_point and any(isinstance(a, float) for a in line.args):
                inner = torch.float32
        if inner.is_floating_point:
            inner = torch.float32
        given = [self._cast(arg, inner, index) for arg in line.args]
        if kind in COMPARISONS:
            return f"{given[0]} {COMPARISONS[kind]} {given[1]}"
        if kind == "clamp":
            return f"({_clamped(given)}).to({TYPES[dtype]})"
        text = EXPRESSIONS[kind].format(*given)
        return text if dtype == torch.bool else f"({text}).to({TYPES[dtype]})"

    def _operand(self, arg: Any, index: tuple[str, ...]) -> str:
        if not isinstance(arg, Name):
            return repr(arg)
        return self.value(arg.text, self._broadcast(self.values[arg.text].shape, index))

    def _cast(self, arg: Any, dtype: torch.dtype, index: tuple[str, ...]) -> str:
        text = self._operand(arg, index)
        if not isinstance(arg, Name):
            return repr(float(arg)) if dtype.is_floating_point and arg is not None else text
        return text if self.values[arg.text].dtype == dtype else f"{text}.to({TYPES[dtype]})"


def _clamped(given: Sequence[str]) -> str:
    text, bounds = given[0], [*given[1:], "None"]
    if bounds[0] != "None":
        text = f"tl.maximum({text}, {bounds[0]}, {NAN})"
    return text if bounds[1] == "None" else f"tl.minimum({text}, {bounds[1]}, {NAN})"


@dataclass(frozen=True)
class Generated:
    """A kernel's text, its name, and the inputs whose first size it is told."""

    source: str
    name: str
    gathered: tuple[str, ...]
    lanes: int


def generate(program: Program, text: str, values: dict[str, Any], inputs: int, space: tuple[Any, ...]) -> Generated:
    """The kernel of a program whose values have the shapes of `values`, for results of shape `space`.

    Raises:
        ValueError: no kernel computes it; says why.
    """
    lanes = {values[line.args[0].text].shape[-1] for line in program.lines if line.op in REDUCTIONS}
    if len(lanes) > 1:
        raise ValueError(f"a generated kernel reduces rows of one length, not of {sorted(lanes)}")
    writer = Writer(program, values, space, next(iter(lanes), 0))
    made = [writer.value(name, writer.index[: values[name].dim()]) for name in program.results]
    for place, variable in enumerate(made):
        writer.lines.append(f"tl.store(out{place} + row * {space[-1]} + column, {variable}, mask=inside)")
    kinds = [line.op.split(".")[1] for line in program.lines if line.op not in VIEWS and "contiguous" not in line.op]
    name = "_".join(["pointwise", *dict.fromkeys(kinds)])[:60].rstrip("_")
    arguments = [f"a{i}" for i in range(inputs)] + [f"out{i}" for i in range(len(made))]
    arguments += list(writer.gathered.values())
    shape = "[" + ", ".join("M" if i == 0 else str(n) for i, n in enumerate(space)) + "]"
    body = "".join(f"    {line}\n" for line in writer.lines)
    used = [function for function in ("cosine", "sine") if f"{function}(" in body]
    header = HEADER.format(
        imports=f"\nfrom atomc.codegen.kernels.common import {', '.join(used)}\n" if used else "",
        title=name.replace("_", " "), program="\n".join("    " + line for line in text.splitlines()), name=name,
        arguments=", ".join(arguments), results=", ".join(program.results), shape=shape,
    )  # fmt: skip
    return Generated(header + body, name, tuple(writer.gathered), writer.lanes)


def pointwise(device: Device, inputs: Sequence[Tensor], sizes: Sequence[Any], program: str) -> list[Tensor]:
    """See `atomc.ops.pointwise.pointwise`."""
    known = parse(program)
    metas = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in inputs]
    values = known.run(metas, sizes)
    first = values[known.results[0]]
    space = tuple(first.shape) if first.dim() > 1 else (first.shape[0], 1)
    if not all(isinstance(n, int) for n in space[1:]):
        raise ValueError(f"results of shape {list(space)}: all but the first size must be known")
    made = generate(known, program, values, len(inputs), space)
    results = [device.empty(tuple(values[name].shape), values[name].dtype) for name in known.results]
    rows = space[0] * math.prod(space[1:-1])
    whole = made.lanes == space[-1]
    block = power_of_two(space[-1]) if whole else min(power_of_two(space[-1]), TILE)
    lanes = power_of_two(made.lanes) if made.lanes else 1
    tile = max(block, lanes)
    per = max((TILE if device.tokens > 64 else TILE // 4) // tile, 1)
    args: dict[str, Any] = {f"a{i}": x for i, x in enumerate(inputs)} | {f"out{i}": x for i, x in enumerate(results)}
    args |= {f"size_{name}": values[name].shape[0] for name in made.gathered} | {"M": rows}
    grid = (cdiv(rows, per), cdiv(space[-1], block))
    constants = {"ROWS": per, "BLOCK": block, "LANES": lanes}
    warps = min(max(per * tile // 256, 1), 8)
    device.launch(kernel_of(made.source, made.name), grid, args, constants, warps=warps)
    return results
