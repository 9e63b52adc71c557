"""The figures of `quantization.py` for reading: the table on the terminal, the tables in the document, the picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from atomc.artifact.facts import bytes_text

BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
TITLES = {
    "shipped": "nano as shipped (FP8 tiles, FP4 experts)",
    "rescaled": "the rescaled bf16 copy (weights quantised when compiled)",
}
HEAD = (
    "scheme", "weights", "state, KiB", "bits/byte", "more than bf16", "KL, mean", "KL, 99 %", "best token",
    "index picks", "greedy",
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table; a baseline has nothing to be compared with."""
    state = f"{row['state_bytes_per_request'] / 1024:.1f} + {row['state_bytes_per_1024_tokens'] / 1024:.1f}"
    start = [row["name"], bytes_text(row["weight_bytes"]), state, f"{row['bits_per_byte']:.4f}"]
    if "loss" not in row:
        return [*start, *["–"] * 6]
    return [
        *start,
        f"{round(row['loss'], 4) + 0.0:+.4f} ± {row['loss_error']:.4f}",
        f"{row['kl_mean']:.2g}",
        f"{row['kl_p99']:.2g}",
        f"{row['top1']:.2%}",
        f"{row['recall']:.2%}",
        f"{row['greedy_median']:g} ({row['greedy_mean']:.0f})",
    ]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table for each model that was measured."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=180)
    for model, title in TITLES.items():
        table = Table(title=title, title_justify="left", header_style="bold")
        for number, name in enumerate((*HEAD, "tokens/CPU s")):
            table.add_column(name, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            if row["model"] == model:
                table.add_row(*cells(row), f"{row['tokens_per_cpu_second']:,.0f}")
        if table.row_count:
            console.print(table)


def write_document(path: Path, result: dict[str, Any]) -> None:
    """Replace what is between the markers; a document without them gets a section at its end."""
    old = path.read_text(encoding="utf-8") if path.exists() else "# Quantisation\n"
    before, found, rest = old.partition(BEGIN)
    if not found:
        before, rest = f"{old.rstrip()}\n\n## Accuracy\n\n", f"{END}\n"
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{block(result)}\n{END}{after}", encoding="utf-8")


def block(result: dict[str, Any]) -> str:
    """The generated part of the document."""
    text, machine, rows = result["text"], result["machine"], result["rows"]
    sample = (
        f"{text['documents']} documents of the validation text, {text['tokens']:,} tokens ({text['bytes']:,} bytes)"
    )
    prompts = f"{text['prompts']} prompts of {text['prompt_tokens']} tokens, continued by {text['answer_tokens']}"
    computed = f"float32 on {machine['threads']} thread of an {machine['cpu']}, torch {machine['torch']}"
    lines = [f"{sample}; {prompts}. Computed in {computed}."]
    for model, title in TITLES.items():
        lines += ["", f"**{title[0].upper()}{title[1:]}**", ""]
        lines += _markdown(HEAD, [cells(row) for row in rows if row["model"] == model])
    lines += ["", "**Bytes of the weights by layout, nano as shipped**", "", *_layouts(rows)]
    return "\n".join(lines)


def _layouts(rows: Sequence[dict[str, Any]]) -> list[str]:
    shipped = [row for row in rows if row["model"] == "shipped" and len(row["options"]) == 1]
    names = list(dict.fromkeys(name for row in shipped for name in row["weight_bytes_by_layout"]))
    parts = [[row["weight_bytes_by_layout"].get(name, 0) for name in names] for row in shipped]
    table = [
        [row["name"], *(f"{size:,}" if size else "" for size in part)] for row, part in zip(shipped, parts, strict=True)
    ]
    return _markdown(("scheme", *(f"`{name}`" for name in names)), table)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


# -- the picture -------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP, RIGHT = 1000, 470, 78, 106, 70, 34, 14
PANEL = (WIDTH - LEFT - RIGHT - GAP) / 2
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #6a737d; } .title { font-size: 14px; font-weight: 600; }
.grid { stroke: #8886; stroke-width: .7; } .axis { stroke: #888; } polyline { fill: none; stroke-width: 2; }
@media (prefers-color-scheme: dark) { text { fill: #c3cad3; } }
"""
# Colour, dash pattern and name of each line; colours of one weight on white and on black.
DRAWN: dict[str, dict[str, tuple[str, str, str]]] = {
    "shipped": {
        "mxfp4": ("#d1495b", "", "mxfp4"),
        "native": ("#3b82c4", "", "native, w4a8"),
        "fp8": ("#2a9d6f", "7 3", "fp8"),
        "ptpc-fp8": ("#b8860b", "2 3", "ptpc-fp8"),
        "native --cache-rows bf16 --index-rows bf16": ("#9168c4", "9 3 2 3", "native, bf16 rows"),
        "none": ("#7f8790", "", "none"),
    },
    "rescaled": {
        "mxfp4": ("#d1495b", "", "mxfp4"),
        "w4a8": ("#3b82c4", "", "w4a8"),
        "w4a8 --scales mse": ("#9168c4", "9 3 2 3", "w4a8, mse scales"),
        "fp8": ("#2a9d6f", "7 3", "fp8"),
        "ptpc-fp8": ("#b8860b", "2 3", "ptpc-fp8"),
    },
}


class Axes:
    """Places of the streams to the right, a logarithm of their error upwards; the first place is the embedding's."""

    def __init__(self, lines: Sequence[Sequence[float]]) -> None:
        values = [value for line in lines for value in line if value > 0]
        steps = [step * 10.0**power for power in range(-9, 3) for step in (1, 2, 5)]
        low, high = max(s for s in steps if s <= min(values)), min(s for s in steps if s >= max(values))
        self.ticks = [step for step in steps if low <= step <= high]
        self.places = len(lines[0]) - 1

    def x(self, panel: int, place: float) -> float:
        return LEFT + panel * (PANEL + GAP) + (place - 0.5) / self.places * PANEL

    def y(self, value: float) -> float:
        share = math.log(value / self.ticks[0]) / math.log(self.ticks[-1] / self.ticks[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def write_picture(path: Path, rows: Sequence[dict[str, Any]], kinds: Sequence[str]) -> None:
    """Relative error of the residual streams after each sublayer; `kinds` names the layers' attention."""
    lines = {(row["model"], row["name"]): row["stream_errors"] for row in rows if "stream_errors" in row}
    wanted = [lines[model, name] for model, drawn in DRAWN.items() for name in drawn]
    axes = Axes(wanted)
    title = "Relative error of the residual streams, mean over tokens"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="20">{title}: ‖h − h(bf16)‖ / ‖h(bf16)‖</text>',
    ]
    for panel, (model, drawn) in enumerate(DRAWN.items()):
        parts += _frame(axes, panel, TITLES[model], kinds)
        for number, (name, look) in enumerate(drawn.items()):
            parts += _line(axes, panel, number, lines[model, name], look)
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def _frame(axes: Axes, panel: int, title: str, kinds: Sequence[str]) -> Iterator[str]:
    """Title, grid and labels of a panel; the left one has the numbers."""
    left, right, floor = axes.x(panel, 0.5), axes.x(panel, axes.places + 0.5), HEIGHT - BOTTOM
    yield f'<text x="{left:.1f}" y="44">{title}</text>'
    for tick in axes.ticks:
        y = f"{axes.y(tick):.1f}"
        yield f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}"/>'
        if not panel:
            yield f'<text x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{100 * tick:g} %</text>'
    for place in range(1, axes.places + 1):
        x, layer = f"{axes.x(panel, place):.1f}", (place - 1) // 2
        yield f'<text x="{x}" y="{floor + 17}" text-anchor="middle">{"attn" if place % 2 else "ffn"}</text>'
        if not place % 2:
            middle, edge = axes.x(panel, place - 0.5), axes.x(panel, place + 0.5)
            label = f"layer {layer}, {kinds[layer].upper()}"
            yield f'<text x="{middle:.1f}" y="{floor + 35}" text-anchor="middle">{label}</text>'
            yield f'<line class="grid" x1="{edge:.1f}" x2="{edge:.1f}" y1="{TOP}" y2="{floor + 38}"/>'
    yield f'<line class="axis" x1="{left:.1f}" x2="{right:.1f}" y1="{floor}" y2="{floor}"/>'
    yield f'<text x="{(left + right) / 2:.1f}" y="{floor + 58}" text-anchor="middle">streams after each sublayer</text>'


def _line(axes: Axes, panel: int, number: int, errors: Sequence[float], look: tuple[str, str, str]) -> Iterator[str]:
    """A line of the chart, its points, and its entry in the legend above: three to a row."""
    colour, dash, name = look
    points = [(axes.x(panel, place), axes.y(value)) for place, value in enumerate(errors) if place and value > 0]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = f'stroke="{colour}" stroke-dasharray="{dash}"' if dash else f'stroke="{colour}"'
    yield f'<polyline points="{path}" {style}><title>{name}</title></polyline>'
    for place, (x, y) in enumerate(points, start=1):
        tip = f"{name}: {errors[place]:.2%}"
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{tip}</title></circle>'
    x, y = axes.x(panel, 0.5) + number % 3 * PANEL / 3, 64 + 18 * (number // 3)
    yield f'<line x1="{x:.1f}" x2="{x + 26:.1f}" y1="{y}" y2="{y}" {style} stroke-width="2"/>'
    yield f'<text x="{x + 32:.1f}" y="{y}" dy="4">{name}</text>'
