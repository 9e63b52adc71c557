"""`atomc explain`: what every pass matched and refused, and how everything is stored, back to the model's lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atomc.cli.compile import JsonOption

if TYPE_CHECKING:
    from atomc.report import Explanation, LayoutRow, Layouts


def explain_command(
    what: Annotated[
        str, typer.Argument(metavar="ARTIFACT|MODEL", help="An artifact, or a model as `compile` takes it.")
    ],
    pass_name: Annotated[str | None, typer.Option("--pass", help="Show every match of this pass.")] = None,
    region: Annotated[str | None, typer.Option(help="Show only this region, with every match.")] = None,
    layouts: Annotated[
        bool, typer.Option("--layouts", help="Show how every weight, activation and cache is stored, and why.")
    ] = False,
    target: Annotated[str | None, typer.Option(help="Of a model: what to compile it for; cpu by default.")] = None,
    scheme: Annotated[
        str | None, typer.Option(help="Of a model: a scheme of `atomc schemes` or a .json file; native by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each pass matched and refused, and how everything is stored. In each region, back to source lines."""
    _check_options(what, layouts and pass_name is not None, target, scheme)
    explanation, stored = _explanation(what, target or "cpu", scheme or "native", (pass_name, region) != (None, None))
    explanation = _selected(explanation, pass_name, region)
    stored = {name: rows for name, rows in stored.items() if region in (None, name)}
    if as_json:
        from atomc.cli.console import emit_json

        emit_json(stored if layouts else explanation)
        return
    if layouts:
        _show_layouts(stored)
        return
    if pass_name is None:
        _show_table(explanation)
    if pass_name is not None or region is not None:
        _show_matches(explanation)
    _show_refusals(explanation)
    if pass_name is None and stored:
        _show_totals(stored)
    if pass_name is None and region is None:
        _show_ranks(what)


def _show_ranks(what: str) -> None:
    """What the ranks of each layout of an artifact send, where it has layouts of more than one."""
    from atomc.cli import layouts
    from atomc.cli.console import stdout
    from atomc.cli.paths import is_artifact
    from atomc.runtime.loader import read_ranks
    from atomc.verify.collectives import verify_collectives

    if is_artifact(what) and read_ranks(Path(what)):
        stdout().print()
        layouts.show(verify_collectives(Path(what), hashed=True))  # by `_explanation`


def _check_options(what: str, both: bool, target: str | None, scheme: str | None) -> None:
    from atomc.cli.failure import OptionError
    from atomc.cli.paths import is_artifact

    if both:
        raise OptionError("--layouts and --pass: choose one; layouts are no pass's matches.")
    if is_artifact(what) and (target, scheme) != (None, None):
        flag = "--target" if target is not None else "--scheme"
        raise OptionError(f"{flag}: {what} is compiled already; give it with a model.")


def _explanation(what: str, target: str, scheme: str, ranks: bool) -> tuple[Explanation, Layouts]:
    """Read from an artifact, checked against its manifest; or made by compiling the model, of which nothing is kept.

    `ranks`: the regions of layouts on many ranks too, after those of one.
    """
    from atomc.cli.paths import is_artifact

    if is_artifact(what):
        from atomc.artifact.store import read_manifest, verify
        from atomc.report import read_explanation, read_layouts
        from atomc.runtime.loader import read_plan

        verify(Path(what), read_manifest(Path(what)))
        explanation, layouts = read_explanation(Path(what)), read_layouts(Path(what))
        order = dict.fromkeys(call.region for call in read_plan(Path(what))[0].calls)
        kept = [region for region in order if region in explanation]
        shown = [*kept, *(region for region in explanation if ranks and region not in order)]
        return {region: explanation[region] for region in shown}, {region: layouts[region] for region in kept}
    from atomc.cli.console import stages
    from atomc.compiler import Options, compile_model
    from atomc.passes import pipelines

    last = pipelines.compilation()[-1].label
    weights = Path(what).is_dir() and any(Path(what).glob("*.safetensors"))
    with stages() as progress:
        options = Options(scheme=scheme, with_weights=weights, stop_after=last)
        result = compile_model(what, target, Path(what), options, progress)
        return result.explanation, result.layouts


