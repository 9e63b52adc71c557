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
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from atomc.ops import OPS
from atomc.passes.canonicalize import remove_dead
from atomc.passes.graph import (
    PassError,
    base_of,
    copy_provenance,
    location,
    mutated_args,
    order_edges,
    quiet,
    reorder,
    value_of,
)
from atomc.passes.match import Binding, Matcher, Miss
from atomc.passes.pattern import Fixed, Pattern, Spelling, exact, general, parameters
from atomc.passes.runner import Context, Match, Pass, Refusal, Report

DTYPES = (torch.float32, torch.bfloat16)
NEAREST = 3  # candidates that are named where a promised match is missing
SKIPS = 2  # operations by which the nearest candidate may differ on any path
WAYS = 64  # of completing a match at one place that are tried; more than a few means a pattern of no structure

Proof = tuple[Pattern, Binding]


class Emitter:
    """Inserts calls before a node and gives them fake values."""

    def __init__(self, gm: GraphModule, before: Node, like: Node) -> None:
        self.gm, self.before, self.like = gm, before, like

    def call(self, target: Any, *args: Any) -> Node:
        """`target(*args)` as a new node with its fake value and the provenance of what it replaces."""
        with self.gm.graph.inserting_before(self.before):
            node = self.gm.graph.call_function(target, args)
        with quiet(n.meta.get("val") for n in self.gm.graph.nodes), torch.no_grad():
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
        report = Report()
        for spelling, fixed, pattern in self._patterns(gm):
            self._rewrite_all(gm, spelling, fixed, pattern, report)
        if len(report.matches) < ctx.expected.get(self.label, 0):
            report.refusals += self._nearest(gm)
        return report

    def _patterns(self, gm: GraphModule) -> Iterator[tuple[Spelling, Fixed, Pattern]]:
        for spelling in self.spellings:
            for fixed in spelling.choices(gm.graph):
                for pattern in _general_patterns(spelling, fixed):
                    yield spelling, fixed, pattern

    def _rewrite_all(self, gm: GraphModule, spelling: Spelling, fixed: Fixed, pattern: Pattern, report: Report) -> None:
        """Rewrite at every place the pattern fits; note where it fits and cannot be rewritten."""
        for ways in Matcher(pattern).search(gm.graph):
            refusal = None
            for found in islice(ways, WAYS):
                proof, _ = prove(spelling, fixed, pattern, found)
                if proof is None:
                    continue
                anchor = proof[1].nodes[proof[0].anchors[0]]
                where, module = location(anchor), _module(anchor)
                before = order_edges(gm.graph)
                reason = obstacle(before, spelling.shared, *proof)
                if reason is None:
                    replace(gm, self.op, spelling, fixed, *proof, before)
                    report.matches.append(Match(where, f"{module} [{spelling.source}]".strip()))
                    refusal = None
                    break
                refusal = refusal or Refusal(where, reason)
            if refusal is not None:
                report.refusals.append(refusal)

    def _nearest(self, gm: GraphModule) -> list[Refusal]:
        """The places that have most in common with a spelling, and where each parts from it; the nearest first."""
        found: dict[Refusal, tuple[int, int]] = {}
        for spelling, fixed, pattern in self._patterns(gm):
            memo: dict[tuple[Node, Node, int], int] = {}
            whole = _alike(pattern.anchors[0], pattern.anchors[0], 0, {})
            for node in gm.graph.nodes:
                if node.op == "call_function" and node.target == pattern.anchors[0].target:
                    miss = _miss_at(node, gm, spelling, fixed, pattern)
                    common = _alike(pattern.anchors[0], node, SKIPS, memo)
                    near = common - whole + miss.depth, miss.depth
                    refusal = Refusal(miss.where, f"nearest candidate, {miss.reason}")
                    found[refusal] = max(near, found.get(refusal, near))
        nearest = sorted(found, key=lambda r: found[r], reverse=True)[:NEAREST]
        return nearest or [Refusal("?", f"the graph has no operation that {self.op} could end with")]


