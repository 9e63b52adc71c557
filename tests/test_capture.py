"""Captured and fused regions, strung together, compute what the eager model computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from atomc.capture import Program, capture
from atomc.models.deepseek_v4.attention import AttentionState
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.model import DeepseekV4
from atomc.models.deepseek_v4.promises import promised_matches
from atomc.models.deepseek_v4.state import Paging
from atomc.ops import Batch
from atomc.passes import pipelines
from atomc.passes.runner import Context, run_pipeline
from atomc.recipes import Load, evaluate
from tests.support.eager import Caches, Piece, Step, make_batch, new_caches, randomise
from tests.support.v4_configs import random_ids, tiny

# Every attention kind with both routers; windows of both ratios, the window and the top-k fill within the test.
CONFIG = tiny(
    compress_ratios=[0, 16, 4, 0, 16, 4], num_hash_layers=3, hidden_size=48, n_routed_experts=6, vocab_size=64,
    hc_sinkhorn_iters=3,
)  # fmt: skip
CONTEXT, LONGEST = 64, 48


@dataclass
class Compiled:
    """The regions of a program after the fusion pipeline, and the eager model they come from."""

    model: DeepseekV4
    program: Program
    contexts: dict[str, Context]

    def step(self, batch: Batch, states: list[AttentionState]) -> Tensor:
        """Logits by the regions, one call after another, as the runtime makes them."""
        regions = {r.name: r for r in self.program.regions}
        values: dict[str, Tensor] = {}
        for call in self.program.calls:
            region, ctx = regions[call.region], self.contexts[call.region]
            owner = call.prefix.rstrip(".") or call.region
            state = states[int(owner.removeprefix("layers."))] if call.prefix else None
            given: dict[str, Any] = {}
            for i in region.inputs:
                if i.role == "batch":
                    given[i.placeholder] = getattr(batch, i.name)
                elif i.role == "state":
                    given[i.placeholder] = getattr(state, i.name)
                elif i.role == "value":
                    given[i.placeholder] = values[call.binds.get(i.name, i.name)]
            module = self.model.get_submodule(owner)
            given |= {p: evaluate(recipe, module.get_parameter) for p, recipe in ctx.weights.items()}
            values |= dict(zip(region.outputs, run(region.gm, given), strict=True))
        return values["logits"]


def run(gm: GraphModule, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """The graph on arguments by placeholder; absent state is None."""
    results: tuple[Tensor, ...] = gm(*(given.get(n.name) for n in gm.graph.nodes if n.op == "placeholder"))
    return results


def compiled(config: DeepseekV4Config, dtype: torch.dtype, seed: int = 0) -> Compiled:
    with torch.no_grad():
        model = DeepseekV4(config, dtype)
        randomise(model, seed)
    columns = -(-(config.sliding_window + LONGEST) // Paging.of(config).window_page) + 1
    program = capture(config, dtype, (columns, -(-CONTEXT // Paging.of(config).block_tokens)))
    contexts = {}
    for region in program.regions:
        paths = {i.placeholder: i.name for i in region.inputs if i.role == "weight"}
        recipes = {placeholder: Load(path) for placeholder, path in paths.items()}
        ctx = Context(region.name, promised_matches(config, region.name), dict(recipes), paths)
        run_pipeline(pipelines.compilation(), region.gm, ctx)
        contexts[region.name] = ctx
    return Compiled(model, program, contexts)


@pytest.fixture(scope="module")
def fp32() -> Compiled:
    return compiled(CONFIG, torch.float32)


def feed(steps: list[Step], sequences: list[Tensor], caches: Caches) -> Iterator[Batch]:
    done = [0] * len(sequences)
    for step in steps:
        pieces: list[Piece] = [(i, done[i], sequences[i][done[i] : done[i] + n]) for i, n in step]
        yield make_batch(CONFIG, pieces, caches)
        for i, n in step:
            done[i] += n


def compare(unit: Compiled, steps: list[Step]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of every step by the regions and by the eager model, each on its own NaN-poisoned caches."""
    sequences = [random_ids(CONFIG, 60, seed) for seed in (1, 2, 3)]
    dtype = unit.model.prologue.embed.weight.dtype
    both = [new_caches(CONFIG, 3, CONTEXT, longest_step=LONGEST, dtype=dtype) for _ in range(2)]
    with torch.no_grad():
        for batch in feed(steps, sequences, both[0]):
            yield unit.step(batch, both[0].states), unit.model(batch, both[1].states)
    for ours, eager in zip(both[0].states, both[1].states, strict=True):
        for name, a, b in zip(AttentionState._fields, ours, eager, strict=True):
            if a is not None and b is not None:
                if not name.endswith("partial"):
                    a, b = a[1:], b[1:]  # page 0 takes the padding, which may be anything
                assert torch.equal(a.isnan(), b.isnan()), name  # the same rows were written
                rest = ~b.isnan()
                tolerance = 1e-5 if dtype == torch.float32 else 0.05
                torch.testing.assert_close(a[rest], b[rest], rtol=tolerance, atol=tolerance)


