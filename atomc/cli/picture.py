"""An artifact as one HTML page: its memory, every buffer as an offset × step rectangle; for a GPU a roofline.

Terms:
    live bytes   sum of the buffers that exist at a step; its peak is the least any arena could have
    arena        what the plan takes: the peak, and what the greedy placement wastes
"""

from __future__ import annotations

import html
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from atomc.artifact import facts
from atomc.artifact.buffers import slot_bytes
from atomc.artifact.facts import bytes_text
from atomc.artifact.plan import RegionPlan, SlotInfo, Step
from atomc.cli.kernels import costs_of, steps_of
from atomc.cli.paths import write_beside
from atomc.cli.plan_text import slot_names, step_text
from atomc.cli.roofline import roofline
from atomc.costs.tables import Table, kernel_table, reckoned, region_table, step_table, use_table
from atomc.targets import get_target

if TYPE_CHECKING:
    from atomc.cli.inspect import Opened

WIDTH, HEIGHT, LEFT, BOTTOM = 1120, 300, 78, 40
STYLE = """
:root { color-scheme: light dark; --line: #8885; --dim: #8a8a8a; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .2rem; } p { margin: .3rem 0; }
.dim, figcaption { color: var(--dim); } figure { margin: .6rem 0; } svg { width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
svg .grid { stroke: var(--line); } svg .live { fill: none; stroke: currentColor; stroke-width: 1.5; }
svg .roof { stroke: currentColor; stroke-width: 1.5; }
svg text.name { pointer-events: none; paint-order: stroke; stroke: Canvas; stroke-width: 2px; }
svg circle.kernel { fill-opacity: .6; stroke: #0008; stroke-width: .6; }
svg circle.kernel:hover { fill-opacity: 1; stroke: currentColor; stroke-width: 2; }
svg text.op { fill: #000; pointer-events: none; }
svg rect.buffer { stroke: #0006; stroke-width: .5; } svg rect.buffer:hover { stroke: currentColor; stroke-width: 2; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: .15rem .7rem .15rem 0; text-align: left; }
caption { text-align: left; color: var(--dim); margin-top: 1rem; }
td.n, th.n { text-align: right; }
td.n { font-variant-numeric: tabular-nums; } pre { font-size: 12px; overflow-x: auto; }
"""
LEGEND = (
    "A rectangle is a buffer: as wide as the steps it lives, as high as its bytes, at its offset in the region's "
    "arena. The line is what is live. All regions share one arena, as large as the largest. Point at a buffer to read "
    "what it is."
)


def write_picture(path: Path, opened: Opened, context: int | None = None) -> None:
    """Write the page. Raises `OutputError` when it cannot be written; nothing is left then."""
    write_beside(path, page(opened, context))


def page(opened: Opened, context: int | None = None) -> str:
    """The whole page; it loads nothing. `context`: tokens of each request that predictions are made for."""
    manifest, program = opened.manifest, opened.program
    uses, sizes = facts.uses(program), program.symbols
    title = html.escape(f"{manifest.model} for {manifest.target}")
    largest = ", ".join(f"{k} = {v:,}" for k, v in sizes.items() if k in ("T", "B", "L", "N4", "NH"))
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>',
        f"<h1>{title}</h1>",
        f'<p class="dim">artifact {opened.sha256}; sizes at the largest step: {largest}</p>',
        "<h2>What the model takes</h2>",
        _bars(opened),
        "<h2>Regions</h2>",
        f'<p class="dim">{LEGEND}</p>',
    ]
    for name, region in opened.regions.items():
        parts.append(_region(name, region, uses[name], sizes))
    if get_target(manifest.target).is_gpu:
        parts += _predictions(opened, context)
    return "\n".join(parts) + "\n"


def _predictions(opened: Opened, context: int | None) -> Iterator[str]:
    """The roofline of the kernels; layer kinds and steps; every kernel and bucket as a row."""
    costs = costs_of(opened)
    steps = steps_of(costs, None, context)
    yield f"<h2>Kernels and predicted times</h2><p>{html.escape(reckoned(costs.target))}.</p>"
    yield roofline(costs, context)
    yield from (_table(made) for made in (step_table(steps), region_table(steps)))
    for made in (kernel_table(costs), use_table(costs, context)):
        yield f"<details><summary>{html.escape(made.title)}</summary>{_table(made, caption=False)}</details>"


def _table(made: Table, caption: bool = True) -> str:
    numbers = [' class="n"' if column in made.right else "" for column in range(len(made.head))]
    head = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in zip(made.head, numbers, strict=True))
    rows = "\n".join(
        "<tr>" + "".join(f"<td{k}>{html.escape(cell)}</td>" for cell, k in zip(row, numbers, strict=True)) + "</tr>"
        for row in made.rows
    )
    title = f"<caption>{html.escape(made.title)}</caption>" if caption else ""
    return f"<table>{title}<tr>{head}</tr>\n{rows}</table>"


