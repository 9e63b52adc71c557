"""Chunk: a region that does a step in exactly two micro-batches, so that one can compute while the other sends.

Contract:
    The graph gets two copies of everything that depends on the step's tokens, the first half's before the second's,
    and one copy of what does not. Inputs with a token symbol in their shape become two; results come out twice, those
    of the first half and then those of the second. Nothing else changes: both copies read the same weights and write
    the same state, in this order, and `order_edges` finds the edges from the first half's writes to the second's reads
    and from its reads to the second's writes, which no later schedule may cross. With batches that
    `atomc.ops.batch.split_batch` made of one, and values cut at the same token, the halves compute what the whole did.
    A half may have no tokens. A graph that cannot be cut so is an error that names the node: it does not treat tokens
    one by one (`passes.row_wise`), or draws random numbers.

Terms:
    token symbol   a size of the step: tokens, requests, completed windows, wanted logits
    owned          by the halves: a value that depends on an input with a token symbol
    shared         everything else: weights, state, constants, views of them

Pseudo-code:
    owned = forward closure of the inputs that have a token symbol
    copy the graph; owned nodes get the suffix of half 0 and keep their values and symbols
    copy the owned nodes again for half 1, with values of new symbols, run on fake tensors
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from atomc.ops.placement import PlacementError
from atomc.parallel.sizes import AGREED, of_half
from atomc.passes.graph import PassError, calls, location, op_name, quiet, resources_written, value_of
from atomc.passes.row_wise import RowWise, free_symbols, twin_symbol
from atomc.passes.runner import Chunked, Context, Match, Pass, Report


@dataclass(frozen=True)
class Chunk(Pass):
    """Cut a region in two by the token symbols `symbols` (names in the graph); says how in `ctx.chunked`."""

    name: ClassVar[str] = "chunk"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "values"})
    symbols: frozenset[str] = field(default_factory=frozenset)

    def run(self, gm: GraphModule, ctx: Context) -> Report:
        tokens = self.tokens(gm.graph, ctx)
        owned = _Owned(gm.graph, ctx, tokens).find()
        copier = _Copier(gm, owned, tokens)
        gm.graph = copier.run()
        ctx.chunked = Chunked(copier.inputs, copier.results, copier.symbols)
        return Report([Match(location(node), op_name(node.target)) for node in owned if node.op == "call_function"])

    def tokens(self, graph: Graph, ctx: Context) -> frozenset[str]:
        """All token symbols: those given, sizes that ranks agree on before a step, and sizes that operators make."""
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        agreed = set().union(*(free_symbols(n.meta.get("val")) for n in inputs if ctx.sizes.get(n.name) == AGREED))
        known = set().union(*(free_symbols(n.meta.get("val")) for n in inputs))
        made = set().union(*(free_symbols(n.meta.get("val")) for n in calls(graph))) - known
        return self.symbols | agreed | made


class _Owned:
    """The nodes that are done once for each half."""

    def __init__(self, graph: Graph, ctx: Context, tokens: frozenset[str]) -> None:
        self.graph, self.ctx, self.tokens = graph, ctx, tokens

    def find(self) -> set[Node]:
        """Raises `PassError`: nothing has a token symbol; or a node cannot be cut in two."""
        owned: set[Node] = set()
        rows = RowWise(self.tokens, self.ctx.states)
        for node in self.graph.nodes:
            if node.op == "placeholder" and self._has_tokens(node):
                if node.name in self.ctx.weights or node.name in self.ctx.states:
                    raise self._error(f"{node.name} is a weight or state, and has a size of the step")
                owned.add(node)
            elif node.op == "call_function" and (set(node.all_input_nodes) & owned or self._has_tokens(node)):
                owned.add(node)
                if "state" in resources_written(node):
                    raise self._error(f"{node.name} ({location(node)}): random numbers would be drawn once more")
            try:
                if node.op != "output":
                    rows.add(node)
            except PlacementError as error:
                what = f"{node.name} = {op_name(node.target)} ({location(node)})"
                raise self._error(f"{what} does not treat tokens one by one: {error}") from error
        if not owned:
            raise self._error(f"no input has a size of {', '.join(sorted(self.tokens)) or 'nothing'}")
        self._check_effects(owned)
        return owned

    def _error(self, what: str) -> PassError:
        return PassError(f"{self.ctx.region}: {what}.")

    def _has_tokens(self, node: Node) -> bool:
        return bool(free_symbols(node.meta.get("val")) & self.tokens)

    def _check_effects(self, owned: set[Node]) -> None:
        for node in calls(self.graph):
            if node not in owned and resources_written(node):
                raise self._error(f"{node.name} ({location(node)}) writes, for neither half")
        output = next(node for node in self.graph.nodes if node.op == "output")
        if whole := [node for node in output.all_input_nodes if node not in owned]:
            raise self._error(f"result {whole[0].name} depends on no token")


class _Copier:
    """Builds the chunked graph.

    Attributes:
        inputs, results, symbols: as in `Chunked`, when it has run.
    """

    def __init__(self, gm: GraphModule, owned: set[Node], tokens: frozenset[str]) -> None:
        self.gm, self.owned = gm, owned
        self.graph = Graph()
        self.copies: tuple[dict[Node, Node], dict[Node, Node]] = {}, {}
        self.inputs: dict[str, tuple[str, str]] = {}
        self.results = 0
        self.twins = _Twins(tokens)

    @property
    def symbols(self) -> dict[str, str]:
        return self.twins.symbols

    def run(self) -> Graph:
        nodes = list(self.gm.graph.nodes)
        with quiet([n.meta.get("val") for n in nodes]), torch.no_grad():
            for node in nodes:
                if node.op == "output":
                    continue
                for half in (0, 1) if node.op == "placeholder" and node in self.owned else (0,):
                    self._copy(node, half)
            for node in nodes:
                if node.op == "call_function" and node in self.owned:
                    self._copy(node, 1)
        output = nodes[-1]
        leaves = [pytree.tree_leaves(self._argument(output.args[0], half)) for half in (0, 1)]
        self.results = len(leaves[0])
        self.graph.output((*leaves[0], *leaves[1]))
        return self.graph

    def _argument(self, value: Any, half: int) -> Any:
        return torch.fx.node.map_arg(value, lambda n: self.copies[half if n in self.owned else 0][n])

    def _copy(self, node: Node, half: int) -> None:
        """Append a half's copy of a node (of a shared one, the only copy)."""
        name = of_half(node.name, half) if node in self.owned else node.name
        args, kwargs = self._argument(node.args, half), self._argument(node.kwargs, half)
        target = name if node.op == "placeholder" else node.target
        made = self.graph.create_node(node.op, target, args, kwargs, name, node.type)
        made.meta = dict(node.meta)
        if node in self.owned:
            made.meta["half"] = half
        if half and node.op == "placeholder":
            made.meta["val"] = self.twins.input(node.meta["val"])
            self.inputs[node.name] = self.copies[0][node].name, made.name
        elif half:
            function: Any = made.target
            made.meta["val"] = function(*map(value_of, args), **{k: value_of(v) for k, v in kwargs.items()})
        self.copies[half][node] = made


class _Twins:
    """Fake inputs of the second half: as the first's, with symbols of their own.

    Attributes:
        symbols: name of a symbol -> that of the second half.
    """

    def __init__(self, tokens: frozenset[str]) -> None:
        self.tokens = tokens
        self.symbols: dict[str, str] = {}
        self._made: dict[Any, Any] = {}  # as sympy

    def input(self, value: torch.Tensor | torch.SymInt) -> Any:
        """The twin of an input."""
        if isinstance(value, torch.SymInt):
            return self._size(value)
        return torch.empty([self._size(size) for size in value.shape], dtype=value.dtype, device=value.device)

    def _size(self, size: int | torch.SymInt) -> int | torch.SymInt:
        """Its expression with the second half's symbols."""
        if not isinstance(size, torch.SymInt):
            return size
        env: ShapeEnv = size.node.shape_env
        for symbol in sorted(size.node.expr.free_symbols, key=str):
            if str(symbol) in self.tokens and symbol not in self._made:
                self._made[symbol] = made = twin_symbol(env, env, symbol)
                self.symbols[str(symbol)] = str(made)
        return env.create_symintnode(size.node.expr.xreplace(self._made), hint=None)
