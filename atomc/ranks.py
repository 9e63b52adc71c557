"""What a compile does for many ranks: reads the layouts, cuts the regions for each, and proves what comes out.

Terms:
    form    one way to run a step on the ranks of a layout. Experts on ranks of their own (`moe=ep`) are gathered for in
            steps of decode, whose sizes are then the same on every rank, and routed to in steps with prefill.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
from torch.fx import GraphModule

from atomc.artifact.agreement import in_halves
from atomc.artifact.manifest import Serving
from atomc.artifact.plan import CallPlan, ProgramPlan, RegionPlan
from atomc.artifact.ranks import KINDS, FormPlan, Kind, Overlap, RanksPlan, cuts_of
from atomc.codegen.device import Variant as Kernel
from atomc.codegen.memory import program_values_bytes
from atomc.codegen.missing import missing_kernels, refuse
from atomc.dividing import model_sizes
from atomc.halves import Halving, Largest, overlapped
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.sharding import placement_of, promised_cuts
from atomc.ops.placement import Placement, Shard
from atomc.parallel.layout import Layout, LayoutError, parse_layout
from atomc.parallel.sizes import COUNTED, bounds
from atomc.passes import pipelines
from atomc.passes.runner import Row, run_pipeline
from atomc.passes.scheme import Scheme
from atomc.passes.shard import Form, ShardGraph, form_of
from atomc.regions import Compiled, copy_context, lower
from atomc.targets import Target

Progress = Callable[[str, int, int], None]  # stage, done, total


def layouts_for(texts: Iterable[str], config: DeepseekV4Config, scheme: Scheme) -> tuple[Layout, ...]:
    """The layouts of more than one rank that `--parallel` says, each once, if the model in that scheme can be cut so.

    Raises:
        LayoutError: it cannot; the message has the number and the nearest legal ones.
    """
    found = layouts_of(texts)
    for layout in found:
        layout.check(model_sizes(config, scheme))
    return found


def layouts_of(texts: Iterable[str]) -> tuple[Layout, ...]:
    """The layouts that `--parallel` spells, without that of one rank, which is always there.

    Raises:
        LayoutError: one cannot be read, or overlaps what one rank does.
    """
    found = tuple(dict.fromkeys(parse_layout(text) for text in texts))
    if alone := [layout for layout in found if layout.ranks == 1 and layout.tbo != "off"]:
        raise LayoutError(f"--parallel {alone[0]}: one rank has no collectives to overlap; leave tbo out.")
    return tuple(layout for layout in found if layout.ranks > 1)


@dataclass(frozen=True)
class Variant:
    """A layout in one form: what its regions are cut by."""

    layout: Layout
    form: Form

    @property
    def suffix(self) -> str:
        """Ends the names of its regions."""
        return (
            "__" + re.sub(r"\W+", "_", str(self.layout).replace("=", "")) + ("_route" if self.form == "route" else "")
        )

    def shard_pass(self) -> ShardGraph:
        return ShardGraph(self.layout.mesh, self.layout.moe, placement_of, self.form)

    def bounds(self, one: Mapping[str, int]) -> dict[str, int]:
        """The largest values of the sizes, by those of one rank."""
        return bounds(one, self.layout.mesh, 2 * self.layout.dp if self.form == "route" else 0)


def variants_of(layout: Layout, target: Target) -> dict[Kind, Variant]:
    """By what a step of each kind is cut."""
    return {kind: Variant(layout, form_of(layout, target, kind)) for kind in KINDS}


@dataclass
class CutRegion:
    """A region after it was cut: its plan, and how its weights, by name, lie along the axes."""

    compiled: Compiled
    plan: RegionPlan
    placements: Mapping[str, Mapping[str, Placement]]


@dataclass
class Linker:
    """Puts the layouts of an artifact together; regions that are alike, but for the name, are one."""

    whole: ProgramPlan
    regions: dict[str, RegionPlan]
    names: dict[bytes, str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = {_content(region): name for name, region in self.regions.items()}

    def layout(
        self, layout: Layout, variants: Mapping[Kind, Variant], cut: Mapping[Variant, Mapping[str, CutRegion]]
    ) -> RanksPlan:
        """The plan of a layout; its regions are added to those of the artifact.

        Args:
            cut: each variant's regions by the names that one rank's have.
        """
        forms: dict[str, FormPlan] = {}
        symbols: dict[str, int] = {}
        placements: dict[str, Mapping[str, Placement]] = {}
        for variant, found in cut.items():
            own = {name: self.shared(region.plan) for name, region in found.items()}
            calls = [CallPlan(own[c.region], c.prefix, c.binds) for c in self.whole.calls]
            symbols |= variant.bounds(self.whole.symbols)
            forms[variant.form] = self.form(calls, symbols)
            placements |= {path: known for region in found.values() for path, known in region.placements.items()}
        cuts = {path: cuts for path, known in sorted(placements.items()) if (cuts := cuts_of(known))}
        steps: dict[Kind, str] = {kind: variant.form for kind, variant in variants.items()}
        return RanksPlan(str(layout), list(layout.mesh.axes), symbols, cuts, forms, steps)

    def halves(self, plan: RanksPlan, kind: Kind, least: int, regions: Iterable[RegionPlan]) -> RanksPlan:
        """The plan with a form in two micro-batches, of a region for each call of the whole step."""
        both = zip(self.whole.calls, regions, strict=True)
        calls = [in_halves(call, self.regions[self.shared(region)]) for call, region in both]
        name = f"{kind}_halves"
        form = msgspec.structs.replace(self.form(calls, plan.symbols), halves=True)
        return msgspec.structs.replace(
            plan, forms=plan.forms | {name: form}, overlap=plan.overlap | {kind: Overlap(name, least)}
        )

    def form(self, calls: list[CallPlan], symbols: Mapping[str, int]) -> FormPlan:
        """Calls, and the memory that they take."""
        arena = max(self.regions[call.region].arena_bytes for call in calls)
        return FormPlan(calls, program_values_bytes(calls, self.regions, symbols), arena)

    def shared(self, region: RegionPlan) -> str:
        """The name of the region of this content."""
        name = self.names.setdefault(_content(region), region.name)
        self.regions.setdefault(name, region)
        return name


def _content(region: RegionPlan) -> bytes:
    return msgspec.json.encode(msgspec.structs.replace(region, name=""), order="deterministic")


def placements_of(
    paths: Mapping[str, str], placements: Mapping[str, Mapping[str, Placement]]
) -> dict[str, Mapping[str, Placement]]:
    """By a weight's name what the shard pass says by placeholder."""
    return {
        paths[p]: known
        for p, known in placements.items()
        if p in paths and any(isinstance(x, Shard) for x in known.values())
    }