def _alike(p: Node, t: Node, skips: int, memo: dict[tuple[Node, Node, int], int]) -> int:
    """How many operations two trees have in common, in the same places, some being left out of either."""
    if p.op != "call_function" or t.op != "call_function":
        return 0
    if (p, t, skips) in memo:
        return memo[p, t, skips]
    best = 0
    if p.target == t.target:
        ours, theirs = p.all_input_nodes, t.all_input_nodes
        straight = sum(_alike(a, b, skips, memo) for a, b in zip(ours, theirs, strict=False))
        crossed = sum(_alike(a, b, skips, memo) for a, b in zip(ours, reversed(theirs), strict=False))
        best = 1 + max(straight, crossed)
    if skips:
        best = max(best, *(_alike(p, b, skips - 1, memo) for b in t.all_input_nodes), 0)
        best = max(best, *(_alike(a, t, skips - 1, memo) for a in p.all_input_nodes), 0)
    memo[p, t, skips] = best
    return best


def _miss_at(node: Node, gm: GraphModule, spelling: Spelling, fixed: Fixed, pattern: Pattern) -> Miss:
    """Why the pattern does not fit at this place."""
    matcher = Matcher(pattern)
    for found in islice(matcher.complete([node], gm.graph, Binding()), WAYS):
        proof, miss = prove(spelling, fixed, pattern, found)
        if proof is not None:
            return Miss(pattern.size, location(node), "it fits, and is refused for the reason above")
        matcher.miss = Miss(pattern.size + miss.depth, miss.where, miss.reason)  # it looks alike, and is not equal
    return matcher.miss


def _general_patterns(spelling: Spelling, fixed: Fixed) -> list[Pattern]:
    """One pattern per compute dtype whose graphs differ, the one with casts first.

    In fp32 the casts vanish, and what is left would also fit between the casts of a bf16 graph.
    """
    patterns = sorted((general(spelling, fixed, dtype) for dtype in DTYPES), key=lambda p: -p.size)
    return patterns if patterns[0].size != patterns[1].size else patterns[:1]


def prove(spelling: Spelling, fixed: Fixed, pattern: Pattern, found: Binding) -> tuple[Proof | None, Miss]:
    """Trace the spelling on what was found and compare exactly; the exact pattern with its binding, or the miss."""
    bound = {name: found.nodes[node] for node, name in pattern.inputs.items() if node in found.nodes}
    anchor = found.nodes[pattern.anchors[0]]
    try:
        proven = exact(spelling, fixed, {name: node.meta["val"] for name, node in bound.items()}, found.numbers)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        # Shapes for which the mathematics is not defined: the structure was alike by chance.
        return None, Miss(1, location(anchor), f"the reference rejects these shapes: {error}")
    binding = Binding({node: bound[name] for node, name in proven.inputs.items()}, dict(found.numbers))
    matcher = Matcher(proven, exact=True)
    places = [found.nodes[p] for p in _aligned(pattern, proven)]
    if len(places) == len(proven.anchors) == len(pattern.anchors):
        for complete in matcher.complete(places, None, binding):
            return (proven, complete), Miss()
    return None, matcher.miss


def _aligned(pattern: Pattern, proven: Pattern) -> list[Node]:
    """The general pattern's anchors in the order of the exact pattern's: same outputs, same effects by position."""
    effects = [a for a in pattern.gm.graph.nodes if a in pattern.anchors and a not in pattern.outputs]
    exact_effects = [a for a in proven.gm.graph.nodes if a in proven.anchors and a not in proven.outputs]
    pairs = dict(zip((*proven.outputs, *exact_effects), (*pattern.outputs, *effects), strict=False))
    return [pairs[a] for a in proven.anchors if a in pairs]


