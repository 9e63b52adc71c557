"""WideLinears: a linear layer in fp32 reads its operands as they are stored, where a kernel widens them in registers.

Contract: the values are unchanged: bf16 is exact in fp32. Without it a step would write each input in fp32, and the
weights, expanded when they are loaded, would take twice the memory and twice the time to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from atomc.passes.fuse import Emitter
from atomc.passes.graph import aten, calls, location
from atomc.passes.runner import Context, Match, Pass, Report

atom = torch.ops.atom


@dataclass(frozen=True)
class WideLinears(Pass):
    """See the module's contract."""

    name: ClassVar[str] = "wide_linears"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "values"})

    def run(self, gm: GraphModule, ctx: Context) -> Report:
        report = Report()
        for node in [n for n in calls(gm.graph) if n.target is aten.linear.default and len(n.args) == 2]:
            if node.meta["val"].dtype != torch.float32:
                continue
            stored = [_stored(operand) for operand in node.args]
            if stored == list(node.args):
                continue
            new = Emitter(gm, node, node).call(atom.linear_fp32.default, *stored)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            report.matches.append(Match(location(new), ctx.module_paths.get(str(new.args[1]), "")))
        return report


def _stored(operand: object) -> object:
    """What an operand is widened from, if it is bf16."""
    if isinstance(operand, Node) and operand.target is aten.to.dtype and isinstance(operand.args[0], Node):
        source = operand.args[0]
        return source if source.meta["val"].dtype == torch.bfloat16 else operand
    return operand
