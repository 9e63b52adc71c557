"""Row by row: whether what a graph makes of a token depends on that token, and on state, alone.

Contract:
    Two halves of a step are like two ranks that each have some of its tokens, so that the rules of placements tell
    (`atomc.ops.placement_rules`): along an axis of halves every input with a token symbol is cut there, state belongs
    to the requests, and weights are whole. An operator without a rule, one that mixes rows, a sum over tokens, a tensor
    whose token dim is not the one that is cut, and a number of tokens used for anything but a size are refused.
    Operators around collectives treat rows alone: each half sends messages and counts of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from atomc.ops.exchange import BY_DESTINATION
from atomc.ops.placement import REPLICATE, Placement, PlacementError, Shard
from atomc.ops.pointwise import CREATIONS, Line, Name, parse
from atomc.parallel.collectives import KINDS, WAIT, c10d
from atomc.parallel.propagate import Placed, place_node, sizes_of

atom, aten = torch.ops.atom, torch.ops.aten
AXIS: Final = "half"
ROWS: Final = Shard(0)
EXCHANGE: Final = frozenset(getattr(atom, name).default for name in BY_DESTINATION)
# Where an argument may be a number of tokens: a size of the result, or of what is sent.
SIZED: Final[Mapping[Any, tuple[int, ...]]] = {
    aten.reshape.default: (1,), aten.view.default: (1,), aten.expand.default: (1,), aten.full.default: (0,),
    aten.ones.default: (0,), aten.zeros.default: (0,), aten.slice.Tensor: (2, 3), atom.pack_message.default: (1,),
    atom.dispatch_rows.default: (2,), atom.combine_rows.default: (3,), atom.pointwise.default: (1,),
    c10d.all_to_all_single.default: (1, 2),
}  # fmt: skip
ARITHMETIC: Final = frozenset({operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod})


class RowWise:
    """Placements along the halves, node by node in the graph's order.

    Args:
        tokens: names of the symbols that are the step's. states: placeholders of state.
    """

    def __init__(self, tokens: frozenset[str], states: Mapping[str, str]) -> None:
        self.tokens, self.states = tokens, states
        self.known: dict[Node, Placed] = {}

    def add(self, node: Node) -> None:
        """Place a node.

        Raises:
            PlacementError: it does not treat rows alone.
        """
        if node.op == "placeholder":
            self.known[node] = ROWS if node.name in self.states else self._input(node.meta.get("val"))
        elif all(self.known[n] == REPLICATE for n in node.all_input_nodes):
            self.known[node] = REPLICATE
            if self._dims(node.meta.get("val")):
                raise PlacementError("it has a size of the step, and none of its inputs has")
        else:
            self.known[node] = found = self._call(node)
            self._check(node, found)

    def _input(self, value: Any) -> Placement:
        if isinstance(value, torch.SymInt):
            return ROWS if free_symbols(value) & self.tokens else REPLICATE
        dims = self._dims(value)
        if len(dims) > 1:
            raise PlacementError(f"its dims {' and '.join(map(str, dims))} are both sizes of the step")
        return Shard(dims[0]) if dims else REPLICATE

    def _dims(self, value: Any) -> list[int]:
        """The dims of a tensor whose sizes are of the step."""
        shape = value.shape if isinstance(value, torch.Tensor) else ()
        return [at for at, size in enumerate(shape) if free_symbols(size) & self.tokens]

    def _call(self, node: Node) -> Placed:
        self._check_sizes(node)
        if node.target in KINDS and KINDS[node.target] != "all_to_all":
            return self.known[node.all_input_nodes[0]]  # what it joins, adds or cuts are parts of ranks
        if node.target in KINDS or node.target in EXCHANGE:
            for n in node.all_input_nodes:
                if isinstance(n.meta.get("val"), torch.Tensor) and self.known[n] not in (ROWS, REPLICATE):
                    raise PlacementError(f"{n.name} is {self.known[n]}, and rows are sent")
            return ROWS
        if node.target in ARITHMETIC:
            return ROWS
        return place_node(node, self.known, AXIS, lambda n: sizes_of(n.meta.get("val")))

    def _check_sizes(self, node: Node) -> None:
        """Whether numbers of tokens stand only where sizes do."""
        if node.target in ARITHMETIC or node.target is operator.getitem:
            return
        allowed = SIZED.get(node.target, ())
        for at, argument in enumerate((*node.args, node.kwargs)):
            if (own := [n for n in nodes_in(argument) if self._is_size(n)]) and at not in allowed:
                raise PlacementError(f"it computes with {own[0].name}, a number of the step's tokens")
        if node.target is atom.pointwise.default:
            sizes, text = node.args[1:3]
            assert isinstance(sizes, (list, tuple)) and isinstance(text, str)
            own_sizes = {f"s{i}" for i, s in enumerate(sizes) if isinstance(s, Node) and self._is_size(s)}
            for line in parse(text).lines:
                _check_line(line, own_sizes)

    def _is_size(self, node: Node) -> bool:
        leaves = pytree.tree_leaves(node.meta.get("val"))
        return self.known[node] != REPLICATE and all(isinstance(leaf, torch.SymInt) for leaf in leaves)

    def _check(self, node: Node, found: Placed) -> None:
        """Whether each result has its rows where its token dim is."""
        value = node.meta.get("val")
        values = value if isinstance(value, (list, tuple)) else [value]
        placed = found if isinstance(found, tuple) else (found,) * len(values)
        for leaf, placement in zip(values, placed, strict=True):
            if not isinstance(leaf, torch.Tensor):
                continue
            dims = self._dims(leaf)
            if not dims and self._counts(node):
                continue
            if not dims:
                raise PlacementError("it has no size of the step any more: it joins all tokens")
            if len(dims) > 1 or placement != Shard(dims[0]):
                text = " and ".join(map(str, dims))
                raise PlacementError(f"it joins tokens: dim {text} is a size of the step, and it is {placement}")

    def _counts(self, node: Node) -> bool:
        """Whether it says how many rows go where: each half has counts of its own."""
        while node.target in KINDS or node.target in (WAIT, operator.getitem):
            node = node.all_input_nodes[0]
        return node.target is atom.sort_by_rank.default


def _check_line(line: Line, own: set[str]) -> None:
    for at, argument in enumerate(line.args):
        names = {a.text for a in pytree.tree_leaves(argument) if isinstance(a, Name)} & own
        size = (at == 0 and line.op in CREATIONS) or (at == 1 and line.op == "aten.expand.default")
        if names and not size:
            raise PlacementError(f"{line.op} computes with a number of the step's tokens")


def nodes_in(argument: Any) -> list[Node]:
    """The nodes in an argument, lists opened."""
    found: list[Node] = []
    torch.fx.node.map_arg(argument, found.append)
    return found


def free_symbols(value: Any) -> set[str]:
    """Names of the symbols in the sizes of a value's tensors, and of sizes themselves."""
    found: set[str] = set()
    for leaf in pytree.tree_leaves(value):
        for size in leaf.shape if isinstance(leaf, torch.Tensor) else (leaf,):
            if isinstance(size, torch.SymInt):
                found |= {str(symbol) for symbol in size.node.expr.free_symbols}
    return found


def twin_symbol(env: ShapeEnv, of: ShapeEnv, symbol: Any) -> Any:
    """A new symbol of `env` with the range of one of another, or the same, and a size as example that differs."""
    from torch._dynamo.source import ConstantSource

    example = int(of.backed_var_to_val.get(symbol, 2)) + 1
    name = f"{symbol}_{len(env.var_to_range)}"
    made = env.create_symbol(example, ConstantSource(name), DimDynamic.DYNAMIC)
    env.var_to_range[made] = of.var_to_range[symbol]
    return made
