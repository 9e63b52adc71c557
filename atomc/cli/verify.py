"""`atomc verify`: every step of a plan against float64, and its weights against their checkpoint."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atomc.cli.compile import JsonOption
from atomc.cli.inspect import ArtifactArgument

if TYPE_CHECKING:
    from atomc.verify import StepReport, Verification
    from atomc.verify.bisect import Repro


def verify_command(
    artifact: ArtifactArgument,
    text: Annotated[
        Path | None, typer.Option(help=".txt, .jsonl or .jsonl.xz.", show_default="a page that comes with atomc")
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens to run, of all requests together.")] = 300,
    checkpoint: Annotated[
        str | None, typer.Option(help="What the weights came from.", show_default="the bundled model of that name")
    ] = None,
    region: Annotated[str | None, typer.Option(help="Judge the steps of this region only.")] = None,
    bisect: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Cut the first wrong step down and write a repro here.")
    ] = None,
    collectives: Annotated[
        bool, typer.Option("--collectives", help="Prove instead that ranks agree; needs no weights.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check numerics: each step against float64 on real text, each weight against the checkpoint."""
    if collectives:
        from atomc.cli import layouts

        layouts.verify(artifact, as_json)
        return
    from atomc.cli.texts import limited, read_documents

    if bisect is not None:
        from atomc.cli.paths import check_folder

        check_folder(bisect, "--bisect")
    texts = [] if text is None else list(limited(read_documents(text), 64 * tokens))
    from atomc.cli.console import emit_json, stages
    from atomc.verify import Options, verify_artifact

    start = time.perf_counter()
    with stages() as progress:
        found = verify_artifact(artifact, texts, Options(tokens, checkpoint, region), progress)
    seconds = time.perf_counter() - start
    repro = _bisect(found, bisect)
    if as_json:
        emit_json(summary(found, seconds, repro))
        if not found.ok:
            raise typer.Exit(1)
        return
    show(found, seconds, repro)
    if not found.ok:
        from atomc.verify import VerifyError

        raise VerifyError(message(found))


def _bisect(found: Verification, folder: Path | None) -> Repro | None:
    if folder is None or found.first is None:
        return None
    from atomc.verify.bisect import bisect

    return bisect(found.first, folder)


def message(found: Verification) -> str:
    """Every broken bound, up to ten, and the first in the order of execution."""
    problems = found.problems
    shown = "\n".join(f"  {p}" for p in problems[:10])
    more = f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else ""
    first = "" if found.first is None else f"\nThe first step that breaks its bound: {found.first.report.message()}"
    return f"{found.folder}: {len(problems)} broken bound{'s' if len(problems) > 1 else ''}:\n{shown}{more}{first}"


def summary(found: Verification, seconds: float, repro: Repro | None) -> dict[str, Any]:
    """Everything `--json` writes."""
    weights = None if found.weights is None else [vars(w) | {"ok": w.ok} for w in found.weights]
    return {
        "model": found.model, "artifact": found.folder, "ok": found.ok, "problems": found.problems,
        "tokens": found.tokens, "model_steps": found.model_steps, "judged": found.judged,
        "skipped": found.skipped,
        "seconds": round(seconds, 3), "checkpoint": found.checkpoint or None, "weights": _finite(weights),
        "first": None if found.first is None else _finite(_row(found.first.report)),
        "steps": _finite([_row(step) for step in found.steps]),
        "repro": None if repro is None else {
            "folder": repro.folder, "tokens_before": repro.before, "tokens_after": repro.after,
        },
    }  # fmt: skip


def _row(step: StepReport) -> dict[str, Any]:
    return {name: v for name, v in vars(step).items() if name != "worst"} | vars(step.worst) | {"ok": step.ok}


def _finite(value: Any) -> Any:
    """JSON has no infinity: None."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- tables ------------------------------------------------------------------------------------------------------------


def show(found: Verification, seconds: float, repro: Repro | None) -> None:
    """Print a table for each region, and a summary."""
    from atomc.cli.console import facts, stdout, table

    console = stdout()
    regions = dict.fromkeys(step.region for step in found.steps)
    for region in regions:
        steps = [s for s in found.steps if s.region == region]
        exact = [s for s in steps if s.ok and s.worst.error == s.worst.bound == 0]
        rows = [_cells(s) for s in steps if s not in exact]
        head = ["step", "operator", "runs", "error", "bound", "used", "worst element", "tensor", "source"]
        console.print(table(f"{region}: {len(exact)} steps exact; of the others", head, rows, right=(2, 3, 4, 5)))
        console.print()
    said = [
        ("text", f"{found.tokens:,} tokens in {found.model_steps} steps of the model"),
        (
            "steps",
            f"{len(found.steps):,} in {len(regions)} regions, judged {found.judged:,} times: {_count(found.steps)}",
        ),
        *([("skipped", ", ".join(found.skipped))] if found.skipped else []),
        ("weights", _weights(found)),
        *([("repro", _repro(repro))] if repro else []),
        ("took", f"{seconds:.1f} s"),
    ]
    console.print(facts(f"{found.model}, {found.folder}", said))


def _cells(step: StepReport) -> list[str]:
    v = step.worst
    at = f"[{', '.join(map(str, v.index))}] {v.found:.6g} / {v.expected:.6g}, {v.spacings:.2g} spacings"
    used = "BROKEN" if not step.ok else f"{100 * v.use:.0f}%"
    number = f"{'p' if step.phase == 'prepare' else ''}{step.at}"
    name = step.op.removesuffix(".default")
    return [
        number,
        name,
        str(step.runs),
        f"{v.error:.1e}",
        f"{v.bound:.1e}",
        used,
        v.why or at,
        step.tensor,
        step.source,
    ]


def _count(steps: list[StepReport]) -> str:
    broken = sum(not s.ok for s in steps)
    return f"{broken} beyond their bounds" if broken else "all within their bounds"


def _weights(found: Verification) -> str:
    if found.weights is None:
        return "not compared: give --checkpoint"
    broken = sum(not w.ok for w in found.weights)
    equal = sum(w.ok and w.error == 0 for w in found.weights)
    rounded = len(found.weights) - equal - broken
    parts = [f"{len(found.weights)} compared with {found.checkpoint}: {equal} equal"]
    parts += [f"{rounded} rounded, within half a spacing"] * (rounded > 0) + [f"{broken} WRONG"] * (broken > 0)
    return ", ".join(parts)


def _repro(repro: Repro) -> str:
    return f"{repro.folder / 'repro.py'}: {repro.after} of {repro.before} tokens"