def obstacle(before: dict[Node, set[Node]], shared: frozenset[Any], pattern: Pattern, binding: Binding) -> str | None:
    """Why the matched nodes cannot become one node, if so; `before` is the order they are in.

    A result of the inside may be used elsewhere only if it is a view of an input or made by the operators `shared`.
    """
    inside = {t for p, t in binding.nodes.items() if p.op == "call_function"}
    kept = {binding.nodes[p] for p in pattern.outputs}
    inputs = {binding.nodes[p] for p in pattern.inputs if p in binding.nodes}
    staying: set[Node] = set()
    for node in inside - kept:
        outside = [u for u in node.users if u not in inside]
        if outside and not mutated_args(node):
            staying |= _with_ancestors(node, inside)
            if not all(n.target in shared or base_of(n) not in inside for n in staying):
                return f"{node.name}, computed inside, is also used by {outside[0].name} ({location(outside[0])})"
    going = inside - staying
    followers: dict[Node, list[Node]] = {}
    for node, edges in before.items():
        for edge in edges:
            followers.setdefault(edge, []).append(node)
    queue = [n for s in going for n in followers.get(s, ()) if n not in inside]
    seen: set[Node] = set()
    while queue:  # what must run after a part of the match, along paths that leave it
        between = queue.pop()
        if between in inputs or any(n in going for n in followers.get(between, ())):
            return f"{between.name} ({location(between)}) must run both after and before a part of it"
        if between not in seen:
            seen.add(between)
            queue += followers.get(between, ())
    return None


def _with_ancestors(node: Node, inside: set[Node]) -> set[Node]:
    seen, queue = {node}, [node]
    while queue:
        found = [n for n in queue.pop().all_input_nodes if n in inside and n not in seen]
        seen.update(found)
        queue += found
    return seen


def replace(
    gm: GraphModule,
    op: str,
    spelling: Spelling,
    fixed: Fixed,
    pattern: Pattern,
    binding: Binding,
    before: dict[Node, set[Node]],
) -> None:
    """Insert the operator, hand its results to the users, erase what it replaces, restore the order."""
    inside = list(dict.fromkeys(t for p, t in binding.nodes.items() if p.op == "call_function"))
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    last, like = max(inside, key=order.__getitem__), binding.nodes[pattern.anchors[0]]
    emit = Emitter(gm, last.next, like)
    known: dict[str, Any] = {name: binding.nodes[node] for node, name in pattern.inputs.items()}
    known |= binding.numbers | spelling.constants | dict(fixed)
    if spelling.adapt is not None:
        known = spelling.adapt(emit, known)
    overload = OPS[op].overload
    fused = emit.call(overload, *_given(overload, [known[name] for name in parameters(OPS[op].reference)]))
    fused.meta["fused_from"] = sorted({location(n) for n in inside})
    for index, old in enumerate([binding.nodes[p] for p in pattern.outputs]):
        new = fused
        if isinstance(fused.meta["val"], (tuple, list)):
            new = Emitter(gm, fused.next, old).call(operator.getitem, fused, index)
        _take_over(op, old, new)
    for node in sorted(inside, key=order.__getitem__, reverse=True):
        if not node.users:
            gm.graph.erase_node(node)
    remove_dead(gm)
    if stuck := reorder(gm.graph, _edges_after(gm, before, set(inside), fused)):
        raise PassError(f"fusing {op} at {location(like)} left a cycle through {stuck.name}")


def _given(overload: torch._ops.OpOverload, arguments: list[Any]) -> list[Any]:
    """Arguments without trailing defaults, as canonical calls are."""
    while arguments and not isinstance(arguments[-1], Node):
        schema = overload._schema.arguments[len(arguments) - 1]
        if not schema.has_default_value() or schema.default_value != arguments[-1]:
            break
        arguments.pop()
    return arguments


def _take_over(op: str, old: Node, new: Node) -> None:
    """Hand a result's users and its value (which says what aliases it) to the node that replaces it."""
    was, now = (n.meta["val"] for n in (old, new))
    if was.dtype != now.dtype or tuple(map(str, was.shape)) != tuple(map(str, now.shape)):
        raise PassError(
            f"fusing {op} at {location(old)}: {old.name} is {was.dtype} {list(was.shape)}, the operator gives "
            f"{now.dtype} {list(now.shape)}. The spelling does not say what the operator's reference computes."
        )
    new.meta["val"] = was
    old.replace_all_uses_with(new)


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
