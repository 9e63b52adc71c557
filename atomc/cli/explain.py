"""`atomc explain`: what every pass matched and refused, back to the model's source lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atomc.cli.compile import JsonOption

if TYPE_CHECKING:
    from atomc.report import Explanation


def explain_command(
    what: Annotated[
        str, typer.Argument(metavar="ARTIFACT|MODEL", help="An artifact, or a model as `compile` takes it.")
    ],
    pass_name: Annotated[str | None, typer.Option("--pass", help="Show every match of this pass.")] = None,
    region: Annotated[str | None, typer.Option(help="Show only this region, with every match.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each pass matched and refused. In each region, back to the model's source lines."""
    explanation = _selected(_explanation(what), pass_name, region)
    if as_json:
        from atomc.cli.console import emit_json

        emit_json(explanation)
        return
    if pass_name is None:
        _show_table(explanation)
    if pass_name is not None or region is not None:
        _show_matches(explanation)
    _show_refusals(explanation)


def _explanation(what: str) -> Explanation:
    """Read from an artifact, checked against its manifest; or made by compiling the model, of which nothing is kept."""
    from atomc.cli.paths import is_artifact

    if is_artifact(what):
        from atomc.artifact.store import read_manifest, verify
        from atomc.report import read_explanation
        from atomc.runtime.loader import read_plan

        verify(Path(what), read_manifest(Path(what)))
        explanation = read_explanation(Path(what))
        order = dict.fromkeys(call.region for call in read_plan(Path(what))[0].calls)
        return {region: explanation[region] for region in order if region in explanation}
    from atomc.cli.console import stages
    from atomc.compiler import Options, compile_model
    from atomc.passes import pipelines

    last = pipelines.compilation()[-1].label
    weights = Path(what).is_dir() and any(Path(what).glob("*.safetensors"))
    with stages() as progress:
        options = Options(with_weights=weights, stop_after=last)
        return compile_model(what, "cpu", Path(what), options, progress).explanation


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
