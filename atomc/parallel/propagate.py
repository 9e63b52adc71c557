"""Placements along the nodes of a graph: the rules of operators and collectives, applied to one node at a time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from atomc.ops.placement import REPLICATE, Call, Operand, Placement, PlacementError, Size
from atomc.ops.placement_rules import propagate
from atomc.parallel.collectives import KINDS, WAIT, group_of, placed

# Of a node with one result its placement; of one with several, those of all.
Placed = Placement | tuple[Placement, ...]
_UNKNOWN = 1009  # an example for the first size that only running tells; the next ones follow


def example(size: int | torch.SymInt) -> int:
    """A number for a size: the one it was captured with."""
    if isinstance(size, int):
        return size
    if size.node.has_hint():
        return int(size.node.hint)
    names = sorted(size.node.expr.free_symbols, key=str)
    return int(size.node.expr.xreplace({name: _UNKNOWN + 2 * i for i, name in enumerate(names)}))


def sizes_of(value: Any) -> tuple[tuple[int, ...], ...]:
    """The sizes of each tensor among a node's results."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(tuple(example(n) for n in v.shape) if isinstance(v, torch.Tensor) else () for v in values)


def place_node(
    node: Node, known: Mapping[Node, Placed], axis: str, sizes: Callable[[Node], tuple[tuple[int, ...], ...]]
) -> Placed:
    """The placement of a call's results along an axis.

    Args:
        known: placements of the nodes it reads. sizes: of the tensors among a node's results.
    Raises:
        PlacementError: its inputs may not be placed so.
    """
    if node.target is operator.getitem:
        source, index = known[node.all_input_nodes[0]], node.args[1]
        assert isinstance(index, int)
        return source[index] if isinstance(source, tuple) else source
    if node.target is WAIT:
        return known[node.all_input_nodes[0]]
    if node.target in KINDS:
        tensor = node.args[0]
        assert isinstance(tensor, Node)
        return placed(KINDS[node.target], _one(known[tensor]), group_of(node) == axis)
    call = Call(str(node.target), tuple(_argument(a, known, sizes) for a in _positional(node)), sizes(node))
    found = propagate(call)
    several = isinstance(node.meta.get("val"), (list, tuple))
    return found if several else found[0] if found else REPLICATE


def _one(found: Placed) -> Placement:
    if isinstance(found, tuple):
        raise PlacementError("several tensors where one is expected")
    return found


def _positional(node: Node) -> tuple[Any, ...]:
    """The arguments by position of the schema; those of keywords where it has them."""
    arguments = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else ()
    rest = arguments[len(node.args) :]
    return (*node.args, *(node.kwargs[a.name] for a in rest if a.name in node.kwargs))


def _argument(arg: Any, known: Mapping[Node, Placed], sizes: Callable[[Node], tuple[tuple[int, ...], ...]]) -> Any:
    if isinstance(arg, (list, tuple)):
        return tuple(_argument(a, known, sizes) for a in arg)
    if not isinstance(arg, Node):
        return arg
    value = arg.meta.get("val")
    if isinstance(value, torch.Tensor):
        return Operand(_one(known[arg]), sizes(arg)[0], value.dtype)
    if isinstance(value, torch.SymInt):
        return Size(known[arg] != REPLICATE, example(value))
    return arg  # a list of sizes
