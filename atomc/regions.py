"""A region after its passes, and its plan."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec
from torch.fx import GraphModule

from atomc.artifact.order import buckets_of
from atomc.artifact.plan import RegionPlan, Role, carried, of_batch
from atomc.capture import Region
from atomc.codegen.device import Variant
from atomc.codegen.lower import Lowering
from atomc.parallel.sizes import AGREED, STEP, of_half, of_region
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
    region, halves = compiled.region, compiled.ctx.chunked is not None
    inputs, outputs, symbols = _in_halves(compiled) if halves else _whole(compiled)
    bounds = of_region(bounds, halves)
    most = bounds[of_half("T", 0) if halves else "T"]
    lowering = Lowering(
        region.name, region.gm, inputs, outputs, symbols, bounds, location, target,
        buckets_of(most) if target.is_gpu else (),
    )  # fmt: skip
    plan = lowering.run()
    return (msgspec.structs.replace(plan, halves=True) if halves else plan), lowering.variants


def sizes_of(compiled: Compiled) -> dict[str, str]:
    """Size symbol of the region's graph -> that of its plan."""
    return (_whole(compiled) if compiled.ctx.chunked is None else _in_halves(compiled))[2]


Names = tuple[dict[str, tuple[Role, str]], list[str], dict[str, str]]  # of inputs, by placeholder; results; sizes


def _whole(compiled: Compiled) -> Names:
    region, ctx = compiled.region, compiled.ctx
    given = {str(n.meta["val"]): ctx.sizes[n.name] for n in region.gm.graph.nodes if n.name in ctx.sizes}
    return dict(_inputs(compiled)), region.outputs, region.symbols | given


def _inputs(compiled: Compiled) -> Iterator[tuple[str, tuple[Role, str]]]:
    yield from ((i.placeholder, (i.role, i.name)) for i in compiled.region.inputs if i.role != "weight")
    for placeholder, path in compiled.ctx.module_paths.items():
        yield placeholder, ("weight", path)


def _in_halves(compiled: Compiled) -> Names:
    """What is there once for each micro-batch has its name twice; what goes over a border has its number."""
    region, ctx, chunked = compiled.region, compiled.ctx, compiled.ctx.chunked
    assert chunked is not None
    inputs: dict[str, tuple[Role, str]] = {}
    for placeholder, (role, name) in _inputs(compiled):
        if placeholder in chunked.inputs:
            inputs |= {p: (role, of_batch(name, half)) for half, p in enumerate(chunked.inputs[placeholder])}
        else:
            inputs[placeholder] = role, name
    inputs |= {placeholder: ("value", carried(at)) for at, placeholder in enumerate(chunked.given)}
    stays = range(chunked.results) if chunked.second is None else chunked.second
    outputs = [of_batch(name, 0) for name in region.outputs]
    outputs += [of_batch(region.outputs[at], 1) for at in stays] + [carried(at) for at in range(chunked.carried)]

    def meaning(name: str, half: int) -> str:
        return of_half(name, half) if name in (*STEP, AGREED) else name

    symbols = {graph: meaning(plan, 0) for graph, plan in region.symbols.items()}
    symbols |= {t: meaning(region.symbols[g], 1) for g, t in chunked.symbols.items() if g in region.symbols}
    symbols |= {graph: meaning(plan, 1) for graph, plan in chunked.given_sizes.items()}
    values = {n.name: str(n.meta["val"]) for n in region.gm.graph.nodes if n.op == "placeholder" and "val" in n.meta}
    for placeholder, name in ctx.sizes.items():
        for half, p in enumerate(chunked.inputs.get(placeholder, (placeholder,))):
            symbols[values[p]] = meaning(name, half)
    return inputs, outputs, symbols
