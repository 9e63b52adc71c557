"""Fuse: replace every occurrence of an operator's spellings by the operator.

Contract: the graph computes the same values; a fused node carries the source line and module path of what it replaces.
A match is refused, with the reason, where an inner result is needed elsewhere or where the fused node would have to
run both before and after some other node.

Pseudo-code:
    for each spelling, in each dtype it may be written for:
        for each place its structure fits:
            trace the spelling on the shapes and numbers found; compare exactly
            check inner results and order; insert the operator; erase what it replaces
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from atomc.ops import OPS
from atomc.passes.canonicalize import remove_dead
from atomc.passes.graph import (
    VIEWS,
    copy_provenance,
    location,
    mutated_args,
    order_edges,
    reorder,
    value_of,
)
from atomc.passes.match import Binding, Matcher, Miss
from atomc.passes.pattern import Pattern, Spelling, build, general, parameters
from atomc.passes.runner import Context, Match, Pass, PassError, Refusal, Report

DTYPES = (torch.float32, torch.bfloat16)


class Emitter:
    """Inserts calls before a node and gives them fake values."""

    def __init__(self, gm: GraphModule, before: Node, like: Node) -> None:
        self.gm, self.before, self.like = gm, before, like

    def call(self, target: Any, *args: Any) -> Node:
        """`target(*args)` as a new node with its fake value and the provenance of what it replaces."""
        with self.gm.graph.inserting_before(self.before):
            node = self.gm.graph.call_function(target, args)
        mode = next((v.fake_mode for n in self.gm.graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode")), None)
        if mode is None:
            raise PassError("the graph has no fake values; capture it with torch.export or make_fx first")
        with mode, torch.no_grad():
            node.meta["val"] = target(*(value_of(a) for a in args))
        copy_provenance(self.like, node)
        return node


@dataclass(frozen=True)
class Fuse(Pass):
    """Replace the spellings of one operator by `torch.ops.atom.<op>`."""

    name: ClassVar[str] = "fuse"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "values"})
    op: str
    spellings: tuple[Spelling, ...] = field(repr=False)
    variant: str = ""

    @property
    def label(self) -> str:
        return f"fuse_{self.op}{self.variant}"

    def run(self, gm: GraphModule, ctx: Context) -> Report:
        report, nearest = Report(), Miss()
        for spelling in self.spellings:
            for pattern in _general_patterns(spelling):
                nearest = max(nearest, self._rewrite_all(gm, spelling, pattern, report), key=lambda m: m.depth)
        if len(report.matches) < ctx.expected.get(self.label, 0):
            report.refusals.append(Refusal(nearest.where, f"nearest candidate, {nearest.reason}"))
        return report

    def _rewrite_all(self, gm: GraphModule, spelling: Spelling, pattern: Pattern, report: Report) -> Miss:
        """Rewrite at every place the pattern fits; returns how far the furthest place that does not fit agreed."""
        matcher = Matcher(pattern)
        for completions in matcher.search(gm.graph):
            refusal = None
            for found in completions:
                exact, miss = prove(spelling, pattern, found)
                matcher.miss = max(matcher.miss, miss, key=lambda m: m.depth)
                if exact is None:
                    continue
                anchor = exact[1].nodes[exact[0].anchors[0]]
                where, module = location(anchor), _module(anchor)
                reason = obstacle(gm, *exact)
                if reason is None:
                    replace(gm, self.op, spelling, *exact)
                    report.matches.append(Match(where, f"{module} [{spelling.source}]"))
                    refusal = None
                    break
                refusal = refusal or Refusal(where, reason)
            if refusal is not None:
                report.refusals.append(refusal)
        return matcher.miss


def _general_patterns(spelling: Spelling) -> list[Pattern]:
    """One pattern per compute dtype whose graphs differ, the one with casts first: in fp32 they vanish, and what is left
    would also fit between the casts of a bf16 graph."""
    patterns = sorted((general(spelling, dtype) for dtype in DTYPES), key=lambda p: -p.size)
    return patterns if patterns[0].size != patterns[1].size else patterns[:1]


def prove(spelling: Spelling, pattern: Pattern, found: Binding) -> tuple[tuple[Pattern, Binding] | None, Miss]:
    """Trace the spelling on what was found and compare exactly; the exact pattern with its binding, or the miss."""
    bound = {name: found.nodes[node] for node, name in pattern.inputs.items() if node in found.nodes}
    arguments: dict[str, Any] = {name: node.meta["val"] for name, node in bound.items()}
    constants = {k: v for k, v in spelling.examples.items() if v is None or isinstance(v, bool)}
    try:
        exact = build(spelling.fn, {**arguments, **found.numbers, **constants, **spelling.fixed}, {})
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        # Shapes for which the mathematics is not defined: the structure was alike by chance.
        first = found.nodes[pattern.anchors[0]]
        return None, Miss(1, location(first), f"the reference rejects these shapes: {error}")
    binding = Binding({node: bound[name] for node, name in exact.inputs.items()}, dict(found.numbers))
    matcher = Matcher(exact, exact=True)
    order = {found.nodes[p].name: found.nodes[p] for p in pattern.anchors}
    targets = [found.nodes[p] for p in _aligned(pattern, exact)]
    if len(exact.anchors) == len(order) and all(
        matcher.node(p, t, binding) for p, t in zip(exact.anchors, targets, strict=True)
    ):
        return (exact, binding), Miss()
    return None, matcher.miss


def _aligned(pattern: Pattern, exact: Pattern) -> list[Node]:
    """The general pattern's anchors in the order of the exact pattern's: same outputs, same effects by position."""
    effects = [a for a in pattern.gm.graph.nodes if a in pattern.anchors and a not in pattern.outputs]
    exact_effects = [a for a in exact.gm.graph.nodes if a in exact.anchors and a not in exact.outputs]
    pairs = dict(zip((*exact.outputs, *exact_effects), (*pattern.outputs, *effects), strict=False))
    return [pairs[a] for a in exact.anchors if a in pairs]


def obstacle(gm: GraphModule, pattern: Pattern, binding: Binding) -> str | None:
    """Why the matched nodes cannot become one node, if so."""
    inside = {t for p, t in binding.nodes.items() if p.op == "call_function"}
    kept = {binding.nodes[p] for p in pattern.outputs}
    for node in inside - kept:
        outside = [u for u in node.users if u not in inside]
        if outside and node.target not in VIEWS and not mutated_args(node):
            return f"{node.name}, computed inside, is also used by {outside[0].name} ({location(outside[0])})"
    inputs = {binding.nodes[p] for p in pattern.inputs if p in binding.nodes}
    followers: dict[Node, list[Node]] = {}
    for node, edges in order_edges(gm.graph).items():
        for edge in edges:
            followers.setdefault(edge, []).append(node)
    solid = {n for n in inside if n in kept or mutated_args(n)} or inside
    seen, queue = set(solid), [n for s in solid for n in followers.get(s, ()) if n not in inside]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in inputs or node in inside:
            return f"{node.name} ({location(node)}) must run both after and before a part of it"
        queue += followers.get(node, ())
    return None


def replace(gm: GraphModule, op: str, spelling: Spelling, pattern: Pattern, binding: Binding) -> None:
    """Insert the operator, hand its results to the users, erase what it replaces, restore the order."""
    inside = [t for p, t in binding.nodes.items() if p.op == "call_function"]
    order, before = {node: i for i, node in enumerate(gm.graph.nodes)}, order_edges(gm.graph)
    last, like = max(inside, key=order.__getitem__), binding.nodes[pattern.anchors[0]]
    emit = Emitter(gm, last.next, like)
    known: dict[str, Any] = {name: binding.nodes[node] for node, name in pattern.inputs.items()}
    known |= binding.numbers | {k: v for k, v in spelling.examples.items() if v is None or isinstance(v, bool)}
    known |= spelling.fixed
    if spelling.adapt is not None:
        known = spelling.adapt(emit, known)
    fused = emit.call(OPS[op].overload, *(known[name] for name in parameters(OPS[op].reference)))
    fused.meta["fused_from"] = sorted({location(n) for n in inside})
    results = [binding.nodes[p] for p in pattern.outputs]
    for index, old in enumerate(results):
        new = fused
        if isinstance(fused.meta["val"], (tuple, list)):
            emit = Emitter(gm, fused.next, old)
            new = emit.call(operator.getitem, fused, index)
        old.replace_all_uses_with(new)
    for node in sorted(inside, key=order.__getitem__, reverse=True):
        if not node.users:
            gm.graph.erase_node(node)
    remove_dead(gm)
    if stuck := reorder(gm.graph, _edges_after(gm, before, set(inside), fused)):
        raise PassError(f"fusing {op} at {location(like)} left a cycle through {stuck.name}")


def _edges_after(
    gm: GraphModule, before: dict[Node, set[Node]], inside: set[Node], fused: Node
) -> dict[Node, set[Node]]:
    """The ordering edges of the graph as it was, with the fused node in the place of what it replaced."""
    alive = set(gm.graph.nodes)
    gone = inside - alive

    def moved(edges: set[Node]) -> set[Node]:
        return {fused if e in gone else e for e in edges if e in alive or e in gone}

    after = {node: moved(before.get(node, set())) | set(node.all_input_nodes) for node in gm.graph.nodes}
    for node in gone:
        after[fused] |= moved(before[node])
    after[fused].discard(fused)
    return after


def _module(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(list(stack.values()))), "") if stack else ""
