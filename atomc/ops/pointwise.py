"""Chains of pointwise operations, gathers and reductions of the last dim as one operator: its meaning is its text.

Contract:
    A program is lines `v0 = aten.mul.Tensor(a0, 0.5)`, then `return v0, v1`. Names: a0 .. the inputs, s0 .. the sizes,
    dtypes as torch spells them. The operators are those of OPERATORS and mean what torch's do.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from atomc.errors import AtomcError
from atomc.ops.registry import define

VIEWS: Final = frozenset({"aten.expand.default", "aten.unsqueeze.default"})
CREATIONS: Final = frozenset({"aten.eye.default", "aten.full.default", "aten.ones.default", "aten.zeros.default"})
GATHERS: Final = frozenset({"aten.embedding.default", "aten.index.Tensor"})
REDUCTIONS: Final = frozenset({"aten.amax.default", "aten.mean.dim", "aten.sum.dim_IntList"})
ELEMENTWISE: Final = frozenset(
    f"aten.{name}"
    for name in (
        "abs.default", "add.Scalar", "add.Tensor", "clamp.default", "contiguous.default", "cos.default", "div.Scalar",
        "div.Tensor", "eq.Scalar", "eq.Tensor", "exp.default", "ge.Scalar", "ge.Tensor", "gt.Scalar", "gt.Tensor",
        "le.Scalar", "le.Tensor", "log.default", "logical_and.default", "logical_not.default", "logical_or.default",
        "lt.Scalar", "lt.Tensor", "maximum.default", "minimum.default", "mul.Scalar", "mul.Tensor", "ne.Scalar",
        "ne.Tensor", "neg.default", "reciprocal.default", "relu.default", "rsqrt.default", "rsub.Scalar",
        "sigmoid.default", "silu.default", "sin.default", "sqrt.default", "square.default", "sub.Scalar", "sub.Tensor",
        "to.dtype", "where.self",
    )
)  # fmt: skip
OPERATORS: Final = VIEWS | CREATIONS | GATHERS | REDUCTIONS | ELEMENTWISE


class ProgramError(AtomcError):
    """A text that is no program of pointwise operations."""


@dataclass(frozen=True)
class Name:
    """A value, an input or a size, by its name in the program."""

    text: str


@dataclass(frozen=True)
class Line:
    """One operation: the name of its result, the operator as a plan spells it, its arguments."""

    result: str
    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Program:
    """The lines in order, and the names of the results."""

    lines: tuple[Line, ...]
    results: tuple[str, ...]

    def run(self, inputs: Sequence[Tensor], sizes: Sequence[Any]) -> dict[str, Any]:
        """Every value by its name."""
        known: dict[str, Any] = {f"a{i}": x for i, x in enumerate(inputs)} | {f"s{i}": n for i, n in enumerate(sizes)}
        for line in self.lines:
            namespace, name, overload = line.op.split(".")
            function = getattr(getattr(getattr(torch.ops, namespace), name), overload)
            kwargs = {key: _value(arg, known) for key, arg in line.kwargs.items()}
            if line.op in CREATIONS:
                kwargs["device"] = inputs[0].device
            known[line.result] = function(*(_value(arg, known) for arg in line.args), **kwargs)
        return known


def _value(arg: Any, known: Mapping[str, Any]) -> Any:
    if isinstance(arg, Name):
        return known[arg.text]
    return [_value(a, known) for a in arg] if isinstance(arg, list) else arg


@lru_cache
def parse(text: str) -> Program:
    """The program of a text.

    Raises:
        ProgramError: it is none.
    """
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ProgramError(f"{text!r} is no pointwise program: {error}") from error
    lines = []
    for statement in statements[:-1]:
        match statement:
            case ast.Assign(targets=[ast.Name(id=result)], value=ast.Call(func=function, args=args, keywords=keywords)):
                op = ast.unparse(function)
                if op not in OPERATORS:
                    raise ProgramError(f"{op} is no operator of a pointwise program")
                kwargs = {k.arg: _argument(k.value) for k in keywords if k.arg}
                lines.append(Line(result, op, tuple(_argument(a) for a in args), kwargs))
            case _:
                raise ProgramError(f"{ast.unparse(statement)!r} is no line of a pointwise program")
    match statements[-1:]:
        case [ast.Return(value=ast.Tuple(elts=names))] if all(isinstance(n, ast.Name) for n in names):
            return Program(tuple(lines), tuple(n.id for n in names if isinstance(n, ast.Name)))
    raise ProgramError(f"{text!r} is no pointwise program: it ends with no `return v0,`")


def _argument(tree: ast.expr) -> Any:
    match tree:
        case ast.Name(id=name):
            kind = getattr(torch, name, None)
            return kind if isinstance(kind, torch.dtype) else Name(name)
        case ast.Constant(value=value) if value is None or isinstance(value, (bool, int, float)):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=(int() | float()) as value)):
            return -value
        case ast.List(elts=parts):
            return [_argument(part) for part in parts]
    raise ProgramError(f"{ast.unparse(tree)!r} is no argument of a pointwise program")


@define(
    "pointwise(Tensor[] inputs, SymInt[] sizes, str program) -> Tensor[]",
    tokens="inputs",
    spec="6.1",
)
def pointwise(inputs: list[Tensor], sizes: list[int], program: str) -> list[Tensor]:
    """The results of a program, each contiguous and with memory of its own."""
    known = parse(program)
    values = known.run(inputs, sizes)
    return [values[name].clone(memory_format=torch.contiguous_format) for name in known.results]
