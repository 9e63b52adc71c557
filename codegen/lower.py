"""Lowering: a region's graph becomes the steps of its plan, for one target.

Pseudo-code:
    for node in graph: placeholders become inputs; sizes become expressions; calls become steps; getitem names a result
    a target that cannot run some operator is refused, naming every such operator with its model source line
    slots get lifetimes; temporaries get offsets in the region's arena (codegen.memory)
"""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from atomc.artifact.plan import Arg, DType, RegionInput, RegionPlan, Role, Scalar, Size, Slot, SlotInfo, Step
from atomc.codegen.memory import Buffer, place
from atomc.errors import AtomcError
from atomc.passes.graph import base_of, location, op_name
from atomc.targets import Target


class LoweringError(AtomcError):
    """A graph that has no plan; the message names the node and its source line."""


class MissingKernelsError(AtomcError):
    """Operators for which the target has no kernel."""

    exit_code = 6


@dataclass(frozen=True)
class Missing:
    """An operator without a kernel: how often it occurs in a region, and where first."""

    op: str
    region: str
    count: int
    source: str


@dataclass
class Lowering:
    """Lowers one region. `symbols`: graph symbol -> plan symbol; `bounds`: plan symbol -> largest value."""

    region: str
    gm: GraphModule
    inputs: Mapping[str, tuple[Role, str]]
    outputs: list[str]
    symbols: Mapping[str, str]
    bounds: Mapping[str, int]
    ids: dict[Node, int] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    def run(self) -> RegionPlan:
        """The region's plan."""
        nodes = list(self.gm.graph.nodes)
        result = next(n for n in nodes if n.op == "output")
        for node in nodes:
            if node.op == "placeholder" and node.users and isinstance(node.meta.get("val"), torch.Tensor):
                self.ids[node] = len(self.ids)
            elif node.op == "call_function" and not self._is_size(node):
                self._step(node)
            elif node.op not in ("placeholder", "output", "call_function"):
                raise LoweringError(f"{self.region}: {node.op} {node.name} ({location(node)}) has no place in a plan.")
        leaves = [a for a in torch.utils._pytree.tree_leaves(result.args) if isinstance(a, Node)]
        for leaf in leaves:
            self.ids.setdefault(leaf, len(self.ids))
        return self._finish(dict(zip(self.outputs, (self.ids[n] for n in leaves), strict=True)))

    def _is_size(self, node: Node) -> bool:
        return isinstance(node.meta.get("val"), (torch.SymInt, int))

    def _step(self, node: Node) -> None:
        if node.target is operator.getitem:
            return  # a result of the node before, which named it
        if not isinstance(node.target, torch._ops.OpOverload):
            raise LoweringError(f"{self.region}: {node.target} ({location(node)}) is not a torch operator.")
        args = [self._argument(a, node) for a in node.args]
        kwargs = {
            k: self._argument(v, node) for k, v in node.kwargs.items() if k not in ("device", "layout", "pin_memory")
        }
        self.steps.append(Step(_qualified(node.target), args, kwargs, self._results(node), [], location(node)))

    def _results(self, node: Node) -> list[int | None]:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            self.ids[node] = len(self.ids)
            return [self.ids[node]]
        if value is None:
            return []
        results: list[int | None] = [None] * len(value)
        for user in node.users:
            index = user.args[1]
            assert user.target is operator.getitem and isinstance(index, int)
            self.ids[user] = len(self.ids)
            results[index] = self.ids[user]
        return results

    def _argument(self, value: Any, node: Node) -> Arg:
        if isinstance(value, (list, tuple)):
            return [self._scalar(v, node) for v in value]
        return self._scalar(value, node)

    def _scalar(self, value: Any, node: Node) -> Scalar:
        if isinstance(value, Node):
            size = value.meta.get("val")
            return Size(self._expression(size)) if isinstance(size, (torch.SymInt, int)) else Slot(self.ids[value])
        if isinstance(value, torch.SymInt):
            return Size(self._expression(value))
        if isinstance(value, torch.dtype):
            return DType(str(value).removeprefix("torch."))
        if isinstance(value, float) and not math.isfinite(value):
            raise LoweringError(f"{self.region}: {node.name} ({location(node)}) has the non-finite constant {value}.")
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise LoweringError(f"{self.region}: {node.name} ({location(node)}) has an argument {value!r} of no plan type.")

    def _expression(self, size: torch.SymInt | int) -> str:
        """A size in the plan's symbols."""
        text = re.sub(r"\bs\d+\b", lambda m: self._symbol(m.group()), str(size))
        return text

    def _symbol(self, name: str) -> str:
        if name not in self.symbols:
            raise LoweringError(f"{self.region}: the size {name} belongs to no input.")
        return self.symbols[name]

    def _sizes(self, shape: torch.Size) -> list[int | str]:
        return [s if isinstance(s, int) else self._expression(s) for s in shape]

    def _finish(self, outputs: dict[str, int]) -> RegionPlan:
        """Lifetimes, views, arena offsets."""
        nodes = {i: node for node, i in self.ids.items()}
        bases = {i: self._base(node) for i, node in nodes.items()}
        defined: dict[int, int] = {self.ids[n]: -1 for n in self.ids if n.op == "placeholder"}
        last: dict[int, int] = {}
        for at, step in enumerate(self.steps):
            for slot in step.outputs:
                if slot is not None:
                    defined[slot] = at
            for slot in _slots(step.args) + _slots(list(step.kwargs.values())):
                last[bases[slot]] = at
        kept = {bases[i] for i in outputs.values()}
        roles = {i: self._role(nodes[i], bases[i] in kept) for i in nodes}
        for i in nodes:
            last[bases[i]] = max(last.get(bases[i], -1), defined[i])
        for base in kept:
            last[base] = len(self.steps)
        buffers = [
            Buffer(i, self._bytes(nodes[i]), defined[i], last[i])
            for i in sorted(nodes)
            if bases[i] == i and roles[i] == "temporary"
        ]
        offsets, arena = place(buffers)
        slots = [
            SlotInfo(
                name=nodes[i].name,
                role=roles[i],
                shape=self._sizes(nodes[i].meta["val"].shape),
                dtype=str(nodes[i].meta["val"].dtype).removeprefix("torch."),
                base=None if bases[i] == i else bases[i],
                first=defined[i],
                last=last[bases[i]],
                offset=offsets.get(i),
            )  # fmt: skip
            for i in sorted(nodes)
        ]
        inputs = [RegionInput(self.ids[n], *self.inputs[n.name]) for n in self.ids if n.op == "placeholder"]
        steps = [self._releasing(at, step, bases, last, roles, nodes) for at, step in enumerate(self.steps)]
        return RegionPlan(self.region, inputs, outputs, slots, steps, arena)

    def _releasing(
        self, at: int, step: Step, bases: dict[int, int], last: dict[int, int], roles: dict[int, Role],
        nodes: dict[int, Node],
    ) -> Step:  # fmt: skip
        """The step with the slots that nobody reads after it."""
        gone = [i for i in sorted(nodes) if roles[i] == "temporary" and last[bases[i]] == at]
        return Step(step.op, step.args, step.kwargs, step.outputs, gone, step.source)

    def _base(self, node: Node) -> int:
        base = base_of(node)
        return self.ids.get(base, self.ids[node])

    def _role(self, node: Node, kept: bool) -> Role:
        if node.op == "placeholder":
            return self.inputs[node.name][0]
        return "value" if kept else "temporary"

    def _bytes(self, node: Node) -> int:
        """Size at the largest symbol values."""
        from atomc.artifact.expr import evaluate

        value = node.meta["val"]
        count = math.prod(evaluate(s, self.bounds) for s in self._sizes(value.shape))
        return int(count * value.dtype.itemsize)


