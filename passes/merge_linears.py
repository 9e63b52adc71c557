"""MergeLinears: linear layers that read the same input become one, their weights concatenated (spec 6.1 K6, K7).

Contract: the outputs are the same rows of a larger product; only the order of summation inside a library GEMM may
change. The new weight is a recipe: Concat of the old ones along the output dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from atomc.passes.canonicalize import END
from atomc.passes.fuse import Emitter
from atomc.passes.graph import aten, location, quiet
from atomc.passes.runner import Context, Match, Pass, Refusal, Report
from atomc.recipes import Concat, joined


@dataclass(frozen=True)
class MergeLinears(Pass):
    """`groups`: names of sibling layers to merge, as they end in the model's parameter names."""

    name: ClassVar[str] = "merge_linears"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "values"})
    groups: tuple[tuple[str, ...], ...]

    def run(self, gm: GraphModule, ctx: Context) -> Report:
        report = Report()
        siblings: dict[tuple[str, tuple[str, ...]], dict[str, Node]] = {}
        for node in gm.graph.nodes:
            path = _weight_path(node, ctx)
            if path is None:
                continue
            for group in self.groups:
                for leaf in group:
                    if path == leaf or path.endswith(f".{leaf}"):
                        siblings.setdefault((path.removesuffix(leaf), group), {})[leaf] = node
        for (parent, group), found in siblings.items():
            nodes = [found[leaf] for leaf in group if leaf in found]
            name = joined(parent + leaf for leaf in group)
            if reason := _obstacle(group, nodes):
                report.refusals.append(Refusal(location(nodes[0]), f"{name}: {reason}"))
                continue
            _merge(gm, ctx, name, nodes)
            report.matches.append(Match(location(nodes[0]), name))
        return report


def _weight_path(node: Node, ctx: Context) -> str | None:
    """The parameter path of a linear node's weight, without `.weight`."""
    if node.target is not aten.linear.default or len(node.args) != 2 or not isinstance(node.args[1], Node):
        return None
    path = ctx.module_paths.get(node.args[1].name)
    return path.removesuffix(".weight") if path else None


def _obstacle(group: tuple[str, ...], nodes: list[Node]) -> str | None:
    if len(nodes) < len(group):
        return f"only {len(nodes)} of {len(group)} are present"
    if len({n.args[0] for n in nodes}) > 1:
        return "they read different inputs"
    weights = [w for n in nodes if isinstance(w := n.args[1], Node)]
    if len({w.meta["val"].dtype for w in weights}) > 1:
        return "their weights have different dtypes"
    if used := next((w for w in weights if len(w.users) > 1), None):
        return f"{used.name} is used elsewhere too"
    return None


def _merge(gm: GraphModule, ctx: Context, path: str, nodes: list[Node]) -> None:
    """One product at the place of the earliest; its slices take the places of the others."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    first = min(nodes, key=order.__getitem__)
    weights = [n.args[1] for n in nodes if isinstance(n.args[1], Node)]
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        weight = gm.graph.placeholder("p_" + path.replace(".", "_").replace("|", "_or_"))
    with quiet(w.meta["val"] for w in weights):
        weight.meta["val"] = torch.cat([w.meta["val"] for w in weights])
    ctx.weights[weight.name] = Concat(tuple(ctx.weights.pop(w.name) for w in weights), dim=0)
    ctx.module_paths[weight.name] = path + ".weight"
    product = Emitter(gm, first, first).call(aten.linear.default, first.args[0], weight)
    start, total = 0, weight.meta["val"].shape[0]
    for node, old in zip(nodes, weights, strict=True):
        stop = start + old.meta["val"].shape[0]
        part = Emitter(gm, first, node).call(aten.slice.Tensor, product, -1, start, END if stop == total else stop)
        node.replace_all_uses_with(part)
        start = stop
    for node, old in zip(nodes, weights, strict=True):
        gm.graph.erase_node(node)
        gm.graph.erase_node(old)
        ctx.module_paths.pop(old.name, None)
