"""A rank's step in two micro-batches: its regions cut in two, stitched to their neighbours, and scheduled.

Contract:
    The calls are those of the whole step, each with a region of its own kind between its neighbours' kinds. All halves
    gather: their messages have sizes that all ranks know, which may be in flight over the border of a region. The order
    of a region is found once, for the largest step of its kind, and is right for every step. It keeps to the memory of
    the whole step, arena and values, where there is an order that does.

Terms:
    open   the last collective of a region's second half, which the next region waits for (`passes.borders`)

Pseudo-code:
    each kind of region in two (`passes.chunk`), once
    for each call: copies of the kinds before, here and after; stitch(before, here); stitch(here, after)
    schedule here (`passes.schedule`), by its nodes' costs, with what was left open before it
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from atomc.artifact.manifest import Serving
from atomc.artifact.order import buckets_of
from atomc.artifact.plan import CallPlan
from atomc.artifact.ranks import KINDS, Kind
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.parallel.layout import Layout
from atomc.parallel.sizes import AGREED, HALVES, INDEX, STEP, half_rows, of_half
from atomc.passes.borders import Region, last_collective, stitch
from atomc.passes.chunk import Chunk
from atomc.passes.overlap import OverlapError
from atomc.passes.runner import Pass, run_pipeline
from atomc.passes.schedule import ScheduleOverlap
from atomc.planning.decide import decide
from atomc.planning.nodes import Load, NodeCosts
from atomc.planning.step import Step
from atomc.regions import Compiled, copy_context, sizes_of
from atomc.targets import Target, get_target

CONTEXT: Final = 8192  # tokens of context that steps are predicted with, where the artifact allows as many
STAND_IN: Final = "mi355x"  # whose costs order the steps of a target without links: any order is right


@dataclass(frozen=True)
class Largest:
    """The largest step of a kind: what its order, and whether it is worth it, are predicted for."""

    kind: Kind
    serving: Serving

    def step(self, rows: int = 0) -> Step:
        """Of so many rows on every rank; of the most without."""
        rows = rows or self.most
        context = max(min(self.serving.max_context, CONTEXT), 1 if self.kind == "decode" else rows)
        return Step(rows, rows if self.kind == "decode" else 1, context)

    @property
    def most(self) -> int:
        """Rows of the largest step."""
        return self.serving.max_requests if self.kind == "decode" else self.serving.max_batch_tokens


def overlapped(
    config: DeepseekV4Config, layout: Layout, target: Target, serving: Serving
) -> tuple[dict[Kind, int], dict[Kind, str]]:
    """Kind of a step -> the least rows of those that run in two micro-batches; and why, or why none do.

    Where `tbo=auto` asks: the least bucket from which on all of them gain.
    """
    least: dict[Kind, int] = {}
    why: dict[Kind, str] = {}
    for kind in KINDS if layout.tbo != "off" else ():
        largest = Largest(kind, serving)
        if layout.tbo == "prefill" and kind == "decode":
            why[kind] = "tbo=prefill leaves decode whole"
        elif largest.most < 2:
            why[kind] = "its largest step has one row, which has no two halves"
        elif not target.link.rate:
            why[kind] = f"tbo={layout.tbo}; nothing is predicted for {target.name}, which has no links"
            least |= {kind: 2} if layout.tbo != "auto" else {}
        elif layout.tbo != "auto":
            decision = decide(config, layout, target, largest.step())
            least[kind], why[kind] = 2, f"{decision.why} at {largest.most:,} rows"
        else:
            for rows in reversed(buckets_of(largest.most)):
                decision = decide(config, layout, target, largest.step(rows))
                why.setdefault(kind, f"{decision.why} at {rows:,} rows")
                if not decision.on:
                    break
                least[kind] = rows
    return least, why


@dataclass
class Halving:
    """Makes a layout's regions for steps of one kind in two micro-batches.

    Attributes:
        cut: the regions of a rank, by the names that one rank's have. bounds: the largest sizes. limit: bytes that the
            buffers of a region may take at them, of its own and of those that it hands on.
    """

    cut: Mapping[str, Compiled]
    layout: Layout
    suffix: str  # of the names of its regions
    largest: Largest
    target: Target
    config: DeepseekV4Config
    passed: tuple[Pass, ...]  # that have run on them
    bounds: Mapping[str, int]
    limit: int
    _chunked: dict[str, Compiled] = field(default_factory=dict)
    _made: dict[tuple[str | None, ...], Compiled] = field(default_factory=dict)

    def regions(self, whole: Sequence[CallPlan], progress: Callable[[str, int], None]) -> list[Compiled]:
        """One for each call of the whole step; calls that may share one do."""
        found = []
        for at, call in enumerate(whole):
            around = [whole[i] if 0 <= i < len(whole) else None for i in (at - 1, at, at + 1)]
            key = tuple(None if c is None else c.region for c in around)
            if key not in self._made:
                progress(call.region, len(self._made) + 1)
                name = f"{call.region}{self.suffix}_{self.largest.kind}_halves_{len(self._made)}"
                self._made[key] = self._between(around, name)
            found.append(self._made[key])
        return found

    def _between(self, around: Sequence[CallPlan | None], name: str) -> Compiled:
        """The region of the call in the middle, with the names of another."""
        before, here, after = (None if call is None else self._part(call) for call in around)
        assert here is not None and around[1] is not None
        if before is not None:
            stitch(before, here)
        if after is not None:
            stitch(here, after)
        one = self._two(around[1].region)
        ours = Compiled(replace(one.region, name=name, gm=here.gm), here.ctx, list(one.rows))
        here.gm.graph.lint()
        here.gm.recompile()
        self._schedule(ours, self._under_way(around[0], before))
        return ours

    def _two(self, region: str) -> Compiled:
        """A region in two micro-batches."""
        if region not in self._chunked:
            one = self.cut[region]
            gm, ctx = copy.deepcopy(one.region.gm), copy_context(one.ctx)
            tokens = frozenset(graph for graph, plan in one.region.symbols.items() if plan in STEP)
            rows = run_pipeline((Chunk(tokens),), gm, ctx, after=self.passed)
            self._chunked[region] = Compiled(replace(one.region, gm=gm), ctx, rows)
        return self._chunked[region]

    def _part(self, call: CallPlan) -> Region:
        """A copy of a region that may be stitched to others."""
        one = self._two(call.region)
        region = one.region
        takes = {i.placeholder: call.binds.get(i.name, i.name) for i in region.inputs if i.role == "value"}
        return Region(copy.deepcopy(region.gm), copy_context(one.ctx), region.symbols, region.outputs, takes)

    def _costs(self, ours: Compiled) -> NodeCosts:
        """What the nodes take in the largest step."""
        linked = bool(self.target.link.rate)
        target = self.target if linked else get_target(STAND_IN)
        parts = self.largest.step().halves or []
        sizes = dict.fromkeys((*INDEX.values(), "window_pages", "blocks", "slots"), 1)
        for half, part in zip(HALVES, parts, strict=True):
            known = {"T": part.tokens, "B": max(1, round(part.requests)), "L": max(1, round(part.requests))}
            ratios = self.largest.serving.csa_ratio, self.largest.serving.hca_ratio
            known |= {name: max(1, part.tokens // n) if n else 1 for name, n in zip(("N4", "NH"), ratios, strict=True)}
            known[AGREED] = half_rows(self.largest.most)[half]
            sizes |= {of_half(name, half): int(size) for name, size in known.items()}
        return NodeCosts(
            target, {graph: sizes[plan] for graph, plan in sizes_of(ours).items()},
            {"dp": self.layout.dp, "tp": self.layout.tp}, [Load(p.requests, p.context) for p in parts],
            self.config.n_routed_experts, frozenset(ours.ctx.weights), lenient=not linked,
        )  # fmt: skip

    def _under_way(self, call: CallPlan | None, before: Region | None) -> float:
        """Seconds of the collective that the region before leaves open; 0 where it leaves none."""
        if call is None or before is None or not before.chunked.carried:
            return 0.0
        one, left = self._two(call.region), last_collective(before.gm)
        assert left is not None, "what is carried is of a collective"
        return self._costs(Compiled(replace(one.region, gm=before.gm), before.ctx, []))(left).seconds

    def _schedule(self, ours: Compiled, under_way: float) -> None:
        """Put the nodes in order; by more memory only where no order has less."""
        costs, sizes = self._costs(ours), {graph: self.bounds[plan] for graph, plan in sizes_of(ours).items()}
        for limit in (self.limit, None):
            order = ScheduleOverlap(costs, sizes, limit, require=False, under_way=under_way)
            try:
                ours.rows += run_pipeline((order,), ours.region.gm, ours.ctx, after=self.passed)
                return
            except OverlapError:
                if limit is None:
                    raise
