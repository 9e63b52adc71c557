"""Canonicalize: one spelling for each operation, so that patterns need one spelling too.

Contract: values are unchanged, bit for bit, and so is what aliases what among inputs and outputs. After it no no-op
remains, every call is positional without trailing defaults, dims count from the end, and equal pure calls are one node.

Pseudo-code:
    for node in graph:
        drop export's assertions and operations that change nothing; a copy stays where somebody could tell it from
        its source: because one of them is written to, returned, or laid out otherwise
        rename to the one operator kept for each meaning (view, flatten -> reshape; float() -> to; chunk -> slice)
        normalise the arguments
    read sizes off the graph's inputs, not off what is computed on the way
    merge equal pure nodes; drop dead ones
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from atomc.passes.graph import (
    aten,
    copy_provenance,
    is_pure,
    location,
    op_name,
    resources_written,
    schema_of,
    storage_of,
)
from atomc.passes.runner import Context, Match, Pass, Report, invariant

ASSERTIONS = frozenset({aten._assert_tensor_metadata.default})
# What may change nothing. The first return the very tensor they are given then, the second another one on its storage,
# the third a copy.
CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default})
SELVES = CASTS | {aten.contiguous.default}
RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints,
                      aten.unflatten.int, aten.view_as.default})  # fmt: skip
ALIASES = RESHAPES | {aten.alias.default, aten.detach.default, aten.slice.Tensor, aten.expand.default, aten.squeeze.dim}
COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.lift_fresh_copy.default,
                    aten.to.dtype, aten.reshape.default, aten.flatten.using_ints})  # fmt: skip
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
    rank = _rank(node)
    if node.target in (aten.unsqueeze.default, aten.stack.default) and rank is not None:
        rank += 1
    defaults = [a.default_value if a.has_default_value() else _NO_DEFAULT for a in arguments]
    for position, argument in enumerate(arguments):
        if argument.name in DIM_ARGUMENTS and rank:
            filled[position], defaults[position] = (_from_end(v[position], rank) for v in (filled, defaults))
    while filled and not isinstance(filled[-1], Node) and filled[-1] == defaults[len(filled) - 1]:
        filled.pop()
    plain = [i for i, a in enumerate(arguments) if not a.kwarg_only]
    node.args = tuple(filled[i] for i in plain if i < len(filled))
    node.kwargs = {a.name: filled[i] for i, a in enumerate(arguments) if a.kwarg_only and i < len(filled)}


_NO_DEFAULT = object()


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
        sharing = Sharing.of(gm.graph)
        for node in list(gm.graph.nodes):
            if node.op == "call_function" and _drop_or_rename(gm, node, sharing):
                report.matches.append(Match(location(node), f"{op_name(node.target)} {node.name}"))
        for node in gm.graph.nodes:
            if node.op == "call_function":
                normalise_call(node)
        read_sizes_off_inputs(gm)
        report.matches += merge_equal(gm)
        remove_dead(gm)
        return report


@dataclass(frozen=True)
class Sharing:
    """Which storages a graph writes to, which it returns, and which nodes it returns as they are."""

    written: frozenset[object]
    returned: frozenset[object]
    outputs: frozenset[Node]

    @staticmethod
    def of(graph: Graph) -> Sharing:
        outputs = next(n for n in graph.nodes if n.op == "output").all_input_nodes
        written = {r for node in graph.nodes for r in resources_written(node)}
        return Sharing(frozenset(written), frozenset(map(storage_of, outputs)), frozenset(outputs))


def _drop_or_rename(gm: GraphModule, node: Node, sharing: Sharing) -> bool:
    """Apply the first rule that fits; True if the node was replaced or erased."""
    if node.target in ASSERTIONS:
        gm.graph.erase_node(node)
        return True
    if (same := _identity_of(node, sharing)) is not None:
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


def _identity_of(node: Node, sharing: Sharing) -> Node | None:
    """The input that a node equals: same dtype casts, aliases, full slices, reshapes to the same shape, copies."""
    source = node.args[0] if node.args else None
    before, after = _value(source), _value(node)
    if not isinstance(source, Node) or not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    if node.target is aten.dropout.default and node.args[2] is False:
        return source
    if not _same_layout(before, after):
        return None
    if before.untyped_storage()._cdata == after.untyped_storage()._cdata:
        returned = node in sharing.outputs
        return source if node.target in SELVES or (node.target in ALIASES and not returned) else None
    told_apart = storage_of(node) in sharing.written | sharing.returned or storage_of(source) in sharing.written
    return source if node.target in COPIES and not told_apart else None


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, device, shape and strides, symbolic ones by expression."""
    if a.dtype != b.dtype or a.device != b.device or a.layout != b.layout or a.dim() != b.dim():
        return False
    pairs = zip((*a.shape, *a.stride()), (*b.shape, *b.stride()), strict=True)
    return a.layout is torch.strided and all(
        x == y if isinstance(x, int) and isinstance(y, int) else str(x) == str(y) for x, y in pairs
    )


