"""Pointwise: what no operator has fused becomes programs of `atom.pointwise`, each of which one generated kernel runs.

Contract: every value is unchanged. What only such operations read is computed where it is read, and not kept; what
others read is a result. Results of one shape whose inputs are there come from one program.
Terms:
    able      an operation that a program may have; it reads nothing that is written in the graph.
    root      an able node that others read; a view that others read has its source as the root.
    closure   what a root is computed from: able nodes, up to other roots. inputs: what these read from outside.
Pseudo-code:
    able nodes; roots; for each root in order: join the first program of its shape that runs late enough, or open one
    write each program's text; insert it before its first root; the roots' readers read its results
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from atomc.ops.pointwise import GATHERS, OPERATORS, REDUCTIONS, VIEWS
from atomc.passes.canonicalize import remove_dead
from atomc.passes.fuse import Emitter
from atomc.passes.graph import aten, calls, copy_provenance, location, resources_written, storage_of
from atomc.passes.runner import Context, Match, Pass, Report

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64})
MOST_DIMS = 4
PLACEMENT = frozenset({"device", "layout", "pin_memory"})


@dataclass
class _Group:
    """Roots of one program, the nodes that it computes, and what it reads."""

    shape: str
    roots: list[Node] = field(default_factory=list)
    nodes: set[Node] = field(default_factory=set)


@dataclass(frozen=True)
class Pointwise(Pass):
    """See the module's contract."""

    name: ClassVar[str] = "pointwise"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "values"})

    def run(self, gm: GraphModule, ctx: Context) -> Report:
        remove_dead(gm)
        able = _able_nodes(gm.graph, ctx)
        roots = {n for n in able if _name(n) not in VIEWS and any(_outside(u, able) for u in n.users)}
        place = {node: i for i, node in enumerate(gm.graph.nodes)}
        groups: list[_Group] = []
        for root in sorted(roots, key=place.__getitem__):
            closure = _closure(root, able, roots)
            shape = str(list(root.meta["val"].shape))
            read = _read(closure)
            fits = (g for g in groups if g.shape == shape and _there(read, g, place))
            group = next(fits, None)
            if group is None:
                groups.append(group := _Group(shape))
            group.roots.append(root)
            group.nodes |= closure
        report = Report()
        for group in groups:
            _insert(gm, group, place)
            report.matches += [Match(location(r), f"{_name(r)} {r.name}") for r in group.roots]
        return report


def _name(node: Node) -> str:
    """The operator as a plan spells it; empty of what is none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    return f"{target._schema.name.replace('::', '.')}.{target._overloadname}"


def _able_nodes(graph: Graph, ctx: Context) -> set[Node]:
    written = {resource for node in graph.nodes for resource in resources_written(node)}
    weights = {n for n in graph.nodes if n.op == "placeholder" and n.name in ctx.weights}
    able: set[Node] = set()
    for node in calls(graph):
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if inputs and all(n in weights for n in inputs):
            weights.add(node)  # made once, when weights are loaded
        elif _is_able(node) and not any(storage_of(n) in written for n in inputs):
            able.add(node)
    return able


def _is_able(node: Node) -> bool:
    name, value = _name(node), node.meta.get("val")
    if name not in OPERATORS or not isinstance(value, Tensor):
        return False
    if value.dtype not in DTYPES or not 1 <= value.dim() <= MOST_DIMS:
        return value.dtype == torch.bool and all(_is_able(user) for user in node.users)  # of registers only
    if any(not isinstance(size, int) for size in value.shape[1:]):
        return False
    if name == "aten.embedding.default":
        return node.args[0].meta["val"].dtype in DTYPES  # type: ignore[union-attr]
    if name == "aten.index.Tensor":
        indices = node.args[1]
        one = isinstance(indices, (list, tuple)) and len(indices) == 1 and isinstance(indices[0], Node)
        return one and indices[0].meta["val"].dtype in (torch.int32, torch.int64)  # type: ignore[index,union-attr]
    if name in REDUCTIONS:
        source, dims = node.args[0].meta["val"], node.args[1]  # type: ignore[union-attr]
        return list(dims) in ([-1], [source.dim() - 1]) and isinstance(source.shape[-1], int)  # type: ignore[arg-type]
    numbers = [a for a in node.args if isinstance(a, float)]
    plain = {k for k, v in node.kwargs.items() if not (k == "alpha" and v == 1)} <= PLACEMENT | {"dtype"}
    return plain and all(map(math.isfinite, numbers))


def _outside(user: Node, able: set[Node]) -> bool:
    """Whether a reader needs its input in memory."""
    if user not in able:
        return True
    return _name(user) in VIEWS and any(_outside(u, able) for u in user.users)


def _closure(root: Node, able: set[Node], roots: set[Node]) -> set[Node]:
    found, queue = {root}, [root]
    while queue:
        for node in queue.pop().all_input_nodes:
            if node in able and node not in roots and node not in found:
                found.add(node)
                queue.append(node)
    return found


def _read(nodes: set[Node]) -> set[Node]:
    return {n for node in nodes for n in node.all_input_nodes} - nodes


def _there(read: Iterable[Node], group: _Group, place: dict[Node, int]) -> bool:
    """Whether a program's place comes after what another root reads."""
    return all(n in group.nodes or place[n] < place[group.roots[0]] for n in read)


