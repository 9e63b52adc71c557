"""What a compile did, as data (`explain.json`) and as a page to read (`report.md`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from atomc.artifact import facts
from atomc.artifact.agreement import Proven
from atomc.artifact.facts import bytes_text
from atomc.artifact.plan import ProgramPlan, RegionPlan
from atomc.artifact.store import decode
from atomc.passes.runner import Decision, Row
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


@dataclass(frozen=True)
class LayoutRow(Decision):
    """How one weight, activation or cache of a region is stored.

    `uses`: calls of the region in a step, so how many such tensors the model has.
    """

    uses: int


Layouts = dict[str, list[LayoutRow]]


def layouts_of(decisions: Mapping[str, Sequence[Decision]], uses: Mapping[str, int]) -> Layouts:
    """The layout tables of all regions; `uses` counts each region's calls."""
    return {
        region: [LayoutRow(**vars(d), uses=uses[region]) for d in sorted(table, key=lambda d: ORDER.index(d.kind))]
        for region, table in decisions.items()
    }


ORDER = ("weight", "activation", "cache")


def read_layouts(folder: Path) -> Layouts:
    """The layout tables of an artifact. Raises `ArtifactError` when the file is no such thing."""
    path = folder / "layouts.json"
    return decode(path.read_bytes(), Layouts, str(path))


def weight_bytes(layouts: Layouts) -> dict[str, int]:
    """Layout -> bytes of all weights stored in it, over the whole model; the largest first."""
    total: Counter[str] = Counter()
    for rows in layouts.values():
        for row in rows:
            if row.kind == "weight":
                total[row.layout] += row.bytes * row.uses
    return dict(total.most_common())


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


def read_explanation(folder: Path) -> Explanation:
    """The pass tables of an artifact. Raises `ArtifactError` when the file is no such thing."""
    path = folder / "explain.json"
    return decode(path.read_bytes(), Explanation, str(path))


def nodes(explanation: Explanation) -> tuple[int, int]:
    """Nodes of all regions' graphs, as captured and after the last pass."""
    tables = [table for table in explanation.values() if table]
    return sum(t[0].nodes_before for t in tables), sum(t[-1].nodes_after for t in tables)


def matches(explanation: Explanation) -> dict[str, int]:
    """Pass -> matches in all regions, in the order of the pipeline."""
    found: dict[str, int] = {}
    for table in explanation.values():
        for row in table:
            found[row.name] = found.get(row.name, 0) + len(row.matches)
    return found


def table_rows(explanation: Explanation) -> list[list[str]]:
    """A row for each pass: its name, then for each region `found/promised`, or `found` where nothing is promised."""
    cells = {(region, row.name): _cell(row) for region, table in explanation.items() for row in table}
    return [[name, *(cells.get((region, name), "") for region in explanation)] for name in matches(explanation)]


def _cell(row: PassRow) -> str:
    return f"{len(row.matches)}/{row.promised}" if row.promised else str(len(row.matches))


def write_report(
    path: Path,
    model: str,
    target: Target,
    explanation: Explanation,
    layouts: Layouts,
    program: ProgramPlan,
    regions: dict[str, RegionPlan],
    ranks: Sequence[Proven] = (),
) -> None:
    """`report.md`: regions and calls, memory, layouts, passes and refusals, operators; what ranks send one another."""
    lines = [f"# {model} for {target.name}"]
    lines += ["", "## Regions", "", *_regions(explanation, program, regions)]
    lines += ["", "## Memory", "", *_memory(program, regions)]
    if ranks:
        lines += ["", "## Ranks", "", *_table(RANKS_HEAD, rank_rows(ranks))]
    lines += ["", "## Layouts", "", *_layouts(layouts)]
    lines += ["", "## Matches of each pass", "", "Found/promised, where the model promises some.", ""]
    lines += _table(["pass", *explanation], table_rows(explanation))
    if refusals := list(_refusals(explanation)):
        lines += ["", "## Refused", "", *_table(["region", "pass", "source", "reason"], refusals)]
    count = sorted(facts.operators(program, regions).items(), key=lambda i: (-i[1], i[0]))
    lines += ["", "## Operators of one step", "", *_table(["operator", "calls"], [[op, str(n)] for op, n in count])]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


RANKS_HEAD: Final = ["layout", "ranks", "a step of", "takes the form", "collectives", "a rank gives, for each row"]


def rank_rows(ranks: Sequence[Proven]) -> list[list[str]]:
    """Of each layout and kind of step: its form, how many collectives, and the bytes that a rank gives to them."""
    return [
        [
            found.plan.layout, str(found.plan.mesh.ranks), kind, form, str(len(found.collectives[form])),
            ", ".join(f"{bytes_text(size)} to {name}" for name, size in found.bytes_a_row(form).items()),
        ]
        for found in ranks
        for kind, form in kinds_of_steps(found)
    ]  # fmt: skip


def kinds_of_steps(found: Proven) -> list[tuple[str, str]]:
    """Kinds of steps with their forms; those that run in two micro-batches after those that do not."""
    kinds: list[tuple[str, str]] = [*sorted(found.plan.steps.items())]
    kinds += [(f"{k} of {o.least:,} rows or more", o.form) for k, o in sorted(found.plan.overlap.items())]
    return kinds


def _regions(explanation: Explanation, program: ProgramPlan, regions: dict[str, RegionPlan]) -> list[str]:
    uses = facts.uses(program)
    rows = [
        [name, f"{uses[name]}×", *map(str, nodes({name: explanation[name]})), str(len(region.steps)),
         str(sum(step.stream > 0 for step in region.steps)), bytes_text(region.arena_bytes)]
        for name, region in regions.items()
    ]  # fmt: skip
    heads = ["region", "used", "nodes captured", "after the passes", "steps", "on side streams"]
    return _table([*heads, "arena at the largest step"], rows)


def _memory(program: ProgramPlan, regions: dict[str, RegionPlan]) -> list[str]:
    weights, pools = facts.weights(program, regions), facts.pool_bytes(program.states)
    rows = [
        ["weights", bytes_text(weights.bytes), f"{weights.tensors:,} tensors, {weights.parameters:,} parameters"],
        ["arena", bytes_text(program.arena_bytes), "temporaries of the largest region at the largest step"],
        ["values", bytes_text(program.values_bytes), "between regions, at the largest step"],
        *([f"state: one of the {pool}", bytes_text(size), "over all layers"] for pool, size in pools.items()),
    ]
    state = [
        [prefix, t.name, f"{t.pool} × {' × '.join(map(str, t.shape))}", t.dtype]
        for prefix, tensors in program.states.items()
        for t in tensors
    ]
    return [*_table(["what", "bytes", ""], rows), "", *_table(["layer", "state tensor", "shape", "dtype"], state)]


def _layouts(layouts: Layouts) -> list[str]:
    total = [[layout, bytes_text(size), f"{size:,}"] for layout, size in weight_bytes(layouts).items()]
    rows = [
        [region, row.kind, row.name, row.layout, bytes_text(row.bytes), row.stored, row.origin, row.lowering, row.by]
        for region, table in layouts.items()
        for row in table
    ]
    head = ["region", "kind", "name", "layout", "bytes", "before", "how", "on the target", "who decided"]
    return [*_table(["weights in", "size", "bytes"], total), "", *_table(head, rows)]


def _refusals(explanation: Explanation) -> Iterator[list[str]]:
    for region, table in explanation.items():
        for row in table:
            for refusal in row.refusals:
                yield [region, row.name, refusal.where, refusal.reason.replace("|", "\\|").replace("\n", " ")]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
