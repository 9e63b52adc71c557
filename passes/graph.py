"""Small helpers on FX graphs that every pass needs: provenance, views, mutation order, normalised calls."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten

VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.slice.Tensor,
        aten.select.int,
        aten.transpose.int,
        aten.permute.default,
        aten.expand.default,
        aten.alias.default,
        aten.detach.default,
    }
)


def schema_of(node: Node) -> torch._C.FunctionSchema | None:
    """The torch schema of a call, or None for placeholders, getitem and Python functions."""
    target = node.target
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def mutated_args(node: Node) -> list[Node]:
    """The argument nodes that a call writes to."""
    schema = schema_of(node)
    if schema is None or not schema.is_mutable:
        return []
    written: list[Node] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        written += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Node)]
    return written


def base_of(node: Node) -> Node:
    """The node whose storage a chain of views reads."""
    while node.op == "call_function" and node.target in VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def location(node: Node) -> str:
    """`file.py:line` of the model source that a node comes from, or '?'."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    if not found:
        return "?"
    file, line = found[-1]
    return f"{'/'.join(file.split('/')[-2:])}:{line}"


def copy_provenance(source: Node, target: Node) -> None:
    """Give a new node the source line and module path of the one it stands for."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in source.meta:
            target.meta[key] = source.meta[key]


def calls(graph: Graph) -> Iterator[Node]:
    """The call_function nodes, in order."""
    return (n for n in graph.nodes if n.op == "call_function")


def op_name(target: object) -> str:
    """A short readable operator name: `aten.mul.Tensor`, `atom.rope`."""
    name = str(target)
    return (
        name.removesuffix(".default")
        if isinstance(target, torch._ops.OpOverload)
        else getattr(target, "__name__", name)
    )


def value_of(arg: Any) -> Any:
    """The fake value of an argument node (or the argument itself), through lists."""
    if isinstance(arg, Node):
        return arg.meta.get("val")
    if isinstance(arg, (list, tuple)):
        return type(arg)(value_of(a) for a in arg)
    return arg


def order_edges(graph: Graph) -> dict[Node, set[Node]]:
    """For each node, the nodes that must precede it: its inputs, and the mutation order of the storage it touches."""
    before: dict[Node, set[Node]] = {}
    writer: dict[Node, Node] = {}
    readers: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        edges = set(node.all_input_nodes)
        written = {base_of(n) for n in mutated_args(node)}
        for base in {base_of(n) for n in node.all_input_nodes}:
            if base in writer:
                edges.add(writer[base])
            if base in written:
                edges.update(readers.pop(base, ()))
                writer[base] = node
            else:
                readers.setdefault(base, []).append(node)
        edges.discard(node)
        before[node] = edges
    return before


def reorder(graph: Graph, before: dict[Node, set[Node]]) -> Node | None:
    """Sort the graph by `before`, keeping the present order where free; returns a node of a cycle if there is one."""
    rank = {node: i for i, node in enumerate(graph.nodes)}
    after: dict[Node, list[Node]] = {}
    missing = {node: len(edges) for node, edges in before.items()}
    for node, edges in before.items():
        for edge in edges:
            after.setdefault(edge, []).append(node)
    ready = [(rank[n], n) for n, count in missing.items() if count == 0]
    heapq.heapify(ready)
    order: list[Node] = []
    while ready:
        _, node = heapq.heappop(ready)
        order.append(node)
        for follower in after.get(node, ()):
            missing[follower] -= 1
            if missing[follower] == 0:
                heapq.heappush(ready, (rank[follower], follower))
    if len(order) != len(rank):
        return next(n for n, count in missing.items() if count)
    for node in order:  # placeholders have the lowest ranks and the output the highest, so both stay at their ends
        graph._root.prepend(node)
    return None


def readable(gm: GraphModule) -> str:
    """The graph as Python, with shapes; what `--dump-ir` writes."""
    return gm.print_readable(print_output=False, include_stride=False)
