"""Quantize: put every choice of a quantisation scheme into the graph, as nodes that say what is rounded where.

Contract:
    A product whose rule quantises it reads `dequantize(codes, scales)` of its packed weight and
    `dequantize(quantize(x))` of its input; a cache in a row layout is written through `pack_rows` and read by operators
    that are told the layout; index rows and index queries are rotated and rounded both, or neither. Everything else is
    unchanged. Weight recipes give codes and scales; what the target cannot multiply is expanded exactly, or is an error
    that names the weight.

Terms:
    product    a node that multiplies activations by a weight. pair: codes and scales (`atomc.formats.layout`).
    decision   one line of the table of `atomc explain`: what has which layout, its bytes, and who decided.

Pseudo-code:
    for product: rule = first that fits (kind, path); weight -> pair -> dequantize; input -> quantize -> dequantize
    for weight left over: store it in the checkpoint's dtype, cast where it is used
    for cache: insert(x) -> insert(pack_rows([hadamard] x)); readers get the layout; index queries are rounded
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from atomc.errors import RecipeError
from atomc.formats import Layout, RowLayout
from atomc.passes.fuse import Emitter
from atomc.passes.graph import PassError, aten, base_of, calls, location, quiet
from atomc.passes.lowering import lowering_of, on_target, rows_on_target
from atomc.passes.rotation import INDEX_ROTATION
from atomc.passes.runner import Context, Decision, Match, Pass, Refusal, Report
from atomc.passes.scheme import Rule, Scheme
from atomc.recipes import (
    Cast,
    Concat,
    Dequantize,
    Recipe,
    Stack,
    TensorSpec,
    dense_origin,
    joined,
    members,
    pair_of,
    stored_layout,
    uncast,
)
from atomc.targets import Target

atom = torch.ops.atom
INSERTS = {
    atom.cache_insert.default: atom.packed_insert.default,
    atom.compressed_insert.default: atom.compressed_packed_insert.default,
}
READERS = {atom.sparse_attention.default: ("window", "cache"), atom.index_topk.default: ("cache",)}


@dataclass(frozen=True)
class Product:
    """A product node: `x` and `weight` (a placeholder, maybe seen through views), and the paths of its weight."""

    kind: str
    node: Node
    x: Node
    weight: Node
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        return joined(self.paths)


@dataclass(frozen=True)
class Quantize(Pass):
    """See the module's contract.

    Attributes:
        rows: state field -> text of its row layout; a state that is not named stays in the compute dtype.
        index_query: layout of the index queries; empty: as they are.
    """

    name: ClassVar[str] = "quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "values"})
    ensures: ClassVar[frozenset[str]] = frozenset({INDEX_ROTATION})
    scheme: Scheme
    target: Target
    rows: Mapping[str, str]
    index_query: str = ""

    def run(self, gm: GraphModule, ctx: Context) -> Report:
        report = Report()
        inputs: dict[str, str | None] = {}  # of the experts' products: layout of what enters
        for product in list(products(gm, ctx)):
            found = self.scheme.rule(product.kind, product.paths)
            if found is not None and self._product(gm, ctx, product, *found, report):
                report.matches.append(Match(location(product.node), product.name))
            if product.kind == "experts":
                packed = found is not None and product.weight.name not in ctx.weights
                inputs[product.name] = found[1].activation if found and packed else None
        _check_experts(inputs)
        self._full_weights(gm, ctx)
        for cache in _caches(gm, ctx):
            layout = self._rows_of(ctx, cache)
            if layout is not None:
                self._cache(gm, ctx, cache, layout)
                report.matches.append(Match(location(next(iter(cache.users))), ctx.states[cache.name]))
        return report

    def _rows_of(self, ctx: Context, cache: Node) -> RowLayout | None:
        """How a cache is stored; None: in the compute dtype."""
        text = self.rows.get(ctx.states[cache.name], "")
        return rows_on_target(RowLayout.parse(text), self.target) if text else None

    # -- products ------------------------------------------------------------------------------------------------------

    def _product(
        self, gm: GraphModule, ctx: Context, product: Product, number: int, rule: Rule, report: Report
    ) -> bool:
        """Rewrite a product as its rule says; False if nothing is to be quantised."""
        if product.weight.name not in ctx.weights:
            raise PassError(
                f"{product.name} ({location(product.node)}): the weight is packed for another product that reads it; "
                "give it the rule `bfloat16`."
            )
        recipe, by = ctx.weights[product.weight.name], f"{self.scheme.name}, rule {number}"
        stored, dense = stored_layout(recipe), product.weight.meta["val"]
        if not rule.packs(stored):
            if rule.weight == "bfloat16":
                self._store_dense(gm, ctx, product.weight, with_dtype(recipe, "bfloat16"), f"{by}: bfloat16")
            elif storages := _mixed(recipe):
                report.refusals.append(Refusal(location(product.node), f"{product.name}: stored as {storages}"))
            return False
        wanted = stored if rule.weight == "stored" else Layout.parse(rule.weight)
        assert wanted is not None
        wanted = on_target(wanted, self.target)
        act = None if rule.activation is None else on_target(Layout.parse(rule.activation), self.target)
        lowering = lowering_of(wanted, act, self.target, str(dense.dtype), product.name, location(product.node))
        try:
            pair = pair_of(recipe, wanted, ctx.spec_of, ctx.choice)
        except (RecipeError, ValueError) as error:
            raise PassError(
                f"{product.name} ({location(product.node)}) cannot be packed as {wanted}: {error}"
            ) from error
        size = pair.layout.bytes(tuple(dense.shape))
        ctx.decisions.append(
            Decision("weight", product.name, list(dense.shape), str(pair.layout), size, str(stored or "in full"),
                     pair.origin, lowering, by, location(product.node))
        )  # fmt: skip
        codes, scales = _placeholders(gm, ctx, product.weight, pair.codes, pair.scales)
        emit = Emitter(gm, _first_user(product.weight), product.node)
        values = emit.call(atom.dequantize.default, codes, scales, str(pair.layout), dense.dtype)
        product.weight.replace_all_uses_with(values, delete_user_cb=lambda user: user is not values)
        _erase(gm, ctx, product.weight)
        if act is not None:
            self._activation(gm, ctx, product, act, by)
        return True

    def _activation(self, gm: GraphModule, ctx: Context, product: Product, layout: Layout, by: str) -> None:
        """Round what enters the product: below views that leave the last dim alone, so that each token has its row."""
        source, views = product.x, []
        while source.target is aten.transpose.int and -1 not in source.args[1:]:
            views.append(source)
            source = source.args[0]  # type: ignore[assignment]
        value = rounded(Emitter(gm, product.node, product.node), source, layout)
        for view in reversed(views):
            value = Emitter(gm, product.node, view).call(view.target, value, *view.args[1:])
        product.node.replace_input_with(product.x, value)
        shape = [str(s) if isinstance(s, torch.SymInt) else s for s in source.meta["val"].shape]
        width = source.meta["val"].shape[1:]
        ctx.decisions.append(
            Decision("activation", f"input of {product.name}", shape, str(layout), layout.bytes(tuple(width)),
                     _short(source.meta["val"].dtype), "quantized", "rounded per token", by, location(product.node))
        )  # fmt: skip

    # -- weights in full -----------------------------------------------------------------------------------------------

    def _full_weights(self, gm: GraphModule, ctx: Context) -> None:
        """Store what is not quantised as the checkpoint does, where that is no larger; cast it where it is used."""
        for node in [n for n in gm.graph.nodes if n.op == "placeholder" and n.name in ctx.weights]:
            if not node.meta.get("decided"):
                recipe = ctx.weights[node.name]
                bare = uncast(recipe) if self.scheme.full == "checkpoint" else recipe
                self._store_dense(gm, ctx, node, bare, f"{self.scheme.name}, no rule")

    def _store_dense(self, gm: GraphModule, ctx: Context, node: Node, recipe: Recipe, by: str) -> None:
        """Give a weight another recipe, and a cast to the dtype it is used in."""
        value, before = node.meta["val"], ctx.weights[node.name]
        spec = ctx.spec_of(recipe) if recipe is not before else TensorSpec(tuple(value.shape), value.dtype)
        if spec.dtype != value.dtype and (spec.dtype.itemsize < value.dtype.itemsize or not value.is_floating_point()):
            ctx.weights[node.name] = recipe
            with quiet([value]):
                node.meta["val"] = torch.empty(spec.shape, dtype=spec.dtype)
            if node.users:
                cast = Emitter(gm, _first_user(node), _first_user(node)).call(aten.to.dtype, node, value.dtype)
                node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
        node.meta["decided"] = True
        final, recipe = node.meta["val"], ctx.weights[node.name]
        lowering = f"cast to {_short(value.dtype)} when loaded" if final.dtype != value.dtype else "as it is"
        first = next(iter(node.users), None)
        ctx.decisions.append(
            Decision("weight", ctx.module_paths[node.name].removesuffix(".weight"), list(final.shape),
                     _short(final.dtype), final.numel() * final.dtype.itemsize, _stored_text(recipe, final.dtype, ctx),
                     dense_origin(recipe, ctx.spec_of), lowering, by,
                     location(first) if first is not None else "?")
        )  # fmt: skip

    # -- caches --------------------------------------------------------------------------------------------------------

    def _cache(self, gm: GraphModule, ctx: Context, cache: Node, layout: RowLayout) -> None:
        """Store a cache in pages of packed rows; tell its writers and its readers."""
        value, text, rotate = cache.meta["val"], str(layout), bool(self.index_query) and _is_index(cache)
        pages, rows = value.shape[0], value.shape[1]
        for user in list(cache.users):
            if user.target in INSERTS:
                self._insert(gm, user, text, rotate)
            elif user.target in READERS and cache in user.args:
                self._reader(gm, ctx, user, text, rotate)
            else:
                raise PassError(f"{ctx.states[cache.name]}: {user.name} ({location(user)}) cannot read {text}")
        with quiet([value]):
            cache.meta["val"] = torch.empty((pages, layout.page_bytes(rows)), dtype=torch.uint8)
        name = ctx.states[cache.name]
        ctx.state_specs[name] = ((layout.page_bytes(rows),), "uint8")
        why = "Hadamard rotation on both sides" if rotate else "no rotation"
        ctx.decisions.append(
            Decision("cache", name, [value.shape[2]], text, layout.row_bytes, _short(value.dtype), "quantized",
                     f"{rows} rows a page; {why}", self.scheme.name, location(next(iter(cache.users))))
        )  # fmt: skip

    def _insert(self, gm: GraphModule, insert: Node, rows: str, rotate: bool) -> None:
        cache, x, *rest = insert.args
        assert isinstance(x, Node)
        emit = Emitter(gm, insert, insert)
        if rotate:
            x = emit.call(atom.hadamard.default, x)
        packed = emit.call(atom.pack_rows.default, x, rows)
        insert.target = INSERTS[insert.target]  # type: ignore[index]
        insert.args = (cache, packed, *rest, rows)

    def _reader(self, gm: GraphModule, ctx: Context, reader: Node, rows: str, rotate: bool) -> None:
        assert isinstance(reader.target, OpOverload)
        names = [a.name for a in reader.target._schema.arguments]
        caches = [arg for name, arg in zip(names, reader.args, strict=False) if name in READERS[reader.target]]
        if any(str(self._rows_of(ctx, cache)) != rows for cache in caches if isinstance(cache, Node)):
            raise PassError(f"{reader.name} ({location(reader)}) reads caches of two layouts")
        reader.args = (*reader.args[: names.index("rows")], rows)
        if rotate:
            q = reader.args[0]
            assert isinstance(q, Node)
            emit = Emitter(gm, reader, reader)
            query = on_target(Layout.parse(self.index_query), self.target)
            reader.args = (rounded(emit, emit.call(atom.hadamard.default, q), query), *reader.args[1:])


def rounded(emit: Emitter, x: Node, layout: Layout) -> Node:
    """`dequantize(quantize(x))` as nodes, in x's dtype."""
    pair = emit.call(atom.quantize.default, x, str(layout))
    codes, scales = (emit.call(operator.getitem, pair, i) for i in (0, 1))
    return emit.call(atom.dequantize.default, codes, scales, str(layout), x.meta["val"].dtype)


