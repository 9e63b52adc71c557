"""CancelQuantize: round each activation once, and not again what is rounded already.

Contract: every value a product reads is unchanged. Two equal `quantize` of one tensor become one. A `quantize` of what
`dequantize` gave in the same layout gives the pair that is there already.

Why the second is exact: within a block of a layout whose scales are powers of two, rounded up, the rounded values lie
on the scale's grid and their largest magnitude is at most the top. Quantised again, the scale is the same or smaller,
and every value lies on the finer grid too: the values do not change (tests/formats: exhaustive over all codes). A
layout with float32 scales has no such grid, and one whose top is no value of its element may round past it; their
pairs stay.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from atomc.formats import Layout
from atomc.passes.canonicalize import merge_equal, remove_dead
from atomc.passes.graph import calls, location
from atomc.passes.runner import Context, Match, Pass, Refusal, Report

atom = torch.ops.atom


@dataclass(frozen=True)
class CancelQuantize(Pass):
    """See the module's contract."""

    name: ClassVar[str] = "cancel_quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "values"})

    def run(self, gm: GraphModule, ctx: Context) -> Report:
        report = Report()
        for node in [n for n in calls(gm.graph) if n.target is atom.quantize.default]:
            pair = _pair_behind(node)
            if pair is None:
                continue
            if reason := _off_grid(Layout.parse(str(node.args[1]))):
                report.refusals.append(Refusal(location(node), f"{node.args[1]}: {reason}"))
                continue
            for user in list(node.users):
                user.replace_all_uses_with(pair[int(user.args[1])])  # type: ignore[arg-type]
                gm.graph.erase_node(user)
            report.matches.append(Match(location(node), f"already {node.args[1]}"))
            gm.graph.erase_node(node)
        before = [n for n in calls(gm.graph) if n.target is atom.quantize.default]
        merge_equal(gm)
        remove_dead(gm)
        left = {n for n in gm.graph.nodes if n.op == "call_function"}
        gone = [n for n in before if n not in left]
        report.matches += [Match(location(n), f"one rounding for several readers: {n.args[1]}") for n in gone]
        return report


def _pair_behind(node: Node) -> tuple[Node, Node] | None:
    """Codes and scales of which `quantize` reads the dequantised values, in the layout it asks for."""
    source, layout = node.args[:2]
    if not isinstance(source, Node) or source.target is not atom.dequantize.default or source.args[2] != layout:
        return None
    codes, scales = source.args[:2]
    made = all(isinstance(n, Node) and (n.target is operator.getitem or n.op == "placeholder") for n in (codes, scales))
    return (codes, scales) if made and isinstance(codes, Node) and isinstance(scales, Node) else None


def _off_grid(layout: Layout) -> str:
    """Why rounding twice may move a value; empty if it cannot."""
    if layout.scale == "float32":
        return "float32 scales: rounding twice may move a value"
    top = torch.tensor([layout.top] * layout.element.packed)
    if not torch.equal(layout.element.decode(layout.element.encode(top)), top):
        return f"{layout.top:g} is no value of {layout.element.name}: rounding twice may move a value"
    return ""