Rule = Callable[[GraphModule, Node], Node | None]


def _reshape(gm: GraphModule, node: Node) -> Node | None:
    """view, flatten, unflatten: reshape to the output's static sizes, with -1 where one size is symbolic."""
    sizes: list[Any] = [s if isinstance(s, int) else -1 for s in _value(node).shape]
    if sizes.count(-1) > 1 or 0 in sizes:
        if node.target is aten.reshape.default:
            return None
        sizes = _symbolic_sizes(gm, node)
    if node.target is aten.reshape.default and node.args[1] == sizes:
        return None
    return _call(gm, aten.reshape.default, node.args[0], sizes)


def _symbolic_sizes(gm: GraphModule, node: Node) -> list[Any]:
    """The sizes a reshape asks for, as a list of ints and nodes that read the others off its input."""
    x = node.args[0]
    if node.target in (aten.view.default, aten._unsafe_view.default):
        return list(node.args[1])  # type: ignore[arg-type]
    origin = node.args[1] if node.target is aten.view_as.default else x
    sizes: list[Any] = [s if isinstance(s, int) else _size(gm, origin, i) for i, s in enumerate(_value(origin).shape)]
    given: tuple[Any, ...] = (*node.args[1:], *(0, -1)[len(node.args) - 1 :])
    if node.target is aten.flatten.using_ints:
        start, stop = given[0] % len(sizes), given[1] % len(sizes)
        sizes[start : stop + 1] = [-1]
    elif node.target is aten.unflatten.int:
        dim = given[0] % len(sizes)
        sizes[dim : dim + 1] = given[1]
    return sizes


def _size(gm: GraphModule, x: Any, dim: int) -> Node:
    size = _call(gm, aten.sym_size.int, x, dim)
    size.meta["val"] = _value(x).shape[dim]
    copy_provenance(x, size)
    return size


def _call(gm: GraphModule, target: Any, *args: Any) -> Node:
    return gm.graph.call_function(target, args)


def _cast(gm: GraphModule, node: Node) -> Node | None:
    """The ways to write a conversion of dtype: to.dtype, unless it asks for a device, a layout or a copy too."""
    value, source = _value(node), _value(node.args[0])
    if source is None or value.device != source.device or value.layout != source.layout:
        return None
    if node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        return None
    if value.dtype == source.dtype or not _same_layout(value, torch.empty_like(source, dtype=value.dtype)):
        return None  # a copy that must stay, or a change of memory format
    return _call(gm, aten.to.dtype, node.args[0], value.dtype)


def _square(gm: GraphModule, node: Node) -> Node | None:
    same = _value(node).dtype == _value(node.args[0]).dtype  # an int to the power 2.0 is a float
    return _call(gm, aten.square.default, node.args[0]) if node.args[1] == 2 and same else None


def _clamp(low: bool) -> Rule:
    def rule(gm: GraphModule, node: Node) -> Node | None:
        limits = (node.args[1], None) if low else (None, node.args[1])
        return _call(gm, aten.clamp.default, node.args[0], *limits)

    return rule


def _scalar(target: Any) -> Rule:
    """`x.add(2)` with the number as a Scalar: the Tensor overload takes numbers too, but alpha by name."""

    def rule(gm: GraphModule, node: Node) -> Node | None:
        alpha = {"alpha": node.args[2]} if len(node.args) > 2 else {}
        return gm.graph.call_function(target, node.args[:2], {**node.kwargs, **alpha})

    return rule


