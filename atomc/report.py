"""What a compile did, as data (`explain.json`) and as a page to read (`report.md`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec

from atomc.artifact.plan import ProgramPlan, RegionPlan
from atomc.passes.runner import Row
from atomc.targets import Target


class ExplainMatch(msgspec.Struct, frozen=True):
    """A place a pass rewrote: model source line, module path."""

    where: str
    module: str


class ExplainRefusal(msgspec.Struct, frozen=True):
    """A place a pass looked at and left, and why."""

    where: str
    reason: str


class PassRow(msgspec.Struct, frozen=True):
    """What one pass did to one region; `promised` is None where the model promises nothing."""

    name: str
    promised: int | None
    matches: list[ExplainMatch]
    refusals: list[ExplainRefusal]
    nodes_before: int
    nodes_after: int


Explanation = dict[str, list[PassRow]]


def explanation_of(rows: Mapping[str, list[Row]]) -> Explanation:
    """The pass tables of all regions, without what differs from run to run (times)."""
    return {region: [_row(r) for r in table] for region, table in rows.items()}


def _row(row: Row) -> PassRow:
    return PassRow(
        row.label,
        row.expected,
        [ExplainMatch(m.where, m.module) for m in row.report.matches],
        [ExplainRefusal(r.where, r.reason) for r in row.report.refusals],
        row.nodes_before,
        row.nodes_after,
    )


def write_report(
    path: Path,
    model: str,
    target: Target,
    explanation: Explanation,
    program: ProgramPlan,
    regions: dict[str, RegionPlan],
) -> None:
    """`report.md`: regions and calls, passes, operators, memory."""
    uses = Counter(call.region for call in program.calls)
    lines = [f"# {model} for {target.name}", "", "## Regions", ""]
    lines += _table(
        ["region", "used", "steps", "arena at the largest step"],
        [[n, f"{uses[n]}×", str(len(r.steps)), _bytes(r.arena_bytes)] for n, r in regions.items()],
    )
    lines += ["", f"Values between regions: {_bytes(program.values_bytes)} at the largest step.", ""]
    lines += ["## Matches of each pass", ""]
    names = list(dict.fromkeys(row.name for table in explanation.values() for row in table))
    cells = {(region, row.name): row for region, table in explanation.items() for row in table}
    lines += _table(
        ["pass", *explanation],
        [
            [name, *(str(len(cells[r, name].matches)) if (r, name) in cells else "" for r in explanation)]
            for name in names
        ],
    )
    lines += ["", "## Operators of one step", ""]
    count: Counter[str] = Counter()
    for region, used in uses.items():
        for step in regions[region].steps:
            count[step.op] += used
    lines += _table(
        ["operator", "calls"], [[op, str(n)] for op, n in sorted(count.items(), key=lambda i: (-i[1], i[0]))]
    )
    lines += ["", "## State of each layer", ""]
    lines += _table(
        ["layer", "tensor", "shape", "dtype"],
        [
            [p, t.name, f"{t.pool} × {' × '.join(map(str, t.shape))}", t.dtype]
            for p, ts in program.states.items()
            for t in ts
        ],
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
