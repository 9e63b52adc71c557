"""Binding: a step of the plan with everything resolved that can be before it runs.

Constants stand in the environment behind the slots, so that the arguments of a step are one gather of the environment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch

import atomc.ops  # noqa: F401  defines torch.ops.atom
from atomc.artifact.expr import parse
from atomc.artifact.plan import Arg, DType, Size, Slot, Step
from atomc.ops.registry import NAMESPACE, OPS

Environment = list[Any]  # values by slot, then constants
Sizes = dict[str, int]
Getter = Callable[[Environment, Sizes], Any]


class BoundStep:
    """One step. `run` leaves releasing to its caller, who may look at the environment before.

    `fixed` is the environment it will run in copies of; constants are appended to it. What a step makes of sizes alone
    is made on `device`. `special`: what runs for operators that the plan's names do not find.
    """

    def __init__(
        self, step: Step, fixed: Environment, device: torch.device | None = None,
        special: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:  # fmt: skip
        self.function = special[step.op] if special and step.op in special else resolve(step.op)
        self.counts = step.sizes
        self.computed: list[tuple[int, Getter]] = []  # place in the environment, how to fill it
        self.gather = _gatherer([self._place(a, fixed) for a in step.args])
        self.constants = {k: _constant(v) for k, v in step.kwargs.items() if _is_constant(v)}
        if device is not None and makes(step.op):
            self.constants["device"] = device
        self.kwargs = {k: getter_of(v) for k, v in step.kwargs.items() if not _is_constant(v)}
        self.outputs = step.outputs
        self.output = step.outputs[0] if len(step.outputs) == 1 else None
        self.release = step.release

    def _place(self, arg: Arg, fixed: Environment) -> int:
        """Where in the environment an argument stands."""
        if isinstance(arg, Slot):
            return arg.id
        if _is_constant(arg):
            fixed.append(_constant(arg))
        else:
            self.computed.append((len(fixed), getter_of(arg)))
            fixed.append(None)
        return len(fixed) - 1

    def run(self, env: Environment, sizes: Sizes) -> None:
        """Compute the results into `env`."""
        for place, find in self.computed:
            env[place] = find(env, sizes)
        if self.kwargs:
            kwargs = self.constants | {k: find(env, sizes) for k, find in self.kwargs.items()}
            result = self.function(*self.gather(env), **kwargs)
        else:
            result = self.function(*self.gather(env), **self.constants)
        if self.output is not None and not isinstance(result, list | tuple):
            env[self.output] = result
            return
        if self.counts:
            sizes.update(zip(self.counts, result, strict=True))
            return
        for slot, value in zip(self.outputs, result or (), strict=True):
            if slot is not None:
                env[slot] = value


def resolve(op: str) -> Callable[..., Any]:
    """What runs for an operator of the plan: an `atom` operator's function itself (no dispatch), else torch's own."""
    namespace, name, overload = op.split(".")
    if namespace == NAMESPACE:
        return OPS[name].cpu
    function: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return getattr(function, "_op", function)


def makes(op: str) -> bool:
    """Whether an operator of the plan is one of torch's factories, which are told a device."""
    namespace, name, overload = op.split(".")
    schema = getattr(getattr(getattr(torch.ops, namespace), name), overload)._schema
    return any(a.name == "device" and a.kwarg_only for a in schema.arguments)


def value_of(arg: Arg, env: Environment, sizes: Sizes) -> Any:
    """An argument of a step as a value, for who looks at a step that is not bound."""
    return getter_of(arg)(env, sizes)


def _gatherer(places: list[int]) -> Callable[[Environment], tuple[Any, ...]]:
    if len(places) >= 2:
        return itemgetter(*places)
    if places:
        place = places[0]
        return lambda env: (env[place],)
    return lambda env: ()


def _is_constant(arg: Arg) -> bool:
    if isinstance(arg, list):
        return all(_is_constant(a) for a in arg)
    return not isinstance(arg, (Slot, Size))


def _constant(arg: Arg) -> Any:
    if isinstance(arg, list):
        return [_constant(a) for a in arg]
    return getattr(torch, arg.name) if isinstance(arg, DType) else arg


def getter_of(arg: Arg) -> Getter:
    """How an argument of a step or of a launch is found in an environment."""
    if isinstance(arg, Slot):
        place = arg.id
        return lambda env, _: env[place]
    if isinstance(arg, Size):
        size = parse(arg.expr)
        return lambda _, sizes: size(sizes)
    if isinstance(arg, list):
        getters = [getter_of(a) for a in arg]
        return lambda env, sizes: [g(env, sizes) for g in getters]
    value = _constant(arg)
    return lambda _env, _sizes: value
