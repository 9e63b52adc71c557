"""Canonicalize: one spelling for each operation, so that patterns need one spelling too.

Contract: values are unchanged, bit for bit. After it no no-op remains, every call is positional without trailing
defaults, dims count from the end, and equal pure calls are one node.

Pseudo-code:
    for node in graph:
        drop export's assertions and operations that change nothing
        rename to the one operator kept for each meaning (view, flatten -> reshape; float() -> to; chunk -> slice)
        normalise the arguments
    merge equal pure nodes; drop dead ones
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from atomc.passes.graph import aten, copy_provenance, mutated_args, schema_of
from atomc.passes.runner import Context, Match, Pass, Report, invariant

ASSERTIONS = frozenset(
    {
        "aten::_assert_tensor_metadata",
        "aten::_assert_async",
        "aten::_assert_scalar",
        "aten::sym_constrain_range",
        "aten::sym_constrain_range_for_size",
    }
)
IDENTITIES = frozenset({aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.clone.default,
                        aten.contiguous.default})  # fmt: skip
RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints,
                      aten.unflatten.int, aten.view_as.default})  # fmt: skip
CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.type_as.default})
DIM_ARGUMENTS = frozenset({"dim", "dim0", "dim1", "dims"})
END = torch.iinfo(torch.int64).max


def _value(node: object) -> Any:
    return node.meta.get("val") if isinstance(node, Node) else None


def _rank(node: Node) -> int | None:
    first = node.args[0] if node.args else None
    value = _value(first[0] if isinstance(first, (list, tuple)) and first else first)
    return value.dim() if isinstance(value, torch.Tensor) else None


def normalise_call(node: Node) -> None:
    """All arguments positional in schema order, trailing defaults dropped, dims negative."""
    schema = schema_of(node)
    if schema is None:
        return
    arguments = schema.arguments
    filled: list[Any] = []
    for position, argument in enumerate(arguments):
        if position < len(node.args):
            filled.append(node.args[position])
        else:
            filled.append(node.kwargs.get(argument.name, argument.default_value))
    while (
        filled
        and arguments[len(filled) - 1].has_default_value()
        and not isinstance(filled[-1], Node)
        and (filled[-1] == arguments[len(filled) - 1].default_value)
    ):
        filled.pop()
    rank = _rank(node)
    if node.target is aten.unsqueeze.default and rank is not None:
        rank += 1
    if node.target in (aten.stack.default,) and rank is not None:
        rank += 1
    for position, argument in enumerate(arguments[: len(filled)]):
        if argument.name in DIM_ARGUMENTS and rank:
            filled[position] = _from_end(filled[position], rank)
    plain = [i for i, a in enumerate(arguments) if not a.kwarg_only]
    node.args = tuple(filled[i] for i in plain if i < len(filled))
    node.kwargs = {a.name: filled[i] for i, a in enumerate(arguments) if a.kwarg_only and i < len(filled)}


def _from_end(dim: Any, rank: int) -> Any:
    if isinstance(dim, (list, tuple)):
        return [_from_end(d, rank) for d in dim]
    return dim - rank if isinstance(dim, int) and dim >= 0 else dim


@dataclass(frozen=True)
class Canonicalize(Pass):
    """See the module's contract."""

    name: ClassVar[str] = "canonicalize"
    ensures: ClassVar[frozenset[str]] = frozenset({"canonical", "values"})

    def run(self, gm: GraphModule, ctx: Context) -> Report:
        report = Report()
        for node in list(gm.graph.nodes):
            if node.op == "call_function" and _drop_or_rename(gm, node):
                report.matches.append(Match(str(node.target), node.name))
        for node in gm.graph.nodes:
            if node.op == "call_function":
                normalise_call(node)
        report.matches += [Match("equal to an earlier node", name) for name in merge_equal(gm)]
        remove_dead(gm)
        return report