@dataclass
class _Text:
    """The text of a program, and what its names stand for."""

    lines: list[str] = field(default_factory=list)
    names: dict[Node, str] = field(default_factory=dict)
    inputs: list[Node] = field(default_factory=list)
    sizes: list[Node] = field(default_factory=list)

    def add(self, node: Node) -> None:
        """A line for a node."""
        name, gathered = _name(node), node.args[0] if node.args else None
        wide = isinstance(gathered, Node) and gathered.target is aten.to.dtype and gathered not in self.names
        kwargs = {k: v for k, v in node.kwargs.items() if k not in PLACEMENT and k != "alpha"}
        if name in GATHERS and wide:
            # Rows are widened, not the table.
            row = self._line(name, [gathered.args[0], *node.args[1:]], kwargs)  # type: ignore[union-attr]
            self.names[node] = self._line("aten.to.dtype", [row, gathered.args[1]], {})  # type: ignore[union-attr]
            return
        args = node.args[:2] if name == "aten.embedding.default" else node.args
        self.names[node] = self._line(name, list(args), kwargs)

    def _line(self, op: str, args: list[Any], kwargs: dict[str, Any]) -> str:
        given = [self._argument(a) for a in args] + [f"{k}={self._argument(v)}" for k, v in kwargs.items()]
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {op}({', '.join(given)})")
        return name

    def _argument(self, value: Any) -> str:
        if isinstance(value, Node):
            if value not in self.names:
                kind, known = ("a", self.inputs) if isinstance(value.meta["val"], Tensor) else ("s", self.sizes)
                self.names[value] = f"{kind}{len(known)}"
                known.append(value)
            return self.names[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._argument(v) for v in value)}]"
        return str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, str)) else repr(value)


def _insert(gm: GraphModule, group: _Group, place: dict[Node, int]) -> None:
    text, first = _Text(), group.roots[0]
    for node in sorted(group.nodes, key=place.__getitem__):
        text.add(node)
    program = "\n".join([*text.lines, f"return {', '.join(text.names[r] for r in group.roots)},"])
    inputs = text.inputs or [next(n for n in gm.graph.nodes if isinstance(n.meta.get("val"), Tensor))]
    call = Emitter(gm, first, first).call(torch.ops.atom.pointwise.default, inputs, text.sizes, program)
    for index, root in enumerate(group.roots):
        with gm.graph.inserting_after(call):
            result = gm.graph.call_function(operator.getitem, (call, index))
        result.meta["val"] = call.meta["val"][index]
        copy_provenance(root, result)
        root.replace_all_uses_with(result)
