"""What a compile does for many ranks: reads the layouts, cuts the regions for each, and proves what comes out.

Terms:
    form    one way to run a step on the ranks of a layout. Experts on ranks of their own (`moe=ep`) are gathered for in
            steps of decode, whose sizes are then the same on every rank, and routed to in steps with prefill.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
from torch.fx import GraphModule

from atomc.artifact.plan import CallPlan, ProgramPlan, RegionPlan
from atomc.artifact.ranks import FormPlan, Kind, RanksPlan, cuts_of
from atomc.codegen.device import Variant as Kernel
from atomc.codegen.memory import program_values_bytes
from atomc.codegen.missing import missing_kernels, refuse
from atomc.formats import FP8_TILE, MXFP4
from atomc.formats import Layout as Format
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.sharding import placement_of, promised_cuts
from atomc.ops.placement import Placement, Shard
from atomc.parallel.layout import Layout, LayoutError, ModelSizes, parse_layout
from atomc.parallel.sizes import bounds
from atomc.passes import pipelines
from atomc.passes.runner import run_pipeline
from atomc.passes.scheme import Rule, Scheme
from atomc.passes.shard import Form, ShardGraph
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
        LayoutError: one cannot be read, or overlaps batches.
    """
    found = tuple(dict.fromkeys(parse_layout(text) for text in texts))
    for layout in found:
        if layout.tbo != "off":
            raise LayoutError(f"--parallel {layout}: batches cannot be overlapped yet; leave tbo out.")
    return tuple(layout for layout in found if layout.ranks > 1)


def model_sizes(config: DeepseekV4Config, scheme: Scheme) -> ModelSizes:
    """The numbers that a layout has to divide, in blocks that are rounded together where the scheme has such."""

    def blocks(kind: str, path: str, stored: str | None, rows: bool = False) -> list[int]:
        found = scheme.rule(kind, (path,))
        if found is None:
            return []
        return [_block(text, rows) for text in (_stored(found[1], stored), found[1].activation) if text and ":" in text]

    experts = {"fp4": str(MXFP4), "fp8": str(FP8_TILE)}.get(config.expert_dtype) if config.quantized else None
    dense = str(FP8_TILE) if config.quantized else None
    inner = [n or config.moe_intermediate_size for n in blocks("experts", "ffn.experts.w13", experts)]
    ranks, head = config.o_lora_rank, config.head_dim
    return ModelSizes(
        config.num_attention_heads, config.o_groups, config.n_routed_experts, config.moe_intermediate_size,
        config.vocab_size, math.lcm(1, *inner),
        {
            "rows of wq_b": (config.num_attention_heads * head, blocks("linear", "attn.wq_b", dense, rows=True)),
            "rows of wo_a": (config.o_groups * ranks, blocks("grouped_output", "attn.wo_a", dense, rows=True)),
            "columns of wo_b": (config.o_groups * ranks, blocks("linear", "attn.wo_b", dense)),
        },
    )  # fmt: skip


def _stored(rule: Rule, stored: str | None) -> str | None:
    return stored if rule.weight == "stored" else rule.weight


def _block(text: str, rows: bool) -> int:
    """Columns, or rows, that have one scale; 0: all of them have."""
    layout = Format.parse(text)
    return layout.rows if rows else layout.columns


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
    """Which form a step of each kind takes.

    On a GPU all steps gather: what routes has sizes that only running tells, and no kernel is chosen for such.
    """
    gather = Variant(layout, "gather")
    routes = layout.moe == "ep" and layout.dp > 1 and not target.is_gpu
    return {"prefill": Variant(layout, "route") if routes else gather, "decode": gather}


@dataclass
class CutRegion:
    """A region after it was cut: its plan, and how its weights, by name, lie along the axes."""

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
        self, layout: Layout, variants: Mapping[Kind, Variant], cut: Callable[[Variant], Mapping[str, CutRegion]]
    ) -> RanksPlan:
        """The plan of a layout; its regions are added to those of the artifact.

        Args:
            cut: a variant's regions by the names that one rank's have.
        """
        forms: dict[str, FormPlan] = {}
        symbols: dict[str, int] = {}
        placements: dict[str, Mapping[str, Placement]] = {}
        for variant in dict.fromkeys(variants.values()):
            found = cut(variant)
            own = {name: self.shared(region.plan) for name, region in found.items()}
            calls = [CallPlan(own[c.region], c.prefix, c.binds) for c in self.whole.calls]
            symbols |= variant.bounds(self.whole.symbols)
            values = program_values_bytes(calls, self.regions, symbols)
            arena = max(self.regions[name].arena_bytes for name in own.values())
            forms[variant.form] = FormPlan(calls, values, arena)
            placements |= {path: known for region in found.values() for path, known in region.placements.items()}
        cuts = {path: cuts for path, known in sorted(placements.items()) if (cuts := cuts_of(known))}
        steps: dict[Kind, str] = {kind: variant.form for kind, variant in variants.items()}
        return RanksPlan(str(layout), list(layout.mesh.axes), symbols, cuts, forms, steps)

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
        kernels: what their launches name, by key. graphs: the cut ones, by region.
    """

    compiled: list[Compiled]
    whole: ProgramPlan
    regions: dict[str, RegionPlan]
    target: Target
    dump_ir: Path | None = None
    progress: Progress = lambda *_: None
    kernels: dict[str, Kernel] = field(default_factory=dict)
    graphs: dict[str, GraphModule] = field(default_factory=dict)

    def layout(self, layout: Layout) -> RanksPlan:
        """The plan of a layout."""
        return Linker(self.whole, self.regions).layout(layout, variants_of(layout, self.target), self.cut)

    def cut(self, variant: Variant) -> dict[str, CutRegion]:
        """Every region for one variant of a layout, by the name that one rank's has."""
        found: dict[str, CutRegion] = {}
        for at, one in enumerate(self.compiled, start=1):
            name = one.region.name + variant.suffix
            self.progress(f"cut {name}", at, len(self.compiled))
            ours = cut_region(one, variant, self.target, self.dump_ir)
            plan, kernels = lower(ours, variant.bounds(self.whole.symbols), self.target)
            self.kernels |= kernels
            if missing := missing_kernels(plan, self.target):
                raise refuse(missing, self.target)
            self.graphs[name] = ours.region.gm
            placements = placements_of(ours.ctx.module_paths, ours.ctx.placements)
            found[one.region.name] = CutRegion(plan, placements)
        return found


def cut_region(one: Compiled, variant: Variant, target: Target, dump_ir: Path | None = None) -> Compiled:
    """A region of one rank (`one.uncut`) after the passes that cut it for the ranks of a variant."""
    assert one.uncut is not None
    name, gm, ctx = one.region.name + variant.suffix, copy.deepcopy(one.uncut[0]), copy_context(one.uncut[1])
    ctx.expected[ShardGraph.name] = promised_cuts(one.region.name, variant.layout.tp > 1)
    dump = dump_ir / name if dump_ir is not None else None
    tail = (variant.shard_pass(), *pipelines.emission(target))
    rows = run_pipeline(tail, gm, ctx, dump, after=pipelines.finding(target=target))
    return Compiled(replace(one.region, name=name, gm=gm), ctx, rows)
