"""Structural matching of a pattern in a graph, with the reason and the place where a near match failed.

Two phases. The first ignores integers (sizes, bounds), binds inputs and reads numbers off the graph; it finds where a
pattern might be. The second traces the spelling again on the very shapes, dtypes and numbers found, and compares every
argument exactly; it proves that it is.

Terms:
    goal        a part of the pattern to be matched with a part of the graph.
    anchor      an output or an effect of the pattern; what a search starts from.
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

Goal = tuple[Any, Any, Node]  # part of the pattern, part of the graph, the graph node the latter belongs to


@dataclass
class Binding:
    """A match in the making: pattern node -> graph node, and the numbers read off."""

    nodes: dict[Node, Node] = field(default_factory=dict)
    numbers: dict[str, float | int | str] = field(default_factory=dict)

    def copy(self) -> Binding:
        return Binding(dict(self.nodes), dict(self.numbers))


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
        self.sentinels: dict[Any, str] = {} if exact else {v: k for k, v in pattern.numbers}

    def search(self, graph: Graph) -> Iterator[Iterator[Binding]]:
        """For each node that the first anchor may be, last one first: every way to match the whole pattern there."""
        first = self.pattern.anchors[0]
        for node in reversed(list(graph.nodes)):
            if not node._erased and node.op == "call_function" and node.target == first.target:
                yield self.complete([node], graph, Binding())

    def complete(self, places: list[Node], graph: Graph | None, binding: Binding) -> Iterator[Binding]:
        """Every match with the anchors at `places`; further anchors are looked for in `graph`."""
        yield from self._complete(0, places, graph, binding)

    def _complete(self, index: int, places: list[Node], graph: Graph | None, binding: Binding) -> Iterator[Binding]:
        if index == len(self.pattern.anchors):
            yield binding
            return
        anchor = self.pattern.anchors[index]
        if index < len(places):
            candidates = [places[index]]
        elif anchor in binding.nodes:
            candidates = [binding.nodes[anchor]]
        else:
            candidates = [] if graph is None else _candidates(anchor, graph, binding)
        for candidate in candidates:
            for found in self.solve([(anchor, candidate, candidate)], binding.copy()):
                yield from self._complete(index + 1, places, graph, found)

    def solve(self, goals: list[Goal], b: Binding) -> Iterator[Binding]:
        """Every extension of b that reaches all goals; the last goal comes first."""
        while goals:
            ways = self.reduce(*goals.pop(), b)
            if not ways:
                return
            for way in ways[:-1]:
                yield from self.solve([*goals, *way], b.copy())
            goals += ways[-1]
        yield b

    def reduce(self, p: Any, t: Any, at: Node, b: Binding) -> list[list[Goal]]:
        """The ways to reach one goal, each as the goals that remain; none if it cannot be reached."""
        if isinstance(p, Node):
            if isinstance(t, Node):
                return self.nodes(p, t, b)
            return self.check(not self.exact and isinstance(t, int), b, at, f"expected {p.name}, found {t!r}")
        if isinstance(p, dict):
            same = isinstance(t, dict) and p.keys() == t.keys()
            return [_goals((p[k], t[k], at) for k in p)] if same else self.check(False, b, at, f"found {t!r}")
        if isinstance(p, (list, tuple)):
            if not self.exact and isinstance(t, list) and all(isinstance(x, int) for x in p):
                return [[]]  # sizes: their number depends on the rank
            if not isinstance(t, (list, tuple)) or len(p) != len(t):
                return self.check(False, b, at, f"expected {len(p)} arguments, found {t!r}")
            return [_goals((x, y, at) for x, y in zip(p, t, strict=True))]
        return self.literal(p, t, b, at)

    def nodes(self, p: Node, t: Node, b: Binding) -> list[list[Goal]]:
        """Match pattern node p with graph node t."""
        if p in b.nodes:
            # At another place than the anchors before it, most often: no news of how near this one is.
            at = b if b.nodes[p] is t else Binding()
            return self.check(b.nodes[p] is t, at, t, f"{p.name} is already {b.nodes[p].name}, not {t.name}")
        if p.op == "placeholder":
            tensor = isinstance(t.meta.get("val"), torch.Tensor)
            b.nodes[p] = t
            return self.check(tensor, b, t, f"expected a tensor, found {t.name}")
        if t.op != "call_function" or p.target != t.target:
            found = op_name(t.target) if t.op == "call_function" else f"{t.op} {t.name}"
            return self.check(False, b, t, f"expected {op_name(p.target)}, found {found}")
        if _same_size(p, t):
            return [[]]
        b.nodes[p] = t
        if self.exact and p.target is aten.reshape.default:
            # Sizes may be asked for in many ways; what comes out is what counts.
            shapes = [tuple(map(str, n.meta["val"].shape)) for n in (p, t)]
            same = shapes[0] == shapes[1]
            return [[(p.args[0], t.args[0], t)]] if same else self.check(False, b, t, f"its shape is {shapes[1]}")
        orders = [t.args]
        if p.target in COMMUTATIVE and len(p.args) == len(t.args) == 2:
            either = [t.args, (t.args[1], t.args[0])]
            orders = [o for o in either if all(map(self.plausible, p.args, o, (b, b)))]
            orders = orders or [max(either, key=lambda o: sum(map(_both_computed, p.args, o)))]
        return [[(p.kwargs, t.kwargs, t), (p.args, order, t)] for order in orders]

    def plausible(self, p: Any, t: Any, b: Binding) -> bool:
        """A look ahead of one step, so that most commutative operations leave one order."""
        if not isinstance(p, Node) or not isinstance(t, Node):
            return not isinstance(p, Node) and not isinstance(t, Node)
        if p in b.nodes:
            return b.nodes[p] is t
        return p.op == "placeholder" or (t.op == "call_function" and p.target == t.target)

    def literal(self, p: Any, t: Any, b: Binding, at: Node) -> list[list[Goal]]:
        """Match a constant of the pattern; a sentinel takes the number or text of the graph, once."""
        if isinstance(p, str) and isinstance(t, str) and p in self.sentinels:
            text = b.numbers.setdefault(self.sentinels[p], t)
            return self.check(text == t, b, at, f"{self.sentinels[p]} is {text!r} and {t!r}")
        number = isinstance(t, (int, float)) and not isinstance(t, bool)
        for sign in (1, -1):
            if number and isinstance(p, (int, float)) and not isinstance(p, bool) and sign * p in self.sentinels:
                name, value = self.sentinels[sign * p], sign * (t if isinstance(p, int) else float(t))
                known = b.numbers.setdefault(name, value)
                return self.check(known == value, b, at, f"{name} is {known} and {value}")
        integer = isinstance(p, int) and not isinstance(p, bool) and isinstance(t, (int, Node))
        dtypes = isinstance(p, torch.dtype) and isinstance(t, torch.dtype)
        if not self.exact and (integer or dtypes):
            return [[]]
        same = type(p) is type(t) and p == t
        return self.check(same or (number and _number(p) and p == t), b, at, f"expected {p!r}, found {t!r}")

    def check(self, holds: bool, b: Binding, t: Node, reason: str) -> list[list[Goal]]:
        """Nothing remains to be matched if it holds; else note the miss."""
        if holds:
            return [[]]
        depth = sum(n.op == "call_function" for n in b.nodes) if len(b.nodes) >= self.miss.depth else -1
        if depth >= self.miss.depth:
            self.miss = Miss(depth, location(t), f"at {t.name}: {reason}")
        return []


def _goals(goals: Iterator[Goal]) -> list[Goal]:
    """In the order in which the solver takes them, which is from the end."""
    return list(goals)[::-1]


def _both_computed(p: Any, t: Any) -> bool:
    return all(isinstance(n, Node) and n.op == "call_function" for n in (p, t))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _same_size(p: Node, t: Node) -> bool:
    """Symbolic sizes are equal by expression, whichever tensor they were read from."""
    a, b = p.meta.get("val"), t.meta.get("val")
    return isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and str(a) == str(b)


def _candidates(anchor: Node, graph: Graph, binding: Binding) -> list[Node]:
    """Graph nodes that may be a further anchor: users of what its inputs are bound to, else any of its kind."""
    taken = set(binding.nodes.values())
    bound = [binding.nodes[n] for n in anchor.all_input_nodes if n in binding.nodes]
    pool = list(bound[0].users) if bound else reversed(list(graph.nodes))
    return [n for n in pool if n.op == "call_function" and n.target == anchor.target and n not in taken]
