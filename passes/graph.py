"""Small helpers on FX graphs that every pass needs: provenance, aliasing, side effects and the order they impose.

Terms:
    storage     what holds a tensor's data. Fake values share storages exactly as the real ones do, so that two nodes
                alias one another where their fake values say so.
    resource    something a call changes: a storage, or the state of the random generator.
"""

from __future__ import annotations

import heapq
import logging
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from atomc.errors import AtomcError
from atomc.parallel.kinds import NAMESPACE as COLLECTIVES

aten = torch.ops.aten
FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")

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


class PassError(AtomcError):
    """A pass could not do what the pipeline promises; the message names the node and its source line."""


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
    while (source := _viewed(node)) is not None:
        node = source
    return node


def _viewed(node: Node) -> Node | None:
    """The input that a call returns a view of, if it does."""
    if node.op != "call_function" or not node.args:
        return None
    if node.target in VIEWS and isinstance(node.args[0], Node):
        return node.args[0]
    own = _storage(node)
    if own is None:
        return None
    sources = list(node.all_input_nodes)
    if node.target is operator.getitem:  # of a split: the list has no storage of its own, what it was made of has
        sources += sources[0].all_input_nodes
    return next((n for n in sources if _storage(n) == own), None)


def _storage(node: Node) -> int | None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    storage: int = value.untyped_storage()._cdata
    return storage


def storage_of(node: Node) -> object:
    """A key that nodes share exactly if they may alias one another, inputs that overlap included."""
    base = base_of(node)
    return base if (storage := _storage(base)) is None else storage


def is_pure(node: Node) -> bool:
    """A call that may be dropped, moved, or merged with an equal one: no writes, no random numbers, no global state."""
    if node.op != "call_function":
        return False
    if schema_of(node) is None:
        return getattr(node.target, "__module__", None) in ("_operator", "math")
    return not node.is_impure()


def resources_written(node: Node) -> set[object]:
    """The storages a call mutates, and "state" for whatever else it changes (random generator, grad mode)."""
    written: set[object] = {storage_of(n) for n in mutated_args(node)}
    if getattr(node.target, "namespace", "") == COLLECTIVES:
        return written  # torch calls a collective impure, but one graph is every rank's: its order is theirs
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    if node.op == "call_function" and (seeded or not (written or is_pure(node))):
        written.add("state")
    return written


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


@contextmanager
def quiet(values: Iterable[Any]) -> Iterator[None]:
    """The fake mode of the values; to look at a graph must not narrow it (no guards), nor log what does not fit.

    Sizes that only running tells are the nodes' own: torch must not wait for somebody to bind them, or the next trace
    with the same sizes fails.

    Raises:
        PassError: none of the values is a fake tensor.
    """
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    if mode is None:
        raise PassError("the graph has no fake values; capture it with torch.export or make_fx first")
    level = FAKE_LOG.level
    FAKE_LOG.setLevel(logging.CRITICAL)
    try:
        with mode, ExitStack() as stack:
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
                stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
            yield
    finally:
        FAKE_LOG.setLevel(level)


def size_of(size: Any, values: Mapping[str, int]) -> int:
    """A size as a number; `values`: symbol -> its value.

    Raises:
        PassError: a symbol has no value.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    expr = size.node.expr
    if unknown := sorted(str(s) for s in expr.free_symbols if str(s) not in values):
        raise PassError(f"a size of {unknown[0]}, which has no value")
    return int(expr.xreplace({s: values[str(s)] for s in expr.free_symbols}))


def bytes_of(value: torch.Tensor, values: Mapping[str, int]) -> int:
    """Bytes of a fake tensor; raises as `size_of`."""
    total = value.element_size()
    for size in value.shape:
        total *= size_of(size, values)
    return total


def order_edges(graph: Graph) -> dict[Node, set[Node]]:
    """For each node, the nodes that must precede it: its inputs, and those its side effects must not overtake."""
    writes = {node: written for node in graph.nodes if (written := resources_written(node))}
    contested = set().union(*writes.values())
    storages = {node: storage_of(node) for node in graph.nodes} if contested else {}
    before: dict[Node, set[Node]] = {}
    writer: dict[object, Node] = {}
    readers: dict[object, list[Node]] = {}
    for node in graph.nodes:
        edges = set(node.all_input_nodes)
        written = writes.get(node, set())
        read = {storages[n] for n in node.all_input_nodes} & contested if contested else set()
        for resource in read | written:
            if resource in writer:
                edges.add(writer[resource])
            if resource in written:
                edges.update(readers.pop(resource, ()))
                writer[resource] = node
            else:
                readers.setdefault(resource, []).append(node)
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
