"""A small random DeepSeek-V4 compiled for many ranks that are simulated in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from atomc.capture import Program, capture
from atomc.compiler import Options, check_limits, check_scheme, fuse, serving_facts, trace
from atomc.models.deepseek_v4.attention import AttentionState
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.model import DeepseekV4
from atomc.models.deepseek_v4.state import Paging
from atomc.models.source import open_model
from atomc.ops import Batch
from atomc.parallel.layout import Layout, parse_layout
from atomc.parallel.sizes import AGREED, INDEX
from atomc.passes import pipelines
from atomc.passes.runner import Context, run_pipeline
from atomc.passes.shard import Form
from atomc.ranks import Variant, cut_region
from atomc.recipes import Load, Recipe, TensorSpec, evaluate, instantiate, output_spec
from atomc.targets import get_target
from tests.support.eager import randomise
from tests.support.ranks import rank_recipe, run_ranks
from tests.support.v4_configs import tiny

CONFIG = tiny(
    compress_ratios=[0, 16, 4, 4], num_hash_layers=2, hidden_size=48, n_routed_experts=12,
    vocab_size=64, hc_sinkhorn_iters=3, num_attention_heads=8, o_groups=4, moe_intermediate_size=32,
)  # fmt: skip
CONTEXT, LONGEST = 64, 48
TABLES = (
    -(-(CONFIG.sliding_window + LONGEST) // Paging.of(CONFIG).window_page) + 1,
    -(-CONTEXT // Paging.of(CONFIG).block_tokens),
)


@cache
def captured(dtype: torch.dtype = torch.float32) -> Program:
    return capture(CONFIG, dtype, TABLES)


@cache
def model(hot: bool = False) -> DeepseekV4:
    """`hot`: the router sends all tokens to the same experts."""
    with torch.no_grad():
        found = DeepseekV4(CONFIG, torch.float32)
        randomise(found, 0)
        for name, parameter in found.named_parameters():
            if hot and name.endswith("gate.bias"):
                parameter[:3] += 100
            elif hot and name.endswith("tid2eid"):
                parameter[:] = torch.arange(CONFIG.num_experts_per_tok)
    return found


Weights = Callable[[str, str, Recipe], tuple[Recipe, Callable[[str], Tensor]]]


def of_model(hot: bool) -> Weights:
    """Recipes over the parameters of a region's module."""

    def weights(region: str, prefix: str, recipe: Recipe) -> tuple[Recipe, Callable[[str], Tensor]]:
        return recipe, model(hot).get_submodule(prefix.rstrip(".") or region).get_parameter

    return weights


@dataclass
class Compiled:
    """The regions of a program after the pipeline, for one rank or for many.

    `weights`: (region, prefix, recipe) -> the recipe of that call, and what loads its sources.
    """

    layout: Layout
    program: Program
    graphs: dict[str, GraphModule]
    contexts: dict[str, Context]
    weights: Weights

    def of_rank(self, region: str, prefix: str, rank: int) -> dict[str, Tensor]:
        """The rank's parts of the weights of a call, by placeholder."""
        ctx, found = self.contexts[region], {}
        for placeholder, recipe in ctx.weights.items():
            known, load = self.weights(region, prefix, recipe)

            def spec_of(r: Recipe, load: Callable[[str], Tensor] = load) -> TensorSpec:
                return output_spec(r, lambda n: TensorSpec(tuple((p := load(n)).shape), p.dtype))

            if self.layout.ranks > 1:
                known = rank_recipe(known, ctx.placements[placeholder], self.layout.mesh, rank, spec_of)
            found[placeholder] = evaluate(known, load)
        return found

    def sizes(self, ctx: Context, rows: int, rank: int) -> dict[str, int]:
        """The sizes that are given to a rank, by placeholder."""
        mesh = self.layout.mesh
        index = dict(zip((INDEX[a] for a in mesh.names), mesh.coordinate(rank), strict=True))
        return {placeholder: {AGREED: rows, **index}[symbol] for placeholder, symbol in ctx.sizes.items()}

    def step(self, batches: list[Batch], states: list[list[AttentionState]], rows: int) -> list[Tensor]:
        """Logits on every rank."""
        regions = {r.name: r for r in self.program.regions}
        ranks = range(self.layout.ranks)
        values: list[dict[str, Any]] = [{} for _ in ranks]
        for call in self.program.calls:
            region, ctx = regions[call.region], self.contexts[call.region]
            given: list[dict[str, Any]] = []
            for rank in ranks:
                mine: dict[str, Any] = self.sizes(ctx, rows, rank) | self.of_rank(call.region, call.prefix, rank)
                for i in region.inputs:
                    if i.role == "batch":
                        mine[i.placeholder] = getattr(batches[rank], i.name)
                    elif i.role == "state":
                        layer = int(call.prefix.rstrip(".").removeprefix("layers."))
                        mine[i.placeholder] = getattr(states[rank][layer], i.name)
                    elif i.role == "value":
                        mine[i.placeholder] = values[rank][call.binds.get(i.name, i.name)]
                given.append(mine)
            results = run_ranks(self.graphs[call.region], self.layout.mesh, given)
            for rank in ranks:
                values[rank] |= dict(zip(region.outputs, results[rank], strict=True))
        return [v["logits"] for v in values]


