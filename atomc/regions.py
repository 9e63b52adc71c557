"""A region after its passes, and its plan."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import GraphModule

from atomc.artifact.order import buckets_of
from atomc.artifact.plan import RegionPlan
from atomc.capture import Input, Region
from atomc.codegen.device import Variant
from atomc.codegen.lower import Lowering
from atomc.passes.graph import location
from atomc.passes.runner import Context, Row
from atomc.targets import Target


@dataclass
class Compiled:
    """One region after its passes. `uncut`: as it was before a pass that cuts it for ranks would run."""

    region: Region
    ctx: Context
    rows: list[Row]
    uncut: tuple[GraphModule, Context] | None = None


def copy_context(ctx: Context) -> Context:
    """A context that passes may go on to change."""
    copied = copy.copy(ctx)
    for name, value in vars(ctx).items():
        setattr(copied, name, copy.copy(value) if isinstance(value, dict | list) else value)
    return copied


def lower(
    compiled: Compiled, bounds: Mapping[str, int], target: Target
) -> tuple[RegionPlan, dict[str, Variant]]:  # fmt: skip
    """The region's plan, and the kernels that it launches, by key; `bounds`: the largest value of each size."""
    region, ctx = compiled.region, compiled.ctx
    bound = [i for i in region.inputs if i.role != "weight"]
    bound += [Input(placeholder, "weight", path) for placeholder, path in ctx.module_paths.items()]
    inputs = {i.placeholder: (i.role, i.name) for i in bound}
    given = {str(n.meta["val"]): ctx.sizes[n.name] for n in region.gm.graph.nodes if n.name in ctx.sizes}
    lowering = Lowering(
        region.name, region.gm, inputs, region.outputs, region.symbols | given, bounds, location, target,
        buckets_of(bounds["T"]) if target.is_gpu else (),
    )  # fmt: skip
    return lowering.run(), lowering.variants