@dataclass
class Cutting:
    """Cuts the regions of one rank for the ranks of layouts, and adds them to the artifact's.

    Attributes:
        kernels: what their launches name, by key. graphs, rows: of the cut ones, by region.
    """

    compiled: list[Compiled]
    whole: ProgramPlan
    regions: dict[str, RegionPlan]
    target: Target
    config: DeepseekV4Config
    serving: Serving
    dump_ir: Path | None = None
    progress: Progress = lambda *_: None
    kernels: dict[str, Kernel] = field(default_factory=dict)
    graphs: dict[str, GraphModule] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)

    def layout(self, layout: Layout) -> RanksPlan:
        """The plan of a layout."""
        variants = variants_of(layout, self.target)
        cut = {variant: self.cut(variant) for variant in dict.fromkeys(variants.values())}
        linker = Linker(self.whole, self.regions)
        plan = linker.layout(layout, variants, cut)
        least, why = overlapped(self.config, layout, self.target, self.serving)
        if least:
            counted = sum(name.startswith(COUNTED) for name in plan.symbols)
            symbols = bounds(self.whole.symbols, layout.mesh, counted, halves=True)
            plan = msgspec.structs.replace(plan, symbols=symbols)
        gather = Variant(layout, "gather")
        for kind, rows in least.items():
            plan = linker.halves(plan, kind, rows, self.halves(gather, kind, cut[gather], plan))
        for kept in (self.graphs, self.rows):  # of regions that are alike one is in the artifact
            for name in kept.keys() - self.regions.keys():
                del kept[name]
        return msgspec.structs.replace(plan, why=why)

    def cut(self, variant: Variant) -> dict[str, CutRegion]:
        """Every region for one variant of a layout, by the name that one rank's has."""
        found: dict[str, CutRegion] = {}
        for at, one in enumerate(self.compiled, start=1):
            name = one.region.name + variant.suffix
            self.progress(f"cut {name}", at, len(self.compiled))
            ours = cut_region(one, variant, self.target, self.dump_ir)
            placements = placements_of(ours.ctx.module_paths, ours.ctx.placements)
            found[one.region.name] = CutRegion(ours, self.lower(ours, variant.bounds(self.whole.symbols)), placements)
        return found

    def halves(self, variant: Variant, kind: Kind, cut: Mapping[str, CutRegion], plan: RanksPlan) -> list[RegionPlan]:
        """A region in two micro-batches for each call of the whole step."""
        passed = (*pipelines.finding(target=self.target), variant.shard_pass(), *pipelines.emission(self.target))
        halving = Halving(
            {name: one.compiled for name, one in cut.items()}, variant.layout, variant.suffix,
            Largest(kind, self.serving), self.target, self.config, passed, plan.symbols,
            (whole := plan.forms[plan.steps[kind]]).arena_bytes + whole.values_bytes,
        )  # fmt: skip
        found: dict[str, RegionPlan] = {}
        regions = halving.regions(self.whole.calls, lambda name, at: self.progress(f"halve {name}", at, 0))
        for ours in regions:
            if ours.region.name not in found:
                found[ours.region.name] = self.lower(ours, plan.symbols)
        return [found[ours.region.name] for ours in regions]

    def lower(self, ours: Compiled, symbols: Mapping[str, int]) -> RegionPlan:
        """The plan of a region that is cut."""
        plan, kernels = lower(ours, symbols, self.target)
        self.kernels |= kernels
        if missing := missing_kernels(plan, self.target):
            raise refuse(missing, self.target)
        self.graphs[ours.region.name] = ours.region.gm
        self.rows[ours.region.name] = ours.rows
        return plan


def cut_region(one: Compiled, variant: Variant, target: Target, dump_ir: Path | None = None) -> Compiled:
    """A region of one rank (`one.uncut`) after the passes that cut it for the ranks of a variant."""
    assert one.uncut is not None
    name, gm, ctx = one.region.name + variant.suffix, copy.deepcopy(one.uncut[0]), copy_context(one.uncut[1])
    ctx.expected[ShardGraph.name] = promised_cuts(one.region.name, variant.layout.tp > 1)
    dump = dump_ir / name if dump_ir is not None else None
    tail = (variant.shard_pass(), *pipelines.emission(target))
    rows = run_pipeline(tail, gm, ctx, dump, after=pipelines.finding(target=target))
    return Compiled(replace(one.region, name=name, gm=gm), ctx, rows)