def products(gm: GraphModule, ctx: Context) -> Iterator[Product]:
    """Every product of activations with a weight, in order."""
    for node in calls(gm.graph):
        if node.target in (aten.linear.default, atom.grouped_linear.default, aten.bmm.default):
            x, right = node.args[:2]
            weight = base_of(right) if isinstance(right, Node) else None
            if isinstance(x, Node) and weight is not None and weight.name in ctx.weights:
                kind = {aten.linear.default: "linear", aten.bmm.default: "grouped_output"}.get(node.target, "experts")
                yield Product(kind, node, x, weight, members(ctx.module_paths[weight.name].removesuffix(".weight")))


def _check_experts(inputs: Mapping[str, str | None]) -> None:
    """One operator computes a token's experts: it rounds what enters both products, or neither."""
    if len({layout is None for layout in inputs.values()}) > 1:
        rounded_, plain = (" and ".join(n for n, v in inputs.items() if (v is None) is p) for p in (False, True))
        raise PassError(
            f"the scheme rounds the input of {rounded_} but not that of {plain}; they are one operator. Give both "
            "rules an `activation`, or neither."
        )


def _stored_text(recipe: Recipe, dtype: torch.dtype, ctx: Context) -> str:
    """How the checkpoint stores a weight that comes out in `dtype`, in words."""
    match recipe:
        case Stack(parts=parts) | Concat(parts=parts):
            return " and ".join(dict.fromkeys(_stored_text(part, dtype, ctx) for part in parts))
        case Cast(source=source):
            return str(stored_layout(source) or _short(ctx.spec_of(source).dtype))
    return str(stored_layout(recipe) or _short(dtype))