def _selected(explanation: Explanation, pass_name: str | None, region: str | None) -> Explanation:
    from atomc.cli.failure import OptionError

    if region is not None and region not in explanation:
        raise OptionError(f"--region {region}: no such region; choose one of {', '.join(explanation)}.")
    passes = dict.fromkeys(row.name for rows in explanation.values() for row in rows)
    if pass_name is not None and pass_name not in passes:
        raise OptionError(f"--pass {pass_name}: no such pass; choose one of {', '.join(passes)}.")
    return {
        name: [row for row in rows if pass_name in (None, row.name)]
        for name, rows in explanation.items()
        if region in (None, name)
    }


def _show_table(explanation: Explanation) -> None:
    from atomc.cli.console import stdout, table
    from atomc.report import table_rows

    rows = [[name, *("·" if cell == "0" else cell for cell in cells)] for name, *cells in table_rows(explanation)]
    title = "matches of each pass in each region (found/promised where the model promises some)"
    stdout().print(table(title, ["pass", *explanation], rows, right=range(1, len(explanation) + 1)))


def _show_matches(explanation: Explanation) -> None:
    from atomc.cli.console import stdout, table

    for region, rows in explanation.items():
        if not rows:
            continue  # the pass did not run on it
        places = [[row.name, match.where, match.module] for row in rows for match in row.matches]
        if places:
            stdout().print()
            stdout().print(table(region, ["pass", "source", "module"], places))
        else:
            stdout().print(f"\n{region}: no match", highlight=False)


def _show_refusals(explanation: Explanation) -> None:
    from atomc.cli.console import stdout, table

    found = [(region, row) for region, rows in explanation.items() for row in rows if row.refusals]
    if not found:
        stdout().print("\nNothing was refused.", style="dim")
        return
    rows = [[r, row.name, refusal.where, refusal.reason] for r, row in found for refusal in row.refusals]
    stdout().print()
    stdout().print(table("refused", ["region", "pass", "source", "reason"], rows))


def _show_totals(layouts: Layouts) -> None:
    """What the weights take in each layout."""
    from atomc.artifact.facts import bytes_text
    from atomc.cli.console import stdout, table
    from atomc.report import weight_bytes

    sizes = weight_bytes(layouts)
    rows = [
        [layout, bytes_text(size), f"{size:,}", f"{size / sum(sizes.values()):.1%}"] for layout, size in sizes.items()
    ]
    rows.append(["all weights", bytes_text(sum(sizes.values())), f"{sum(sizes.values()):,}", ""])
    stdout().print()
    stdout().print(table("weights by layout; --layouts shows each", ["layout", "size", "bytes", ""], rows, (1, 2, 3)))


def _show_layouts(layouts: Layouts) -> None:
    """Every decision, a table for each region."""
    from atomc.cli.console import stdout, table

    for region, rows in layouts.items():
        uses = rows[0].uses if rows else 0
        head = ["", "name", "shape", "layout", "bytes", "before", "how", "on the target", "decided by"]
        stdout().print(table(f"{region}, {uses} of it", head, [_layout_cells(row) for row in rows], right=(4,)))
        stdout().print()
    stdout().print(
        "bytes: of a weight; of one token's activation; of one cache row. Scales are counted. how: stored = the "
        "checkpoint's bytes, exact = the same numbers, quantized = rounded.",
        style="dim",
    )
    _show_totals(layouts)


def _layout_cells(row: LayoutRow) -> list[str]:
    shape = " × ".join(map(str, row.shape))
    before = row.stored if row.stored != row.layout else "the same"
    return [
        row.kind,
        row.name,
        shape,
        row.layout,
        f"{row.bytes:,}",
        before,
        row.origin,
        row.lowering,
        row.by,
    ]
