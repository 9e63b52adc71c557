"""A small random DeepSeek-V4 compiled for many ranks that are simulated in one process."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from atomc.capture import Program, capture
from atomc.models.deepseek_v4.attention import AttentionState
from atomc.models.deepseek_v4.model import DeepseekV4
from atomc.models.deepseek_v4.sharding import placement_of
from atomc.models.deepseek_v4.state import Paging
from atomc.ops import Batch
from atomc.parallel.layout import Layout, parse_layout
from atomc.passes import pipelines
from atomc.passes.runner import Context, run_pipeline
from atomc.passes.shard import Form, ShardGraph
from atomc.recipes import Load, Recipe, TensorSpec, evaluate, output_spec
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
def model(dtype: torch.dtype = torch.float32) -> DeepseekV4:
    with torch.no_grad():
        found = DeepseekV4(CONFIG, dtype)
        randomise(found, 0)
    return found


@dataclass
class Compiled:
    """The regions of a program after the pipeline, for one rank or for many."""

    layout: Layout
    graphs: dict[str, GraphModule]
    contexts: dict[str, Context]

    def weights(self, region: str, prefix: str, rank: int) -> dict[str, Tensor]:
        module = model().get_submodule(prefix.rstrip(".") or region)

        def spec_of(recipe: Recipe) -> TensorSpec:
            return output_spec(recipe, lambda n: TensorSpec(tuple((p := module.get_parameter(n)).shape), p.dtype))

        ctx = self.contexts[region]
        recipes = {
            p: rank_recipe(r, ctx.placements.get(p, {}), self.layout.mesh, rank, spec_of)
            for p, r in ctx.weights.items()
        }
        return {p: evaluate(r, module.get_parameter) for p, r in recipes.items()}

    def step(self, batches: list[Batch], states: list[list[AttentionState]], rows: int) -> list[Tensor]:
        """Logits on every rank."""
        regions = {r.name: r for r in captured().regions}
        ranks = range(self.layout.ranks)
        values: list[dict[str, Any]] = [{} for _ in ranks]
        for call in captured().calls:
            region, ctx = regions[call.region], self.contexts[call.region]
            given: list[dict[str, Any]] = []
            for rank in ranks:
                mine: dict[str, Any] = dict.fromkeys(ctx.sizes, rows) | self.weights(call.region, call.prefix, rank)
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
def compiled(layout: str, form: Form = "gather") -> Compiled:
    known = parse_layout(layout)
    shard = ShardGraph(known.mesh, known.moe, placement_of, form) if known.ranks > 1 else None
    graphs, contexts = {}, {}
    for region in captured().regions:
        gm = copy.deepcopy(region.gm)
        paths = {i.placeholder: i.name for i in region.inputs if i.role == "weight"}
        ctx = Context(region.name, {}, {p: Load(path) for p, path in paths.items()}, paths)
        run_pipeline(pipelines.compilation(shard=shard), gm, ctx)
        graphs[region.name], contexts[region.name] = gm, ctx
    return Compiled(known, graphs, contexts)


LAYOUTS: list[tuple[str, Form]] = [
    ("dp=2,moe=tp", "gather"), ("dp=4,moe=tp", "gather"), ("dp=3,moe=ep", "gather"), ("dp=3,moe=ep", "route"),
    ("dp=12,moe=ep", "route"), ("tp=4", "gather"), ("tp=2,moe=ep", "gather"), ("dp=2,tp=2", "gather"),
    ("dp=2,tp=2,moe=ep", "gather"), ("dp=3,tp=2,moe=ep", "route"), ("dp=8,tp=4,moe=tp", "gather"),
]  # fmt: skip