def _slice(gm: GraphModule, node: Node) -> Node | None:
    """Static bounds, counted from the start; an end at or past the size is written as the largest int."""
    given: tuple[Any, ...] = (*node.args, *(0, 0, None, None, 1)[len(node.args) :])
    x, dim, start, stop, step = given
    size = _value(x).shape[dim]
    if not isinstance(size, int) or not isinstance(start or 0, int) or not isinstance(stop or 0, int):
        return None
    first, last, _ = slice(start, stop).indices(size)
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
    **dict.fromkeys((*CASTS, aten._to_copy.default), _cast),
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


def read_sizes_off_inputs(gm: GraphModule) -> None:
    """Take each symbolic size from an input that has it, so that no intermediate result is needed for its size only."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    known: dict[str, Node] = {str(v): n for n in inputs if isinstance(v := _value(n), torch.SymInt)}
    tensors = [(n, i, s) for n in inputs if isinstance(v := _value(n), torch.Tensor) for i, s in enumerate(v.shape)]
    sources = {str(s): (n, i) for n, i, s in reversed(tensors) if isinstance(s, torch.SymInt)}
    for node in list(gm.graph.nodes):
        if node.target is not aten.sym_size.int or node.args[0] in inputs:
            continue
        size = str(_value(node))
        if size not in known and size in sources:
            with gm.graph.inserting_after(inputs[-1]):
                known[size] = _size(gm, *sources[size])
            normalise_call(known[size])
        if size in known:
            node.replace_all_uses_with(known[size])
            gm.graph.erase_node(node)


def merge_equal(gm: GraphModule) -> list[Match]:
    """Merge pure calls with equal target and arguments; returns what was removed.

    Neither the results nor the arguments may be written to, and two results that are returned stay two.
    """
    sharing = Sharing.of(gm.graph)
    seen: dict[Any, Node] = {}
    removed: list[Match] = []
    for node in list(gm.graph.nodes):
        if not is_pure(node) or "unbacked_bindings" in node.meta:
            continue
        if any(storage_of(n) in sharing.written for n in (node, *node.all_input_nodes)):
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        first = seen.setdefault(key, node)
        if first is node or (storage_of(node) in sharing.returned and storage_of(first) in sharing.returned):
            continue
        node.replace_all_uses_with(first)
        gm.graph.erase_node(node)
        removed.append(Match(location(node), f"{op_name(node.target)} {node.name} = {first.name}"))
    return removed


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _hashable(v)) for k, v in value.items()))
    if isinstance(value, float):
        return ("float", repr(value))  # 0.0 and -0.0 are equal, and differ; nan is unequal to itself
    return (type(value).__name__, value)


def remove_dead(gm: GraphModule) -> int:
    """Erase pure calls without users; returns how many. A random call stays: the next would draw other numbers."""
    removed = 0
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and is_pure(node):
            gm.graph.erase_node(node)
            removed += 1
    return removed


@dataclass(frozen=True)
class DeadCode(Pass):
    """Erase what no output and no mutation needs."""

    name: ClassVar[str] = "dead_code"
    requires: ClassVar[frozenset[str]] = frozenset({"values"})

    def run(self, gm: GraphModule, ctx: Context) -> Report:
        before = list(gm.graph.nodes)
        remove_dead(gm)
        return Report([Match(location(n), f"{op_name(n.target)} {n.name}") for n in before if n._erased])


@invariant("canonical")
def _canonical(gm: GraphModule) -> str | None:
    sharing = Sharing.of(gm.graph)
    for node in gm.graph.nodes:
        if node.op == "call_function" and (node.target in ASSERTIONS or _identity_of(node, sharing) is not None):
            return f"{node.name} ({node.target}) should have been removed"
    return None


@invariant("values")
def _values(gm: GraphModule) -> str | None:
    for node in gm.graph.nodes:
        schema = schema_of(node) if node.op == "call_function" else None
        if schema is not None and schema.returns and node.meta.get("val") is None:
            return f"{node.name} ({node.target}) has no fake value"
    return None
