"""Timelines: a schedule on two streams as a picture (SVG), a page (HTML) and a Chrome trace (JSON). All predicted.

Terms:
    bar      a task, as wide as it lasts; colours are of what it belongs to, the second micro-batch is darker
    exposed  pale red on the compute stream: it waits, for the collective that runs then
    issued   when the host's order reaches a task: what is live is drawn at the compute stream's clock, which never goes
             back, though a collective that is issued then may begin later
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any, Final

from atomc.parallel.tasks import Schedule, Span, Task, meetings

WIDTH, LANE, GAP, LEFT = 1120, 34, 10, 104
COLOURS: Final = {
    "attention": "#4c78a8", "caches": "#72b7b2", "streams": "#bab0ac", "experts": "#e45756", "head": "#b279a2",
    "communication": "#f2a541",
}  # fmt: skip
OTHER: Final = "#9c9c9c"
STYLE: Final = """
:root { color-scheme: light dark; } body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto;
padding: 0 1rem; } h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .2rem; } .dim { color: #8a8a8a; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
svg rect:hover { stroke: currentColor; stroke-width: 1.5; } svg .grid { stroke: #8885; }
svg .memory { fill: none; stroke: currentColor; stroke-width: 1.2; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: .15rem .7rem .15rem 0; text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
"""


def svg(schedule: Schedule, window: Span | None = None, whole: float | None = None) -> str:
    """Both streams and live memory over time.

    Args:
        window: the seconds that are shown; all by default. whole: seconds that the width stands for, so that pictures
            of several schedules compare.
    """
    shown = window or Span(0.0, schedule.seconds)
    scale = (WIDTH - LEFT - 10) / ((whole or (shown.end - shown.start)) or 1.0)

    def x(seconds: float) -> float:
        return LEFT + (min(max(seconds, shown.start), shown.end) - shown.start) * scale

    lanes = {"compute": GAP, "collective": GAP + LANE + 6}
    height = 2 * LANE + 3 * GAP + 80
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img">', _labels()]
    for task in schedule.graph.tasks:
        span = schedule.spans[task.name]
        if span.end > shown.start and span.start < shown.end and span.end > span.start:
            parts.append(_bar(task, x(span.start), x(span.end), lanes[task.stream], span))
    for name, span in _held_up(schedule):
        if span.end > shown.start and span.start < shown.end:
            title = f"waits {_time(span.end - span.start)} while {html.escape(name)} runs"
            parts.append(
                f'<rect x="{x(span.start):.2f}" y="{lanes["compute"]}" width="{x(span.end) - x(span.start):.2f}" '
                f'height="{LANE}" fill="#e45756" fill-opacity=".18"><title>{title}</title></rect>'
            )
    parts += [_memory(schedule, x, shown, height), _axis(shown, x, height), "</svg>"]
    return "\n".join(parts)


def _labels() -> str:
    rows = (("compute", GAP), ("communication", GAP + LANE + 6), ("live bytes", 2 * LANE + 2 * GAP + 12))
    return "".join(f'<text x="4" y="{y + LANE / 2 + 4}">{name}</text>' for name, y in rows)


def _bar(task: Task, left: float, right: float, y: float, span: Span) -> str:
    colour = COLOURS.get(task.where, OTHER)
    dark = ' filter="brightness(.72)"' if task.chunk else ""
    title = f"{html.escape(task.name)}: {_time(task.seconds)}, from {_time(span.start)}"
    return (
        f'<rect x="{left:.2f}" y="{y}" width="{max(right - left, 0.2):.2f}" height="{LANE}" fill="{colour}"{dark}>'
        f"<title>{title}</title></rect>"
    )


def _held_up(schedule: Schedule) -> list[tuple[str, Span]]:
    """When the compute stream waits, and which collective runs then: exposed are the same seconds."""
    gaps: list[Span] = []
    busy = 0.0
    for action, name in schedule.issues:
        start, end = schedule.spans[name] if action == "run" else (schedule.spans[name].end, busy)
        if action != "start" and start > busy:
            gaps.append(Span(busy, start))
        if action != "start":
            busy = max(busy, start, end)
    sends = [task.name for task in schedule.graph.tasks if task.stream == "collective"]
    found = meetings([schedule.spans[name] for name in sends], gaps)
    spans = [(sends[at], schedule.spans[sends[at]], gaps[gap]) for at, gap, _ in found]
    return [(name, Span(max(a.start, b.start), min(a.end, b.end))) for name, a, b in spans]


def issued(schedule: Schedule) -> list[float]:
    """Seconds of the compute stream's clock at each issue."""
    found, clock = [], 0.0
    for action, name in schedule.issues:
        if action != "start":
            clock = max(clock, schedule.spans[name].end if action == "wait" else schedule.spans[name].start)
        found.append(clock)
        if action == "run":
            clock = schedule.spans[name].end
    return found


def _memory(schedule: Schedule, x: Any, shown: Span, height: float) -> str:
    """Live bytes as steps; the peak is written beside."""
    top, bottom = 2 * LANE + 2 * GAP + 10, height - 26
    peak = schedule.peak or 1
    points: list[str] = []
    for at, live in zip(issued(schedule), schedule.live, strict=True):
        if shown.start <= at <= shown.end:
            points.append(f"{x(at):.1f},{bottom - live / peak * (bottom - top):.1f}")
    text = f'<text x="{WIDTH - 4}" y="{top + 2}" text-anchor="end">peak {schedule.peak / 2**20:,.1f} MiB</text>'
    return f'<polyline class="memory" points="{" ".join(points)}"/>{text}'


def _axis(shown: Span, x: Any, height: float) -> str:
    marks = []
    for number in range(6):
        at = shown.start + (shown.end - shown.start) * number / 5
        marks.append(
            f'<line class="grid" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{GAP}" y2="{height - 22}"/>'
            f'<text x="{x(at):.1f}" y="{height - 8}" text-anchor="middle">{_time(at)}</text>'
        )
    return "".join(marks)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def page(title: str, note: str, schedules: Sequence[tuple[str, Schedule]], window: float | None = None) -> str:
    """A page with a picture of each schedule, all to one scale; `window`: only so many seconds from the middle."""
    longest = max(schedule.seconds for _, schedule in schedules)
    legend = " ".join(f'<span style="color:{colour}">■</span> {name}' for name, colour in COLOURS.items())
    parts = [
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<style>{STYLE}</style><h1>{html.escape(title)}</h1><p class="dim">{html.escape(note)}</p>',
        f'<p class="dim">{legend}; the second micro-batch is darker; pale red: compute waits.</p>',
    ]
    for name, schedule in schedules:
        parts += [f"<h2>{html.escape(name)}</h2>", f'<p class="dim">{summary(schedule)}</p>']
        if window is not None and window < schedule.seconds:
            middle = schedule.seconds / 2
            parts.append(svg(schedule, Span(middle - window / 2, middle + window / 2)))
        parts.append(svg(schedule, whole=longest))
        parts.append(_reasons(schedule))
    return "\n".join([*parts, "</html>\n"])


def summary(schedule: Schedule) -> str:
    """Its figures in a line."""
    exposed = sum(schedule.exposed.values())
    idle = sum(gap.end - gap.start for gap in schedule.bubbles("collective"))
    waits = sum(gap.end - gap.start for gap in schedule.bubbles("compute"))
    power = f", {_time(schedule.throttled)} of it because of power" if schedule.throttled else ""
    return (
        f"{_time(schedule.seconds)} predicted{power}; "
        f"communication {_time(schedule.communication)}, exposed {_time(exposed)}; "
        f"bubbles {_time(waits)} of compute, {_time(idle)} of communication; peak {schedule.peak / 2**20:,.1f} MiB"
    )


def _reasons(schedule: Schedule) -> str:
    """The collectives that are exposed longest, with the reason."""
    worst = sorted(schedule.why, key=lambda why: -why.exposed)[:12]
    if not worst:
        return ""
    cells = [(html.escape(why.task), _time(why.exposed), html.escape(why.reason)) for why in worst]
    rows = "".join(f'<tr><td>{task}</td><td class="n">{time}</td><td>{text}</td></tr>' for task, time, text in cells)
    head = '<tr><th>exposed longest</th><th class="n">for</th><th>why it is not hidden</th></tr>'
    return f"<table>{head}{rows}</table>"


def chrome_trace(schedules: Sequence[tuple[str, Schedule]]) -> str:
    """The schedules as processes of two threads in the trace event format; times in microseconds."""
    events: list[dict[str, Any]] = []
    for process, (name, schedule) in enumerate(schedules):
        events.append({"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}})
        for thread, stream in enumerate(("compute", "communication")):
            events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": stream}})
        for task in schedule.graph.tasks:
            span = schedule.spans[task.name]
            shown: dict[str, Any] = {"micro-batch": task.chunk, "of": task.where}
            if task.stream == "collective":
                shown["exposed_us"] = schedule.exposed[task.name] * 1e6
            events.append(
                {"ph": "X", "name": task.name, "cat": task.stream, "pid": process, "tid": int(task.stream != "compute"),
                 "ts": span.start * 1e6, "dur": (span.end - span.start) * 1e6, "args": shown}
            )  # fmt: skip
        for at, live in zip(issued(schedule), schedule.live, strict=True):
            events.append({"ph": "C", "name": "live bytes", "pid": process, "ts": at * 1e6, "args": {"bytes": live}})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"