def _bars(opened: Opened) -> str:
    """Weights, state, values and arena as bars of one scale."""
    program, limits = opened.program, opened.manifest.limits
    state = facts.state_bytes(program, opened.manifest.serving)
    whole = limits.max_requests * state.at(limits.max_context)
    one = f"{bytes_text(state.request)} + {bytes_text(state.per_1024_tokens)} per 1,024 tokens"
    rows = [
        ("weights", facts.weights(program, opened.regions).bytes, opened.manifest.dtype),
        ("state", whole, f"{limits.max_requests} requests of {limits.max_context:,} tokens; one: {one}"),
        ("values", program.values_bytes, "between regions, at the largest step"),
        ("arena", program.arena_bytes, "temporaries, at the largest step"),
    ]
    most = max(size for _, size, _ in rows) or 1
    drawn = [f'<svg viewBox="0 0 {WIDTH} {len(rows) * 30}" role="img" aria-label="memory by kind">']
    for i, (name, size, note) in enumerate(rows):
        y, width = i * 30, max(1.0, 420 * size / most)
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 19}" text-anchor="end">{name}</text>')
        drawn.append(f'<rect x="{LEFT}" y="{y + 5}" width="{width:.1f}" height="20" fill="{_colour(name)}"/>')
        text = html.escape(f"{bytes_text(size)} – {note}")
        drawn.append(f'<text x="{LEFT + width + 8:.1f}" y="{y + 19}">{text}</text>')
    return "\n".join([*drawn, "</svg>"])


def _region(name: str, region: RegionPlan, uses: int, sizes: Mapping[str, int]) -> str:
    live = live_bytes(region, sizes)
    peak = max(live, default=0)
    waste = f", {region.arena_bytes / peak - 1:.0%} above it" if peak else ""
    caption = (
        f"{uses}× in a step; {len(region.steps)} steps; live at most {bytes_text(peak)}, "
        f"arena {bytes_text(region.arena_bytes)}{waste}"
    )
    names = slot_names(region)
    steps = "\n".join(
        f"{i:4} {bytes_text(live[i]):>10}  {html.escape(step_text(step, region, names))}  # {html.escape(step.source)}"
        for i, step in enumerate(region.steps)
    )
    return "\n".join(
        [
            f'<figure><h2 id="{name}">{name}</h2><figcaption>{caption}</figcaption>',
            _drawing(region, live, sizes) if peak else "<p>No temporary lives in an arena here.</p>",
            f"<details><summary>steps, with the live bytes at each</summary><pre>{steps}</pre></details></figure>",
        ]
    )


def live_bytes(region: RegionPlan, sizes: Mapping[str, int]) -> list[int]:
    """Bytes of the arena's buffers that exist at each step."""
    live = [0] * len(region.steps)
    for slot in region.slots:
        if slot.offset is not None:
            for step in range(slot.first, slot.last + 1):
                live[step] += slot_bytes(slot, sizes)
    return live


class _Axes:
    """Steps to the right, bytes upwards."""

    def __init__(self, region: RegionPlan) -> None:
        self.across = (WIDTH - LEFT - 10) / len(region.steps)
        self.up = (HEIGHT - BOTTOM - 10) / region.arena_bytes

    def x(self, step: float) -> float:
        return LEFT + step * self.across

    def y(self, size: float) -> float:
        return HEIGHT - BOTTOM - size * self.up


def _drawing(region: RegionPlan, live: list[int], sizes: Mapping[str, int]) -> str:
    axes = _Axes(region)
    label = html.escape(f"buffers of {region.name}")
    drawn = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    for quarter in range(5):
        size = region.arena_bytes * quarter / 4
        y = f"{axes.y(size):.1f}"
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{y}" y2="{y}"/>')
        drawn.append(f'<text x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{bytes_text(size)}</text>')
    floor, every = HEIGHT - BOTTOM, max(1, len(region.steps) // 20)
    drawn += [
        f'<text x="{axes.x(step + 0.5):.1f}" y="{floor + 16}" text-anchor="middle">{step}</text>'
        for step in range(0, len(region.steps), every)
    ]
    drawn.append(f'<text x="{LEFT}" y="{floor + 34}">step</text>')
    makers = {slot: step for step in region.steps for bucket in step.buckets for slot in bucket.scratch}
    makers |= {slot: step for step in region.steps for slot in step.outputs if slot is not None}
    for number, slot in enumerate(region.slots):
        if slot.offset is not None:
            drawn += _buffer(axes, number, slot, makers[number], slot_bytes(slot, sizes))
    points = " ".join(f"{axes.x(s + end):.1f},{axes.y(size):.1f}" for s, size in enumerate(live) for end in (0, 1))
    drawn.append(f'<polyline class="live" points="{points}"/>')
    return "\n".join([*drawn, "</svg>"])


def _buffer(axes: _Axes, number: int, slot: SlotInfo, maker: Step, size: int) -> Iterator[str]:
    """The rectangle, with all there is to know in its title, and the operator's name where there is room."""
    assert slot.offset is not None
    op, shape = maker.op.removesuffix(".default"), ", ".join(map(str, slot.shape))
    tip = (
        f"%{number} {slot.name}\n{op} at {maker.source}\n{slot.dtype}[{shape}], {bytes_text(size)} at {slot.offset:,}\n"
        f"steps {slot.first} to {slot.last}"
    )
    left, bottom = axes.x(slot.first), axes.y(slot.offset)
    width, height = (slot.last - slot.first + 1) * axes.across, max(size * axes.up, 0.8)
    yield (
        f'<rect class="buffer" x="{left:.1f}" y="{bottom - height:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{_colour(op)}"><title>{html.escape(tip)}</title></rect>'
    )
    if width > 7 * len(op) and height > 13:
        yield f'<text class="op" x="{left + 5:.1f}" y="{bottom - height / 2:.1f}" dy="4">{op}</text>'


def _colour(name: str) -> str:
    """One colour for each operator, the same in every picture; ATen's are pale, our own are strong."""
    hue = zlib.crc32(name.encode()) % 360
    return f"hsl({hue} 28% 74%)" if name.startswith("aten.") else f"hsl({hue} 62% 64%)"