def _drop_or_rename(gm: GraphModule, node: Node) -> bool:
    """Apply the first rule that fits; True if the node was replaced or erased."""
    schema = schema_of(node)
    if schema is not None and schema.name in ASSERTIONS:
        gm.graph.erase_node(node)
        return True
    if (same := _identity_of(node)) is not None:
        node.replace_all_uses_with(same)
        gm.graph.erase_node(node)
        return True
    rule = RULES.get(node.target)
    if rule is None:
        return False
    with gm.graph.inserting_before(node):
        new = rule(gm, node)
    if new is None:
        return False
    if isinstance(new, Node):
        _keep_meta(node, new)
        node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return True


def _keep_meta(old: Node, new: Node) -> None:
    new.meta["val"] = old.meta.get("val")
    copy_provenance(old, new)


def _identity_of(node: Node) -> Node | None:
    """The input a node equals: same dtype casts, aliases, full slices, reshapes to the same shape."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    before, after = _value(source), _value(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    if node.target in IDENTITIES:
        return source
    same_type = before.dtype == after.dtype and before.device == after.device
    if node.target in CASTS and same_type:
        return source
    shaping = RESHAPES | {aten.slice.Tensor, aten.expand.default, aten.squeeze.dim}
    return source if node.target in shaping and same_type and _same_shape(before, after) else None


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dim() == b.dim() and all(
        (x == y) if isinstance(x, int) and isinstance(y, int) else str(x) == str(y)
        for x, y in zip(a.shape, b.shape, strict=True)
    )


Rule = Callable[[GraphModule, Node], Node | None]


def _reshape(gm: GraphModule, node: Node) -> Node | None:
    """view, flatten, unflatten: reshape to the output's static sizes, with -1 where one size is symbolic."""
    if node.target is aten.reshape.default and all(isinstance(s, int) for s in node.args[1]):  # type: ignore[union-attr]
        return None
    value = _value(node)
    sizes: list[int | Node] = [s if isinstance(s, int) else -1 for s in value.shape]
    if sizes.count(-1) > 1:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            return gm.graph.call_function(aten.reshape.default, (node.args[0], node.args[1]))
        return None
    return gm.graph.call_function(aten.reshape.default, (node.args[0], sizes))


def _cast(gm: GraphModule, node: Node) -> Node | None:
    value, source = _value(node), _value(node.args[0])
    if source is None or value.device != source.device or value.layout != source.layout:
        return None
    if node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        return None
    return gm.graph.call_function(aten.to.dtype, (node.args[0], value.dtype))


def _square(gm: GraphModule, node: Node) -> Node | None:
    return gm.graph.call_function(aten.square.default, (node.args[0],)) if node.args[1] == 2 else None


def _clamp(low: bool) -> Rule:
    def rule(gm: GraphModule, node: Node) -> Node | None:
        limits = (node.args[1], None) if low else (None, node.args[1])
        return gm.graph.call_function(aten.clamp.default, (node.args[0], *limits))

    return rule


def _scalar(target: Any) -> Rule:
    def rule(gm: GraphModule, node: Node) -> Node | None:
        return gm.graph.call_function(target, node.args, node.kwargs)

    return rule


def _slice(gm: GraphModule, node: Node) -> Node | None:
    """Static bounds, counted from the start; an end at or past the size is written as the largest int."""
    x, dim, start, stop, step = (*node.args, *(0, 0, None, None, 1)[len(node.args) :])
    size = _value(x).shape[dim]
    if not isinstance(size, int) or not isinstance(start or 0, int) or not isinstance(stop or 0, int):
        return None
    first, last, _ = slice(start, stop).indices(size)  # type: ignore[misc]
    new = (x, dim, first, END if last >= size else last, step)
    return None if new == tuple(node.args) else gm.graph.call_function(aten.slice.Tensor, new)


