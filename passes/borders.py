"""Borders: what needs a region's last collective moves into the next region, whose first half computes meanwhile.

Contract:
    For two chunked regions of which one follows the other. The last collective of the first region's second half is
    left open: its `wait_tensor` and all that needs its result (no other collective, no write, no weight) move to the
    start of the next region, and what these read is carried over, the open collective's result first. What it was given
    is carried too, though nobody reads it: its memory is not free before the wait. Together the regions compute what
    they did. Where nothing may move, both stay as they are. `atomc.parallel.borders` says the same of tasks.

Terms:
    carried   results of the first region that are the next one's alone

Pseudo-code:
    moved = the wait of the last collective of half 1, and its forward closure
    the first region returns: half 0's results, half 1's that did not move, what is carried
    the next region takes what is carried, and computes the moved nodes where it took the results that moved
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from atomc.parallel.collectives import WAIT, is_collective
from atomc.parallel.sizes import AGREED
from atomc.passes.graph import calls, copy_provenance, quiet, resources_written, value_of
from atomc.passes.row_wise import twin_symbol
from atomc.passes.runner import Chunked, Context


@dataclass(frozen=True)
class Region:
    """A chunked region.

    Attributes:
        symbols: size symbol of its graph before it was cut -> what it means (`artifact.plan.SYMBOLS`).
        outputs: names of one half's results. takes: placeholder before the cut -> the result that it is bound to.
    """

    gm: GraphModule
    ctx: Context
    symbols: Mapping[str, str]
    outputs: Sequence[str]
    takes: Mapping[str, str]

    @property
    def chunked(self) -> Chunked:
        assert self.ctx.chunked is not None, f"{self.ctx.region} is not cut in two"
        return self.ctx.chunked

    def meanings(self) -> dict[str, str]:
        """Size symbol of the second half -> what it means."""
        known = dict(self.symbols)
        for node in self.gm.graph.nodes:
            for placeholder, (first, _) in self.chunked.inputs.items():
                if node.name == first and self.ctx.sizes.get(placeholder) == AGREED:
                    known[str(node.meta["val"].node.expr)] = AGREED
        return {twin: known[symbol] for symbol, twin in self.chunked.symbols.items() if symbol in known}


def stitch(first: Region, second: Region) -> bool:
    """Move what needs the first region's open collective into the second; whether anything moved.

    The graphs are changed; `ctx.chunked` of both says what they return and take now.
    """
    moved = movable(first.gm)
    results = pytree.tree_leaves(_output(first.gm).args)
    count = first.chunked.results
    gone = [at for at, node in enumerate(results[count:]) if node in moved]
    if not moved or set(results[:count]) & set(moved):
        return False
    bound = {second.takes[p]: twin for p, (_, twin) in second.chunked.inputs.items() if p in second.takes}
    wanted = {first.outputs[at]: results[count + at] for at in gone}
    if not wanted.keys() <= bound.keys():
        return False
    carried = _carried(moved)
    given, sizes = _prepend(first, second, moved, carried, {bound[name]: node for name, node in wanted.items()})
    stays = tuple(at for at in range(count) if at not in gone)
    _output(first.gm).args = ((*results[:count], *(results[count + at] for at in stays), *carried),)
    for node in reversed(moved):
        first.gm.graph.erase_node(node)
    first.ctx.chunked = replace(first.chunked, second=stays, carried=len(carried))
    second.ctx.chunked = replace(second.chunked, given=given, given_sizes=sizes)
    return True


def last_collective(gm: GraphModule) -> Node | None:
    """That of the second half, which is left open where what follows from it moves."""
    return next((n for n in reversed(list(calls(gm.graph))) if is_collective(n) and n.meta.get("half") == 1), None)


def movable(gm: GraphModule) -> list[Node]:
    """The wait of the second half's last collective and what follows from it, in order; empty if it may not move."""
    last = last_collective(gm)
    if last is None:
        return []
    moved: dict[Node, None] = {}
    for node in calls(gm.graph):
        if (node.target is WAIT and node.args[0] is last) or any(n in moved for n in node.all_input_nodes):
            moved[node] = None
    inputs = {n for node in moved for n in node.all_input_nodes if n not in moved}
    shared = any(n.meta.get("half") != 1 or n.op == "placeholder" for n in inputs)
    if shared or any(is_collective(n) or resources_written(n) for n in moved):
        return []
    return list(moved)