STEPS: dict[str, list[Step]] = {
    "prefill": [[(0, 40)]],
    "one token": [[(0, 1)]],
    "chunked": [[(0, 7)], [(0, 17)], [(0, 3)], [(0, 16)]],
    "decode": [[(0, 19)], *([[(0, 1)]] * 6)],
    "mixed": [[(0, 20), (1, 5)], [(1, 1), (2, 33), (0, 1)], [(2, 1), (0, 1), (1, 1)], [(1, 15), (0, 2)]],
}


@pytest.mark.parametrize("name", STEPS)
def test_the_regions_compute_what_the_model_computes(fp32: Compiled, name: str) -> None:
    for got, want in compare(fp32, STEPS[name]):
        assert not want.isnan().any()
        assert (got - want).abs().max() <= 2e-6 * max(1.0, float(want.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_in_bf16_too(seed: int) -> None:
    """Merged projections are other calls of the matrix library, whose sums may round to the neighbouring bf16 value.

    One such rounding (2^-8 relative) in the residual travels to the logits, so these may differ by a few of them; but
    where both chose the same rows and experts, not by more.
    """
    unit = compiled(CONFIG, torch.bfloat16, seed)
    for name in ("prefill", "mixed"):
        for got, want in compare(unit, STEPS[name]):
            close = (got - want).abs() <= 8 * 2**-8 * want.abs().max()
            assert close.all(dim=-1).float().mean() >= 0.9  # a flipped top-k choice changes its token's logits


def test_regions_depend_on_kinds_not_on_layers(fp32: Compiled) -> None:
    names = [r.name for r in fp32.program.regions]
    assert names == [
        "prologue", "layer_swa_hash", "layer_hca_hash", "layer_csa_hash", "layer_swa_topk", "layer_hca_topk",
        "layer_csa_topk", "head",
    ]  # fmt: skip
    assert [c.region for c in fp32.program.calls] == names
    traced: list[str] = []
    deep = capture(tiny(compress_ratios=[0] * 5, num_hash_layers=2), torch.float32, (6, 2), traced.append)
    assert traced == ["prologue", "layer_swa_hash", "layer_swa_topk", "head"]
    assert [c.region for c in deep.calls] == ["prologue", *["layer_swa_hash"] * 2, *["layer_swa_topk"] * 3, "head"]
    assert list(deep.states) == [f"layers.{i}." for i in range(5)]


def test_no_weight_is_in_memory_and_every_one_is_bound(fp32: Compiled) -> None:
    for region in fp32.program.regions:
        placeholders = {n.name for n in region.gm.graph.nodes if n.op == "placeholder"}
        bound = {i.placeholder for i in region.inputs if i.role != "weight"}
        assert bound | set(fp32.contexts[region.name].weights) <= placeholders
        for node in region.gm.graph.nodes:
            if node.op == "placeholder" and isinstance(value := node.meta.get("val"), Tensor):
                assert value.is_meta or hasattr(value, "fake_mode")


def test_named_sizes_are_symbols_and_nothing_else_is(fp32: Compiled) -> None:
    for region in fp32.program.regions:
        assert set(region.symbols.values()) <= {"T", "B", "N4", "NH", "L", "window_pages", "blocks", "slots"}
        for node in region.gm.graph.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder" and isinstance(value, Tensor):
                sizes = [size for size in list[Any](value.shape) if isinstance(size, torch.SymInt)]
                symbols = {str(s) for size in sizes for s in size.node.expr.free_symbols}
                assert symbols <= set(region.symbols), node.name
