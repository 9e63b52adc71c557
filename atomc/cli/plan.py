"""`atomc plan`: layouts of a model on a node, ranked for a workload. Predicted: no weights, no GPU, no compile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atomc.cli.compile import JsonOption, ModelArgument

if TYPE_CHECKING:
    from atomc.planning.decide import Decision
    from atomc.planning.ranking import Row


def plan_command(
    model: ModelArgument = "deepseek-v4-flash",
    gpus: Annotated[int, typer.Option(min=1, help="Devices of one node.")] = 8,
    target: Annotated[str, typer.Option(help="What they are; `atomc targets` lists them.")] = "mi355x",
    workload: Annotated[str, typer.Option(metavar="PROMPT/ANSWER", help="Tokens, such as 8k/1k.")] = "8k/1k",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 256,
    tbo: Annotated[str, typer.Option(help="Two-batch overlap: auto, prefill, all, off.")] = "auto",
    timeline: Annotated[
        Path | None, typer.Option(help="Draw the best layout's steps into this HTML file, or .json (Chrome trace).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Rank layouts for a workload by predicted throughput, with memory and the reason each loses."""
    from atomc.cli.console import emit_json, stdout, table
    from atomc.cli.paths import check_file
    from atomc.cli.timeline import check_ranks, schedules_of, write_timeline
    from atomc.models.source import open_model
    from atomc.planning.ranking import Workload, rank
    from atomc.targets import get_target

    if timeline is not None:
        check_file(timeline, "--timeline")
    known, work = get_target(target), Workload.parse(workload, concurrency)
    config = open_model(model, with_weights=False).config
    check_ranks(gpus, known)
    rows = rank(config, known, gpus, work, _tbo(tbo))
    if timeline is not None and (best := rows[0]).prefill and best.decode:
        title = f"{model} for {gpus} {target}, {best.layout}, {workload} at {concurrency}"
        write_timeline(timeline, title, schedules_of([best.prefill, best.decode]))
    if as_json:
        emit_json([_json(row, gpus) for row in rows])
        return
    head = ["layout", "tok/s", "tok/s/GPU", "prefill", "decode", "memory", "requests", "TBO", "why it loses"]
    title = f"{model} on {gpus} {known.product}, {workload}, {concurrency} requests at a time; predicted, not measured"
    stdout().print(table(title, head, [_cells(row, gpus) for row in rows], right=(1, 2, 3, 4, 5, 6)))
    for name, decision in (("prefill", rows[0].prefill), ("decode", rows[0].decode)):
        if decision is not None:
            stdout().print(f"{rows[0].layout}, {name}: {_decided(decision)}", style="dim", soft_wrap=True)
    if timeline is not None:
        typer.echo(f"\nDrawn in {timeline}.")


def _tbo(text: str) -> Any:
    from typing import get_args

    from atomc.cli.failure import OptionError
    from atomc.parallel.layout import Tbo

    if text not in get_args(Tbo):
        raise OptionError(f"--tbo {text} is unknown; choose one of {', '.join(get_args(Tbo))}.")
    return text


def _cells(row: Row, gpus: int) -> list[str]:
    if row.prefill is None or row.decode is None:
        return [str(row.layout), "–", "–", "–", "–", f"{row.bytes / 1e9:,.0f} GB", "0", "–", row.why]
    on = [name for name, d in (("prefill", row.prefill), ("decode", row.decode)) if d.on]
    return [
        str(row.layout), f"{row.throughput:,.0f}", f"{row.throughput / gpus:,.0f}", f"{row.prefill_seconds:,.1f} s",
        f"{row.decode_seconds:,.1f} s", f"{row.bytes / 1e9:,.0f} GB", str(row.fits), ", ".join(on) or "off", row.why,
    ]  # fmt: skip


def _decided(decision: Decision) -> str:
    from atomc.parallel.timeline import summary

    return f"two-batch overlap {'on' if decision.on else 'off'} ({decision.why}); {summary(decision.chosen)}"


def _json(row: Row, gpus: int) -> dict[str, Any]:
    return {
        "layout": str(row.layout), "tokens_per_second": row.throughput,
        "tokens_per_second_per_gpu": row.throughput / gpus,
        "prefill_seconds": row.prefill_seconds, "decode_seconds": row.decode_seconds, "bytes_per_rank": row.bytes,
        "requests": row.fits, "why": row.why,
        "steps": {
            name: {
                "tokens": d.step.tokens, "requests": d.step.requests, "context": d.step.context, "overlap": d.on,
                "gain": d.gain, "why": d.why, "seconds": d.chosen.seconds, "communication": d.chosen.communication,
                "exposed": sum(d.chosen.exposed.values()), "exposed_whole": sum(d.whole.exposed.values()),
                "peak_bytes": d.chosen.peak,
            }
            for name, d in (("prefill", row.prefill), ("decode", row.decode)) if d is not None
        },
    }  # fmt: skip