@cache
def compiled(layout: str, form: Form = "gather", hot: bool = False) -> Compiled:
    known = parse_layout(layout)
    cut = (Variant(known, form).shard_pass(),) if known.ranks > 1 else ()
    graphs, contexts = {}, {}
    for region in captured().regions:
        gm = copy.deepcopy(region.gm)
        paths = {i.placeholder: i.name for i in region.inputs if i.role == "weight"}
        ctx = Context(region.name, {}, {p: Load(path) for p, path in paths.items()}, paths)
        run_pipeline((*pipelines.finding(), *cut, *pipelines.emission()), gm, ctx)
        graphs[region.name], contexts[region.name] = gm, ctx
    return Compiled(known, captured(), graphs, contexts, of_model(hot))


@cache
def bundled(layout: str, form: Form = "gather", target: str = "cpu") -> tuple[DeepseekV4Config, Compiled]:
    """The bundled model with its weights as they are stored, quantised, its caches in float32."""
    source, known, there = open_model("deepseek-v4-nano", with_weights=True), parse_layout(layout), get_target(target)
    options = Options(rows="compute", index_rows="compute")
    quantisation = check_scheme(options, source.config, there)
    serving = serving_facts(source, check_limits(options, source.config))
    program = trace(source.config, serving, options, lambda *_: None)
    done = [fuse(source, program, r, quantisation, options, lambda *_: None, keep=True) for r in program.regions]
    names = [one.region.name for one in done]
    if known.ranks > 1:
        done = [cut_region(one, Variant(known, form), there) for one in done]
    reader = source.reader
    assert reader is not None

    def weights(region: str, prefix: str, recipe: Recipe) -> tuple[Recipe, Callable[[str], Tensor]]:
        del region
        return instantiate(recipe, prefix), reader.load

    graphs = {name: one.region.gm for name, one in zip(names, done, strict=True)}
    contexts = {name: one.ctx for name, one in zip(names, done, strict=True)}
    return source.config, Compiled(known, program, graphs, contexts, weights)


LAYOUTS: list[tuple[str, Form]] = [
    ("dp=2,moe=tp", "gather"), ("dp=4,moe=tp", "gather"), ("dp=3,moe=ep", "gather"), ("dp=3,moe=ep", "route"),
    ("dp=12,moe=ep", "route"), ("tp=4", "gather"), ("tp=2,moe=ep", "gather"), ("dp=2,tp=2", "gather"),
    ("dp=2,tp=2,moe=ep", "gather"), ("dp=3,tp=2,moe=ep", "route"), ("dp=8,tp=4,moe=tp", "gather"),
]  # fmt: skip
