"""Many ranks in one process: the graph that all of them run, its collectives done on lists of tensors.

A collective whose sizes differ between ranks would hang or read past an end on a machine; here it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from atomc.ops.placement import Mesh, Placement, Shard
from atomc.parallel.collectives import KINDS, WAIT, group_of
from atomc.recipes import Recipe, TensorSpec, part_of


class UnequalError(AssertionError):
    """Ranks that wait for one another for ever."""


def run_ranks(gm: GraphModule, mesh: Mesh, given: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """The results on every rank. `given`: rank -> its arguments by placeholder."""
    values: list[dict[Node, Any]] = [{} for _ in range(mesh.ranks)]
    for node in gm.graph.nodes:
        for rank, known in enumerate(values):
            if node.op == "placeholder":
                known[node] = given[rank].get(node.name)
            elif node.op == "output":
                known[node] = map_arg(node.args[0], known.__getitem__)
            elif node.target is WAIT:
                known[node] = known[node.args[0]]
            elif node.target not in KINDS:
                args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
        if node.op == "call_function" and node.target in KINDS:
            for group in mesh.groups(group_of(node)):
                arguments = [map_arg(node.args, values[rank].__getitem__) for rank in group]
                for rank, result in zip(group, KIND[KINDS[node.target]](arguments), strict=True):
                    values[rank][node] = result
    output = next(n for n in gm.graph.nodes if n.op == "output")
    return [tuple(known[output]) for known in values]


def _equal(arguments: list[Any]) -> list[Tensor]:
    inputs = [a[0] for a in arguments]
    if len({(i.shape, i.dtype) for i in inputs}) != 1:
        raise UnequalError(f"inputs are {[tuple(i.shape) for i in inputs]}")
    assert all(i.is_contiguous() for i in inputs)
    return inputs


def _all_gather(arguments: list[Any]) -> list[Tensor]:
    inputs = _equal(arguments)
    assert {a[1] for a in arguments} == {len(arguments)}
    return [torch.cat(inputs) for _ in inputs]


def _total(inputs: list[Tensor]) -> Tensor:
    total = inputs[0].clone()
    for other in inputs[1:]:
        total += other
    return total


def _reduce_scatter(arguments: list[Any]) -> list[Tensor]:
    assert {a[2] for a in arguments} == {len(arguments)}
    return [part.clone() for part in _total(_equal(arguments)).chunk(len(arguments))]


def _all_reduce(arguments: list[Any]) -> list[Tensor]:
    return [_total(_equal(arguments)) for _ in arguments]


def _all_to_all(arguments: list[Any]) -> list[Tensor]:
    for i, (_, receive, _, *_rest) in enumerate(arguments):
        sent = [other[2][i] for other in arguments]
        if list(receive) != sent:
            raise UnequalError(f"rank {i} of the group expects {list(receive)}, the others send {sent}")
    parts = [list(x.split(list(send))) for x, _, send, *_ in arguments]
    return [torch.cat([theirs[i] for theirs in parts]) for i in range(len(arguments))]


KIND: dict[str, Callable[[list[Any]], list[Tensor]]] = {
    "all_gather": _all_gather, "reduce_scatter": _reduce_scatter, "all_reduce": _all_reduce, "all_to_all": _all_to_all,
}  # fmt: skip


def rank_recipe(
    recipe: Recipe, placements: dict[str, Placement], mesh: Mesh, rank: int, spec_of: Callable[[Recipe], TensorSpec]
) -> Recipe:
    """The recipe of a rank's part: the axes cut one after the other, the outer first."""
    for (axis, size), index in zip(mesh.axes, mesh.coordinate(rank), strict=True):
        placed = placements[axis]
        if isinstance(placed, Shard):
            recipe = part_of(recipe, placed.dim, index, size, spec_of, placed.parts)
    return recipe
