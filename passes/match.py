"""Structural matching of a pattern in a graph, with the reason and the place where a near match failed.

Two phases. The first ignores integers (sizes, bounds), binds inputs and reads numbers off the graph; it finds where a
pattern might be. The second traces the spelling again on the very shapes, dtypes and numbers found, and compares every
argument exactly; it proves that it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from atomc.passes.graph import aten, location, op_name
from atomc.passes.pattern import Pattern

COMMUTATIVE = frozenset({aten.add.Tensor, aten.mul.Tensor})


@dataclass
class Binding:
    """A match in the making: pattern node -> graph node, and the numbers read off."""

    nodes: dict[Node, Node] = field(default_factory=dict)
    numbers: dict[str, float | int] = field(default_factory=dict)

    def copy(self) -> Binding:
        return Binding(dict(self.nodes), dict(self.numbers))

    def become(self, other: Binding) -> None:
        self.nodes, self.numbers = other.nodes, other.numbers


@dataclass
class Miss:
    """The furthest a search got: how many operations agreed, where it stopped, and why."""

    depth: int = 0
    where: str = "?"
    reason: str = "no operation of this kind"


class Matcher:
    """Searches one pattern; `exact` compares integers too."""

    def __init__(self, pattern: Pattern, exact: bool = False) -> None:
        self.pattern, self.exact = pattern, exact
        self.miss = Miss()
        self.sentinels = {} if exact else {v: k for k, v in pattern.numbers}

    def search(self, graph: Graph) -> Iterator[Iterator[Binding]]:
        """For each place the first anchor fits, last place first: the ways to complete the match."""
        first = self.pattern.anchors[0]
        for node in reversed(list(graph.nodes)):
            if not node._erased and node.op == "call_function" and node.target == first.target:
                binding = Binding()
                if self.node(first, node, binding):
                    yield self.rest(1, graph, binding)

    def rest(self, index: int, graph: Graph, binding: Binding) -> Iterator[Binding]:
        """Match the anchors from `index` on, with each candidate that fits."""
        if index == len(self.pattern.anchors):
            yield binding
            return
        anchor = self.pattern.anchors[index]
        if anchor in binding.nodes:
            yield from self.rest(index + 1, graph, binding)
            return
        for candidate in _candidates(anchor, graph, binding):
            trial = binding.copy()
            if self.node(anchor, candidate, trial):
                yield from self.rest(index + 1, graph, trial)

    def node(self, p: Node, t: Node, b: Binding) -> bool:
        """Match pattern node p with graph node t, extending b."""
        if p in b.nodes:
            return b.nodes[p] is t or self.fail(b, t, f"{p.name} is already {b.nodes[p].name}, not {t.name}")
        if p.op == "placeholder":
            if not isinstance(t.meta.get("val"), torch.Tensor):
                return self.fail(b, t, f"expected a tensor, found {t.name}")
            b.nodes[p] = t
            return True
        if t.op != "call_function" or p.target != t.target:
            found = op_name(t.target) if t.op == "call_function" else f"{t.op} {t.name}"
            return self.fail(b, t, f"expected {op_name(p.target)}, found {found}")
        if self.same_size(p, t):
            return True
        trial = b.copy()
        if self.arguments(p.args, t.args, trial, t) and self.arguments(p.kwargs, t.kwargs, trial, t):
            trial.nodes[p] = t
            b.become(trial)
            return True
        if p.target in COMMUTATIVE and len(p.args) == 2 and len(t.args) == 2:
            trial = b.copy()
            if self.arguments(p.args, (t.args[1], t.args[0]), trial, t):
                trial.nodes[p] = t
                b.become(trial)
                return True
        return False

    def same_size(self, p: Node, t: Node) -> bool:
        """Symbolic sizes are equal by expression, whichever tensor they were read from."""
        a, b = p.meta.get("val"), t.meta.get("val")
        return isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and str(a) == str(b)

    def arguments(self, p: Any, t: Any, b: Binding, at: Node) -> bool:
        """Match two argument structures."""
        if isinstance(p, Node):
            if isinstance(t, Node):
                return self.node(p, t, b)
            return (not self.exact and isinstance(t, int)) or self.fail(b, at, f"expected {p.name}, found {t!r}")
        if isinstance(p, dict):
            return p.keys() == t.keys() and all(self.arguments(p[k], t[k], b, at) for k in p)
        if isinstance(p, (list, tuple)):
            if not self.exact and isinstance(t, list) and all(isinstance(x, int) for x in p):
                return True  # sizes: their number depends on the rank
            if not isinstance(t, (list, tuple)) or len(p) != len(t):
                return self.fail(b, at, f"expected {len(p)} arguments, found {t!r}")
            return all(self.arguments(x, y, b, at) for x, y in zip(p, t, strict=True))
        return self.literal(p, t, b, at)

    def literal(self, p: Any, t: Any, b: Binding, at: Node) -> bool:
        number = isinstance(t, (int, float)) and not isinstance(t, bool)
        if number and not isinstance(p, bool) and isinstance(p, (int, float)) and p in self.sentinels:
            name = self.sentinels[p]
            value = t if isinstance(p, int) else float(t)
            return b.numbers.setdefault(name, value) == value or self.fail(
                b, at, f"{name} is {b.numbers[name]} and {value}"
            )
        if number and (signed := -p if isinstance(p, float) else None) in self.sentinels and signed is not None:
            name = self.sentinels[signed]
            return b.numbers.setdefault(name, -float(t)) == -float(t) or self.fail(
                b, at, f"{name} is {b.numbers[name]} and {-float(t)}"
            )
        if not self.exact and isinstance(p, int) and not isinstance(p, bool) and isinstance(t, (int, Node)):
            return True
        same = p == t and isinstance(p, bool) == isinstance(t, bool)
        return same or self.fail(b, at, f"expected {p!r}, found {t!r}")

    def fail(self, b: Binding, t: Node, reason: str) -> bool:
        depth = sum(n.op == "call_function" for n in b.nodes)
        if depth >= self.miss.depth:
            self.miss = Miss(depth, location(t), f"at {t.name}: {reason}")
        return False


def _candidates(anchor: Node, graph: Graph, binding: Binding) -> list[Node]:
    """Graph nodes that may be a further anchor: users of what its inputs are bound to, else any of its kind."""
    taken = set(binding.nodes.values())
    bound = [binding.nodes[n] for n in anchor.all_input_nodes if n in binding.nodes]
    pool = list(bound[0].users) if bound else reversed(list(graph.nodes))
    return [n for n in pool if n.op == "call_function" and n.target == anchor.target and n not in taken]