def _carried(moved: Sequence[Node]) -> list[Node]:
    """The open collective's result, what it was given, and what else the moved nodes read."""
    first = moved[0].args[0]
    assert isinstance(first, Node)
    read = [n for node in moved for n in node.all_input_nodes if n not in moved]
    return list(dict.fromkeys([first, first.all_input_nodes[0], *read]))


def _prepend(
    first: Region, second: Region, moved: Sequence[Node], carried: Sequence[Node], results: Mapping[str, Node]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Put copies of the moved nodes at the start of the second region.

    Returns the placeholders of what is carried, and the meanings of size symbols that the region had not.
    """
    graph = second.gm.graph
    values = [n.meta.get("val") for n in graph.nodes]
    sizes = _Sizes(first.meanings(), {meaning: name for name, meaning in second.meanings().items()}, values)
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    copies: dict[Node, Node] = {}
    start = next(iter(calls(graph)), _output(second.gm))
    with quiet(values), torch.no_grad(), graph.inserting_before(start):
        for node in carried:
            copies[node] = made = graph.placeholder(f"carried_{node.name}")
            made.meta = {"val": sizes.of(node.meta["val"]), "half": 1}
            copy_provenance(node, made)
        for node in moved:
            copies[node] = made = graph.node_copy(node, copies.__getitem__)
            made.meta = dict(node.meta)
            target: Any = made.target
            made.meta["val"] = target(*map(value_of, made.args), **{k: value_of(v) for k, v in made.kwargs.items()})
    for placeholder, result in results.items():
        inputs[placeholder].replace_all_uses_with(copies[result])
        graph.erase_node(inputs[placeholder])
    return tuple(copies[node].name for node in carried), sizes.new


class _Sizes:
    """Values of one region's second half as values of another's: their sizes with its symbols."""

    def __init__(self, meanings: Mapping[str, str], names: Mapping[str, str], values: Sequence[Any]) -> None:
        self.meanings, self.names = meanings, names
        leaves = [leaf for leaf in pytree.tree_leaves(list(values)) if isinstance(leaf, (torch.Tensor, torch.SymInt))]
        sizes = [s for x in leaves for s in (x.shape if isinstance(x, torch.Tensor) else (x,))]
        symbolic = [s for s in sizes if isinstance(s, torch.SymInt)]
        self.env: ShapeEnv = symbolic[0].node.shape_env
        self.known = {str(symbol): symbol for s in symbolic for symbol in s.node.expr.free_symbols}
        self.made: dict[Any, Any] = {}
        self.new: dict[str, str] = {}  # symbol that is made here -> what it means

    def of(self, value: Any) -> Any:
        """The value; lists opened."""
        if isinstance(value, (list, tuple)):
            return type(value)(self.of(v) for v in value)
        if isinstance(value, torch.Tensor):
            return torch.empty([self._size(s) for s in value.shape], dtype=value.dtype, device=value.device)
        return self._size(value)

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        for symbol in size.node.expr.free_symbols:
            if symbol not in self.made:
                meaning = self.meanings.get(str(symbol), "")
                found = self.known.get(self.names.get(meaning, ""))
                self.made[symbol] = found if found is not None else twin_symbol(self.env, size.node.shape_env, symbol)
                if found is None and meaning:
                    self.new[str(self.made[symbol])] = meaning
        return self.env.create_symintnode(size.node.expr.xreplace(self.made), hint=None)


def _output(gm: GraphModule) -> Node:
    found: Node = next(node for node in gm.graph.nodes if node.op == "output")
    return found
