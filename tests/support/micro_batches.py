"""A model's regions, whole and cut in two micro-batches, run on the CPU on the same batches and the same caches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from atomc.capture import Call, Program
from atomc.compiler import Options, check_limits, check_scheme, fuse, serving_facts, trace
from atomc.models.deepseek_v4.attention import AttentionState
from atomc.models.source import ModelSource, open_model
from atomc.ops import Batch
from atomc.ops.batch import BatchHalves
from atomc.parallel.sizes import STEP
from atomc.passes.chunk import Chunk
from atomc.passes.runner import Context, run_pipeline
from atomc.recipes import evaluate, instantiate
from atomc.targets import get_target
from tests.support.eager import Caches

Seen = dict[str, Any]  # node -> value
Watch = Callable[[Node, tuple[Any, ...], dict[str, Any]], Any]


@dataclass
class Cut:
    """One region: whole, and in two micro-batches, with what they are called with."""

    whole: GraphModule
    halves: GraphModule
    ctx: Context
    inputs: dict[str, tuple[str, str]]  # placeholder -> role and name
    outputs: list[str]


@dataclass
class Cuts:
    """A model from its checkpoint, its regions cut."""

    source: ModelSource
    program: Program
    regions: dict[str, Cut]
    weights: dict[tuple[str, str], Tensor]  # prefix, placeholder

    def whole(self, batch: Batch, caches: Caches, call_op: Watch | None = None) -> tuple[Tensor, list[Seen]]:
        """Logits of the whole step, and every value on the way, call by call."""
        values: dict[str, Tensor] = {}
        seen: list[Seen] = []
        for call in self.program.calls:
            cut = self.regions[call.region]
            given = self._given(call, cut, caches) | self._step(call, cut, batch, values)
            results, found = run(cut.whole, given, call_op)
            values |= dict(zip(cut.outputs, results, strict=True))
            seen.append(found)
        return values["logits"], seen

    def halves(self, halves: BatchHalves, caches: Caches, call_op: Watch | None = None) -> tuple[Tensor, list[Seen]]:
        """The same by the halves; logits in the order of the whole step's."""
        both: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        seen: list[Seen] = []
        for call in self.program.calls:
            cut = self.regions[call.region]
            given = self._given(call, cut, caches)
            chunked = cut.ctx.chunked
            assert chunked is not None
            for half, batch in enumerate((halves.first, halves.second)):
                step = self._step(call, cut, batch, both[half])
                given |= {chunked.inputs[name][half]: value for name, value in step.items()}
            results, found = run(cut.halves, given, call_op)
            for half in (0, 1):
                mine = results[half * chunked.results : (half + 1) * chunked.results]
                both[half].update(zip(cut.outputs, mine, strict=True))
            seen.append(found)
        return torch.cat([values["logits"] for values in both])[halves.logit_rows], seen

    def _given(self, call: Call, cut: Cut, caches: Caches) -> dict[str, Tensor]:
        """Weights and state of a call."""
        given = {p: self.weights[call.prefix, p] for p in cut.ctx.weights}
        for placeholder, (role, name) in cut.inputs.items():
            if role == "state":
                number = int(call.prefix.removeprefix("layers.").rstrip("."))
                given[placeholder] = getattr(caches.states[number], name)
        return given

    def _step(self, call: Call, cut: Cut, batch: Batch, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a call takes of the step."""
        fields = batch._asdict()
        return {
            placeholder: fields[name] if role == "batch" else values[call.binds.get(name, name)]
            for placeholder, (role, name) in cut.inputs.items()
            if role in ("batch", "value")
        }


class _Run(Interpreter):
    def __init__(self, gm: GraphModule, call_op: Watch | None) -> None:
        super().__init__(gm)
        self.call_op, self.seen = call_op, dict[str, Any]()

    def run_node(self, n: Node) -> Any:
        if n.op == "call_function" and self.call_op is not None:
            value = self.call_op(n, *self.fetch_args_kwargs_from_env(n))
        else:
            value = super().run_node(n)
        self.seen[n.name] = value
        return value


def run(gm: GraphModule, given: dict[str, Tensor], call_op: Watch | None) -> tuple[tuple[Tensor, ...], Seen]:
    """Run a graph; its results and the value of every node. `call_op` calls the operators, torch by default."""
    runner = _Run(gm, call_op)
    placeholders = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        results = runner.run(*(given.get(name) for name in placeholders), enable_io_processing=False)
    return tuple(pytree.tree_leaves(results)), runner.seen


def cut_model(model: str, scheme: str = "native") -> Cuts:
    """Capture, fuse and cut every region of a bundled model with weights, in float32 for the CPU."""
    source = open_model(model, with_weights=True)
    options = Options(scheme=scheme, max_context=1024, max_batch_tokens=512, rows="compute", index_rows="compute")
    serving = serving_facts(source, check_limits(options, source.config))
    quantisation = check_scheme(options, source.config, get_target("cpu"))
    program = trace(source.config, serving, options, lambda *_: None)
    regions: dict[str, Cut] = {}
    weights: dict[tuple[str, str], Tensor] = {}
    for region in program.regions:
        ctx = fuse(source, program, region, quantisation, options, lambda *_: None).ctx
        for prefix in (call.prefix for call in program.calls if call.region == region.name):
            for placeholder, recipe in ctx.weights.items():
                weights[prefix, placeholder] = evaluate(instantiate(recipe, prefix), source.load)
        inputs = {i.placeholder: (i.role, i.name) for i in region.inputs if i.role != "weight"}
        kept = {node.name for node in region.gm.graph.nodes if node.op == "placeholder"}
        inputs = {p: found for p, found in inputs.items() if p in kept}
        regions[region.name] = cut_region(region.gm, region.symbols, ctx, inputs, region.outputs)
    return Cuts(source, program, regions, weights)


def cut_region(
    gm: GraphModule, symbols: dict[str, str], ctx: Context, inputs: dict[str, tuple[str, str]], outputs: Sequence[str]
) -> Cut:
    """A region and its cut; the graph it had stays as it is."""
    whole = GraphModule(gm, gm.graph)
    tokens = frozenset(graph for graph, plan in symbols.items() if plan in STEP)
    chunk = Chunk(tokens)
    chunk.run(gm, ctx)
    gm.graph.lint()
    gm.recompile()
    return Cut(whole, gm, ctx, inputs, list(outputs))


def operators(gm: GraphModule) -> Counter[str]:
    """How often a graph calls each operator."""
    return Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_function")


def state_tensors(caches: Caches) -> list[Tensor]:
    """Every state tensor, layer by layer, without page, block and slot 0 of what padding may touch."""
    return [
        tensor if name.endswith("partial") else tensor[1:]
        for state in caches.states
        for name, tensor in zip(AttentionState._fields, state, strict=True)
        if tensor is not None
    ]


__all__ = ["Cut", "Cuts", "cut_model", "cut_region", "operators", "run", "run_pipeline", "state_tensors"]