def _mixed(recipe: Recipe) -> str:
    """How the parts of a weight are stored, in words; empty if they are stored alike."""
    parts = recipe.parts if isinstance(recipe, Stack | Concat) else ()
    found = dict.fromkeys(str(stored_layout(part) or "in full") for part in parts)
    return " and ".join(found) if len(found) > 1 else ""


def _is_index(cache: Node) -> bool:
    return any(user.target is atom.index_topk.default for user in cache.users)


def _caches(gm: GraphModule, ctx: Context) -> list[Node]:
    """Placeholders of row caches that some operator writes or reads."""
    kinds = INSERTS.keys() | READERS.keys()
    return [
        n
        for n in gm.graph.nodes
        if n.op == "placeholder" and n.name in ctx.states and any(u.target in kinds for u in n.users)
    ]


def _first_user(node: Node) -> Node:
    """The earliest node of the graph that reads `node`."""
    return min(node.users)  # nodes of a graph compare by their place in it


def _placeholders(gm: GraphModule, ctx: Context, weight: Node, codes: Recipe, scales: Recipe) -> tuple[Node, Node]:
    """Placeholders of the packed weight and its scales, in the place of the dense one."""
    path = ctx.module_paths[weight.name]
    found = []
    for recipe, name, suffix in ((codes, path, ""), (scales, path.removesuffix(".weight") + ".scale", "_scale")):
        last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
        with gm.graph.inserting_after(last):
            node = gm.graph.placeholder(f"{weight.name}_packed{suffix}")
        spec = ctx.spec_of(recipe)
        with quiet([weight.meta["val"]]):
            node.meta["val"] = torch.empty(spec.shape, dtype=spec.dtype)
        node.meta["decided"] = True
        ctx.weights[node.name], ctx.module_paths[node.name] = recipe, name
        found.append(node)
    return found[0], found[1]


def _erase(gm: GraphModule, ctx: Context, weight: Node) -> None:
    ctx.weights.pop(weight.name)
    ctx.module_paths.pop(weight.name)
    gm.graph.erase_node(weight)


def with_dtype(recipe: Recipe, dtype: Any) -> Recipe:
    """A dense recipe whose leaves come out in another dtype."""
    match recipe:
        case Dequantize() | Cast():
            return msgspec.structs.replace(recipe, dtype=dtype)
        case Stack(parts=parts) | Concat(parts=parts):
            return msgspec.structs.replace(recipe, parts=tuple(with_dtype(p, dtype) for p in parts))
    return Cast(recipe, dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
