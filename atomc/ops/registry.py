"""The registry of `atom::` operators: schema, reference semantics, fake, and what a pass or planner must know of each.

An operator *means* its reference, a plain torch function. Kernels are measured against it; the cpu target runs it.
Declared with `torch.library.Library` (a `custom_op`'s first call imports dynamo, inductor, sympy and triton: 1.5 s).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch

NAMESPACE = "atom"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

P = ParamSpec("P")
R = TypeVar("R")
Reference = Callable[..., Any]


@dataclass(frozen=True)
class Op:
    """One operator of the IR.

    Attributes:
        name: the name below `torch.ops.atom`.
        schema: the torch schema; `Tensor(a!)` marks what it mutates.
        reference: plain torch, the semantics.
        cpu: what the cpu target runs: the reference, or plain torch that does the same with fewer operations.
        tokens: the name of the argument whose dim 0 counts tokens (or rows of work), for cost formulas and chunking.
        spec: where the mathematics is specified (section of the model specification).
        described: whether shapes and dtypes of its results are said apart from the reference.
    """

    name: str
    schema: str
    reference: Reference
    tokens: str
    spec: str
    cpu: Reference
    described: bool

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The callable operator, `torch.ops.atom.<name>.default`."""
        overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        return overload

    @property
    def mutates(self) -> tuple[str, ...]:
        """Names of the arguments that the operator writes."""
        return written_by(self.overload)


OPS: dict[str, Op] = {}


def written_by(overload: torch._ops.OpOverload) -> tuple[str, ...]:
    """Names of the arguments that an operator, of atom or of torch, writes."""
    arguments = overload._schema.arguments
    return tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)


def no_output(*_: object, **__: object) -> None:
    """The fake of an operator that only mutates its arguments."""


def define(
    schema: str, *, tokens: str, spec: str, fake: Reference | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare the operator `atom::<schema>` whose semantics is the decorated function.

    `fake` gives output shapes and dtypes under fake tensors; without it the reference itself is run on fakes, which is
    right for every reference free of data-dependent shapes and of `.item()`.
    """

    def decorate(reference: Callable[P, R]) -> Callable[P, R]:
        name = schema.split("(", 1)[0]
        if name in OPS:
            raise ValueError(f"operator atom::{name} is already defined by {OPS[name].reference.__module__}")
        LIBRARY.define(schema)
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake or reference, lib=LIBRARY)
        OPS[name] = Op(name, schema, reference, tokens, spec, reference, fake is not None)
        return reference

    return decorate


def implement_cpu(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make the decorated function the CPU kernel of an operator already defined; it must agree with the reference."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        LIBRARY.impl(name, function, "CPU")
        OPS[name] = dataclasses.replace(OPS[name], cpu=function)
        return function

    return decorate
