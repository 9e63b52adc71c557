"""Shard: the graph of one region as every rank of a mesh runs it, with the collectives that it needs.

Contract: one graph for all ranks; they differ in their parts of the weights, and in their index on each axis, which is
a size of the graph. On every rank it gives what the
whole graph gives for the rank's own requests, up to the order of sums over ranks. Every value is what the rules of
`atomc/ops/placement_rules.py` make of it, and a sum that is due is taken where it arises.

    It runs after quantisation and fusion, before casts are moved and pointwise chains are generated: codes and scales
    are recipes of their own by then, cut in units of their blocks; what is sent is what was quantised, a byte for an
    element; and a fused operator never reaches over a place where a collective has to be, because those lie at the
    ends of sublayers and before routed experts.
Terms:
    own     a rank's part of what belongs to requests: cut along `dp`, whole along `tp`.
    gather  experts on the tokens of all: one message out (input, weights and choices), one sum back. Rows are padded
            to a number that the ranks agreed on (`P`), so that no size depends on a rank; a row of padding has no
            choice (-1), so that no expert sees it.
    route   tokens go to the ranks that have their experts and come back, each once a rank, sorted once.
Pseudo-code:
    place the placeholders; cut the weights
    for each node:  experts -> gather or route;  embedding in a table that is cut -> its part, then the sum
                    else the rule; numbers in its arguments that count what is cut are divided
                    a sum is due -> all_reduce in fp32
    results: own; logits cut by vocabulary are gathered
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch.fx import GraphModule, Node

from atomc.errors import RecipeError
from atomc.ops import placement_exchange as _rules
from atomc.ops.placement import PARTIAL, REPLICATE, Mesh, Placement, PlacementError, Shard
from atomc.parallel.collectives import WAIT, c10d
from atomc.parallel.layout import Layout
from atomc.parallel.propagate import Placed, place_node, sizes_of
from atomc.parallel.sizes import AGREED, INDEX
from atomc.passes.fuse import Emitter
from atomc.passes.graph import PassError, aten, location, quiet, value_of
from atomc.passes.runner import Context, Match, Pass, Report
from atomc.targets import Target

atom = torch.ops.atom
Hint = Callable[[str, str, str], Placement]
Form = Literal["gather", "route"]

F32 = torch.float32
EXPERTS: dict[Any, tuple[int, int]] = {getattr(atom, name).default: count for name, count in _rules.EXPERTS.items()}


def form_of(layout: Layout, target: Target, kind: Literal["prefill", "decode"]) -> Form:
    """Which form a step of a kind takes.

    On a GPU all steps gather: what routes has sizes that only running tells, and no kernel is chosen for such.
    """
    routes = layout.moe == "ep" and layout.dp > 1 and kind == "prefill" and not target.is_gpu
    return "route" if routes else "gather"


@dataclass(frozen=True)
class ShardGraph(Pass):
    """Cut a region for a mesh.

    Attributes:
        mesh: its axes are `dp`, `tp`, or both. moe: how experts are shared, `tp` or `ep`. form: of `ep` along `dp`.
        hint: (path of a parameter, axis, moe) -> placement.
    """

    name: ClassVar[str] = "shard"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "values"})
    mesh: Mesh
    moe: Literal["tp", "ep"]
    hint: Hint
    form: Form = "gather"

    def run(self, gm: GraphModule, ctx: Context) -> Report:
        return _Sharding(self, gm, ctx).run()


@dataclass
class _Sharding:
    """One run: the graph, and what is known of each node on each axis."""

    options: ShardGraph
    gm: GraphModule
    ctx: Context
    known: dict[str, dict[Node, Placed]] = field(default_factory=dict)
    whole: dict[Node, tuple[tuple[int, ...], ...]] = field(default_factory=dict)  # sizes before the cut
    report: Report = field(default_factory=Report)

    def run(self) -> Report:
        mesh = self.options.mesh
        self.known = {axis: {} for axis in mesh.names}
        self.whole = {n: sizes_of(n.meta.get("val")) for n in self.gm.graph.nodes}
        nodes = list(self.gm.graph.nodes)
        for node in [n for n in nodes if n.op == "placeholder"]:
            self.placeholder(node)
        for node in [n for n in nodes if n.op == "call_function"]:
            try:
                self.call(node)
            except PlacementError as error:
                raise PassError(f"{self.ctx.region}: {node.name} ({location(node)}): {error}") from error
        self.results(nodes[-1])
        return self.report

    # -- placeholders --------------------------------------------------------------------------------------------------

    def placeholder(self, node: Node) -> None:
        """A weight by the model's hint, cut; anything else is the rank's own."""
        path = self.ctx.module_paths.get(node.name)
        for axis in self.options.mesh.names:
            own: Placement = Shard(0) if axis == "dp" else REPLICATE
            self.known[axis][node] = own if path is None else self.options.hint(path, axis, self.options.moe)
        self.declare(node)
        if path is not None:
            node.meta["val"] = self.cut(node, path)

    def declare(self, node: Node) -> None:
        """Tell the checker and the loader what a rank holds of a placeholder."""
        placed = {axis: self.known[axis][node] for axis in self.options.mesh.names}
        self.ctx.placements[node.name] = {a: p for a, p in placed.items() if not isinstance(p, tuple)}

    def cut(self, node: Node, path: str) -> torch.Tensor:
        """The fake value of a rank's part."""
        value: torch.Tensor = node.meta["val"]
        shape = list(value.shape)
        for axis in self.options.mesh.names:
            placed, size = self.known[axis][node], self.options.mesh.size(axis)
            if not isinstance(placed, Shard):
                continue
            if shape[placed.dim] % (size * placed.parts):
                raise RecipeError(
                    f"{self.ctx.region}: {path} has {value.shape[placed.dim]} units in dim {placed.dim} "
                    f"({list(value.shape)}), which {size} ranks along {axis} and {placed.parts} parts do not divide"
                )
            shape[placed.dim] //= size
        if shape == list(value.shape):
            return value
        with quiet([value]):
            return value.new_empty(shape)

    def symbol(self, symbol: str) -> Node:
        """A size that is given to a rank before a step: what all ranks agreed on, or its index on an axis."""
        name = {AGREED: "step_rows"}.get(symbol, symbol)
        nodes: list[Node] = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        if found := next((n for n in nodes if n.name == name), None):
            return found
        with self.gm.graph.inserting_after(nodes[-1]):
            node = self.gm.graph.placeholder(name)
        node.meta["val"] = _new_size(nodes[0].meta["val"], 29 + 2 * len(self.ctx.sizes), symbol)
        self.ctx.sizes[name] = symbol
        for axis in self.options.mesh.names:
            self.known[axis][node] = Shard(0) if INDEX[axis] == symbol else REPLICATE
        self.declare(node)
        return node

    def first(self, axes: tuple[str, ...], each: int) -> Node:
        """The first of a rank's own numbers, where each rank has `each` of them, in the order of the axes."""
        found: Any = None
        for axis in axes:
            index = self.symbol(INDEX[axis])
            if found is not None:
                found = self.number(operator.mul, found, self.options.mesh.size(axis))
            found = index if found is None else self.number(operator.add, found, index)
        return self.number(operator.mul, found, each)

    def number(self, target: Callable[..., Any], *args: Any) -> Node:
        """A size computed of others, after the placeholders."""
        graph = self.gm.graph
        inputs = [n for n in graph.nodes if n.op == "placeholder" or (n.op, n.type) == ("call_function", int)]
        with graph.inserting_after(inputs[-1]):
            node = graph.call_function(target, args, type_expr=int)
        node.meta["val"] = target(*(value_of(a) for a in args))
        for axis in self.options.mesh.names:
            own = any(self.known[axis][n] != REPLICATE for n in node.all_input_nodes)
            self.known[axis][node] = Shard(0) if own else REPLICATE
        return node

    # -- calls ---------------------------------------------------------------------------------------------------------

    def call(self, node: Node) -> None:
        if node.target in EXPERTS:
            self.experts(node)
        elif node.target is aten.embedding.default and self.at("tp", node.args[0]) == Shard(0):
            self.vocabulary(node)
        else:
            self.place(node)
            if PARTIAL in [self.known[axis][node] for axis in self.options.mesh.names]:
                self.row_parallel(node)

    def at(self, axis: str, node: Any) -> Placed:
        """The placement of a node along an axis; whole along one that the mesh has not."""
        return self.known[axis][node] if axis in self.known else REPLICATE

    def place(self, node: Node) -> None:
        """Its placements by its rule; its numbers and its value as the rank sees them."""
        for axis in self.options.mesh.names:
            self.known[axis][node] = place_node(node, self.known[axis], axis, self.sizes)
        self.localise(node)
        node.meta["val"] = self.value(node)

    def sizes(self, node: Node) -> tuple[tuple[int, ...], ...]:
        """Before the cut; of new nodes as they are."""
        return self.whole[node] if node in self.whole else sizes_of(node.meta.get("val"))

    def value(self, node: Node) -> Any:
        assert callable(node.target)
        with quiet(n.meta.get("val") for n in self.gm.graph.nodes), torch.no_grad():
            return node.target(*(value_of(a) for a in node.args), **node.kwargs)

    def localise(self, node: Node) -> None:
        """Divide the numbers among its arguments that count what is cut."""
        for axis, size in self.options.mesh.axes:
            placed = self.known[axis][node]
            first = placed[0] if isinstance(placed, tuple) and placed else placed
            if not isinstance(first, Shard):
                continue
            if node.target is aten.reshape.default:
                wanted = list(node.args[1])  # type: ignore[arg-type]
                if wanted[first.dim] != -1 and not isinstance(wanted[first.dim], Node):
                    wanted[first.dim] //= size
                node.update_arg(1, wanted)
            elif node.target is atom.sparse_attention_inverse_rope_quant.default and first.dim == 1:
                at = [a.name for a in node.target._schema.arguments].index("groups")
                node.update_arg(at, node.args[at] // size)  # type: ignore[operator]

    def row_parallel(self, node: Node) -> None:
        """A product whose inputs are cut where it sums: its parts stay in fp32 until they are summed."""
        dtype = node.meta["val"].dtype
        if node.target is aten.linear.default and dtype != F32:
            node.target = atom.linear_fp32.default
        elif node.target is atom.scaled_linear.default and dtype != F32:
            node.update_arg(6, F32)
        node.meta["val"] = self.value(node)
        users = list(node.users)
        emit = self.emitter(node)
        total = self.reduce(emit, node)
        if dtype != F32:
            total = emit(aten.to.dtype, total, dtype)
        for user in users:
            user.replace_input_with(node, total)
        self.report.matches.append(Match(location(node), f"{self.path(node)} [all_reduce]"))

    def vocabulary(self, node: Node) -> None:
        """Each rank looks up the rows that it has; the others give zeros, so the sum is exact."""
        table, ids = node.args[:2]
        assert isinstance(table, Node)
        rows = self.whole[table][0][0]
        first = self.first(("tp",), rows // self.options.mesh.size("tp"))
        emit = self.emitter(node)
        total = self.reduce(emit, emit(atom.vocabulary_embedding.default, table, ids, first))
        self.replace(node, total, "all_reduce")

    # -- experts -------------------------------------------------------------------------------------------------------

    def experts(self, node: Node) -> None:
        """Routed experts, shared by all ranks."""
        x_count, w_count = EXPERTS[node.target]
        args = list(node.args)
        indices = x_count + 2 * w_count
        x = [a for a in args[:x_count] if isinstance(a, Node)]
        emit = self.emitter(node)
        local, own = self.local(node, args[x_count])
        if self.options.mesh.size("dp") == 1:
            form = "all_reduce"
            total = self.reduce(emit, self.run_experts(emit, node, x, args[indices], args[indices + 1], local))
        elif own is not None and self.options.form == "route":
            form = "all_to_all"
            total = self.route(emit, node, x, args[indices], args[indices + 1], local, own)
        else:
            form = "all_gather"
            total = self.gather(emit, node, x, args[indices], args[indices + 1], local)
        self.replace(node, total, form)

    def local(self, node: Node, weight: Any) -> tuple[Callable[[Emit, Node], Node], tuple[Node, int, int] | None]:
        """How choices become the rank's own experts; with whole experts also its first, their number, and a column's.

        A column: the experts of all ranks that have the same place along `dp`.
        """
        if self.options.moe == "tp":
            return _wide, None
        total = self.whole[weight][0][0]
        per = total // self.options.mesh.ranks
        first = self.first(self.options.mesh.names, per)
        own = first, per, total // self.options.mesh.size("dp")
        return (lambda emit, indices: emit(atom.local_experts.default, indices, first, per)), own

    def run_experts(
        self, emit: Emit, node: Node, x: list[Node], indices: Any, weights: Any, local: Callable[[Emit, Node], Node]
    ) -> Node:
        """The operator on other inputs."""
        args = list(node.args)
        x_count, w_count = EXPERTS[node.target]
        at = x_count + 2 * w_count
        args[:x_count], args[at], args[at + 1] = x, local(emit, indices), weights
        return emit(node.target, *args)

    def message(self, emit: Emit, x: list[Node], indices: Any, weights: Any, *rows: Node) -> tuple[Node, Any]:
        """Input, routing weights and choices as one message, and what takes it apart again.

        Choices are sent plus one: what pads a message is zeros, and comes out as no choice, -1.
        """
        parts = [*x, weights, emit(aten.add.Tensor, emit(aten.to.dtype, indices, torch.int32), 1)]
        values = [p.meta["val"] for p in parts]
        widths, dtypes = [math.prod(v.shape[1:]) for v in values], [v.dtype for v in values]
        sent = emit(atom.pack_message.default, parts, *rows)

        def unpack(received: Node) -> list[Node]:
            whole = emit(atom.unpack_message.default, received, widths, dtypes)
            *values, sent = [emit(operator.getitem, whole, i) for i in range(len(parts))]
            return [*values, emit(aten.sub.Tensor, sent, 1)]

        return sent, unpack

    def gather(
        self, emit: Emit, node: Node, x: list[Node], indices: Any, weights: Any, local: Callable[[Emit, Node], Node]
    ) -> Node:
        dp = self.options.mesh.size("dp")
        sent, unpack = self.message(emit, x, indices, weights, self.symbol(AGREED))
        *inputs, all_weights, indices = unpack(emit(WAIT, emit(c10d.all_gather_into_tensor.default, sent, dp, "dp")))
        partial = self.run_experts(emit, node, inputs, indices, all_weights, local)
        summed = emit(WAIT, emit(c10d.reduce_scatter_tensor.default, partial, "sum", dp, "dp"))
        return self.reduce(emit, emit(atom.drop_padding.default, summed, weights))

    def route(
        self, emit: Emit, node: Node, x: list[Node], indices: Any, weights: Any,
        local: Callable[[Emit, Node], Node], own: tuple[Node, int, int] | None,
    ) -> Node:  # fmt: skip
        assert own is not None
        dp, (first, per, span) = self.options.mesh.size("dp"), own
        ones = [1] * dp
        whole = emit(atom.sort_by_rank.default, indices, first, dp, per, span)
        counts, order = (emit(operator.getitem, whole, i) for i in range(2))
        expected = emit(WAIT, emit(c10d.all_to_all_single.default, counts, ones, ones, "dp"))
        send, receive = emit(atom.host_sizes.default, counts), emit(atom.host_sizes.default, expected)
        message, unpack = self.message(emit, x, indices, weights)
        rows = emit(atom.dispatch_rows.default, message, order, send)
        *inputs, its_weights, indices = unpack(
            emit(WAIT, emit(c10d.all_to_all_single.default, rows, receive, send, "dp"))
        )
        done = self.run_experts(emit, node, inputs, indices, its_weights, local)
        back = emit(WAIT, emit(c10d.all_to_all_single.default, done, send, receive, "dp"))
        return self.reduce(emit, emit(atom.combine_rows.default, back, order, weights, send))

    # -- ends ----------------------------------------------------------------------------------------------------------

    def results(self, output: Node) -> None:
        """What a region gives is the rank's own, whole along `tp`."""
        for value in output.all_input_nodes:
            if self.at("tp", value) == Shard(1):
                emit = Emit(self, output, value)
                tp, every = self.options.mesh.size("tp"), c10d.all_gather_into_tensor.default
                whole = emit(atom.join_columns.default, emit(WAIT, emit(every, value, tp, "tp")), tp)
                output.replace_input_with(value, whole)
                self.report.matches.append(Match(location(value), f"{self.path(value)} [all_gather]"))

    def reduce(self, emit: Emit, node: Node) -> Node:
        """The sum over `tp`, if it is due there."""
        if self.at("tp", node) != PARTIAL:
            return node
        return emit(WAIT, emit(c10d.all_reduce.default, node, "sum", "tp"))

    def emitter(self, node: Node) -> Emit:
        return Emit(self, node.next, node)

    def replace(self, node: Node, by: Node, form: str) -> None:
        self.report.matches.append(Match(location(node), f"{self.path(node)} [{form}]"))
        node.replace_all_uses_with(by)
        self.gm.graph.erase_node(node)

    def path(self, node: Node) -> str:
        """The parameter that a call reads, for the report."""
        seen: list[Node] = list(node.all_input_nodes)
        for source in seen:
            if source.name in self.ctx.module_paths:
                return self.ctx.module_paths[source.name]
            if source.op == "call_function" and source.target in (aten.to.dtype, atom.dequantize.default):
                seen += source.all_input_nodes
        return node.name


@dataclass(frozen=True)
class Emit:
    """Inserts calls before a node, with their placements and values."""

    run: _Sharding
    before: Node
    like: Node

    def __call__(self, target: Any, *args: Any) -> Node:
        node = Emitter(self.run.gm, self.before, self.like).call(target, *args)
        for axis in self.run.options.mesh.names:
            self.run.known[axis][node] = place_node(node, self.run.known[axis], axis, self.run.sizes)
        return node


def _wide(emit: Emit, indices: Node) -> Node:
    """Choices that came in a message, as numbers of experts again."""
    return indices if indices.meta["val"].dtype == torch.int64 else emit(aten.to.dtype, indices, torch.int64)


def _new_size(value: torch.Tensor, size: int, name: str) -> torch.SymInt:
    """A symbolic size in the fake mode of a value."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    mode: Any = value.fake_mode  # type: ignore[attr-defined]
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext([DimDynamic.DYNAMIC])
    fake = mode.from_tensor(torch.empty(size), symbolic_context=context, source=ConstantSource(name))
    found: torch.SymInt = fake.shape[0]
    return found