def _split(gm: GraphModule, node: Node) -> Node | None:
    """split, chunk, split_with_sizes + getitem -> slices; unbind + getitem -> selects."""
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    if node.target is aten.unbind.int:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    users = list(node.users)
    parts = _value(node)
    if not isinstance(dim, int) or any(u.target is not operator.getitem for u in users) or not users:
        return None
    rank = _value(node.args[0]).dim()
    sizes = [] if node.target is aten.unbind.int else [p.shape[dim] for p in parts]
    if any(not isinstance(s, int) for s in sizes):
        return None
    for user in users:
        part = int(user.args[1])  # type: ignore[arg-type]
        with gm.graph.inserting_before(user):
            if node.target is aten.unbind.int:
                new = gm.graph.call_function(aten.select.int, (node.args[0], dim, part))
            else:
                start = sum(sizes[:part])
                stop = END if start + sizes[part] >= sum(sizes) else start + sizes[part]
                at = dim - rank if dim >= 0 else dim
                new = gm.graph.call_function(aten.slice.Tensor, (node.args[0], at, start, stop))
        _keep_meta(user, new)
        user.replace_all_uses_with(new)
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    return None


RULES: dict[Any, Rule] = {
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(CASTS, _cast),
    aten.pow.Tensor_Scalar: _square,
    aten.clamp_max.default: _clamp(low=False),
    aten.clamp_min.default: _clamp(low=True),
    aten.mul.Scalar: _scalar(aten.mul.Tensor),
    aten.add.Scalar: _scalar(aten.add.Tensor),
    aten.sub.Scalar: _scalar(aten.sub.Tensor),
    aten.div.Scalar: _scalar(aten.div.Tensor),
    aten.slice.Tensor: _slice,
    aten.split_with_sizes.default: _split,
    aten.split.Tensor: _split,
    aten.split.sizes: _split,
    aten.chunk.default: _split,
    aten.unbind.int: _split,
}


def merge_equal(gm: GraphModule) -> list[str]:
    """Merge pure calls with equal target and arguments; returns the names of the nodes removed."""
    written = {base for node in gm.graph.nodes if node.op == "call_function" for base in mutated_args(node)}
    seen: dict[Any, Node] = {}
    removed: list[str] = []
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not _is_pure(node) or any(n in written for n in node.all_input_nodes):
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)
            removed.append(node.name)
    return removed


def _is_pure(node: Node) -> bool:
    schema = schema_of(node)
    if schema is None:
        return node.target is operator.getitem
    tags = getattr(node.target, "tags", ())
    return not schema.is_mutable and torch.Tag.nondeterministic_seeded not in tags


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _hashable(v)) for k, v in value.items()))
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    return (type(value).__name__, value)


def remove_dead(gm: GraphModule) -> int:
    """Erase calls without users that mutate nothing; returns how many."""
    removed = 0
    for node in reversed(list(gm.graph.nodes)):
        schema = schema_of(node)
        pure = schema is None or not schema.is_mutable
        if node.op == "call_function" and not node.users and pure:
            gm.graph.erase_node(node)
            removed += 1
    return removed


@dataclass(frozen=True)
class DeadCode(Pass):
    """Erase what no output and no mutation needs."""

    name: ClassVar[str] = "dead_code"
    requires: ClassVar[frozenset[str]] = frozenset({"values"})

    def run(self, gm: GraphModule, ctx: Context) -> Report:
        before = [n.name for n in gm.graph.nodes]
        remove_dead(gm)
        left = {n.name for n in gm.graph.nodes}
        return Report(matches=[Match("dead", name) for name in before if name not in left])


@invariant("canonical")
def _canonical(gm: GraphModule) -> str | None:
    for node in gm.graph.nodes:
        schema = schema_of(node) if node.op == "call_function" else None
        if schema is not None and (schema.name in ASSERTIONS or node.target in IDENTITIES):
            return f"{node.name} ({node.target}) should have been removed"
    return None


@invariant("values")
def _values(gm: GraphModule) -> str | None:
    for node in gm.graph.nodes:
        schema = schema_of(node) if node.op == "call_function" else None
        if schema is not None and schema.returns and node.meta.get("val") is None:
            return f"{node.name} ({node.target}) has no fake value"
    return None