def _slots(args: Sequence[Arg]) -> list[int]:
    found: list[int] = []
    for arg in args:
        if isinstance(arg, Slot):
            found.append(arg.id)
        elif isinstance(arg, list):
            found += _slots(arg)
    return found


def _qualified(target: torch._ops.OpOverload) -> str:
    namespace, name = target._schema.name.split("::")
    return f"{namespace}.{name}.{target._overloadname}"


def missing_kernels(region: str, gm: GraphModule, target: Target) -> list[Missing]:
    """Operators of the region that the target cannot run. The cpu target runs every reference."""
    if target.name == "cpu":
        return []
    from atomc.codegen.kernels import has_kernel

    calls = [n for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    calls = [
        n
        for n in calls
        if not has_kernel(n.target, target) and isinstance(n.meta.get("val"), (torch.Tensor, tuple, list, type(None)))
    ]
    first = {op_name(n.target): location(n) for n in reversed(calls)}
    return [Missing(op, region, count, first[op]) for op, count in Counter(op_name(n.target) for n in calls).items()]


def refuse(missing: list[Missing], target: Target) -> MissingKernelsError:
    """The error that names every operator without a kernel."""
    by_op: dict[str, list[Missing]] = {}
    for item in missing:
        by_op.setdefault(item.op, []).append(item)
    lines = [
        f"  {op:48} {sum(m.count for m in items):3} in {len(items)} regions, first at {items[0].source}"
        for op, items in sorted(by_op.items())
    ]
    return MissingKernelsError(
        f"target {target.name}: no kernel for {len(by_op)} operators, so nothing was written:\n"
        + "\n".join(lines)
        + "\nThe graphs were captured, fused and checked; `--target cpu` runs them with the references."
    )
