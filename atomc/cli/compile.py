"""`atomc compile`: a model's name or folder to an artifact."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from atomc.compiler import Options, Result
    from atomc.targets import Target

ModelArgument = Annotated[
    str, typer.Argument(help="A checkpoint folder, or a bundled model (deepseek-v4-flash, -nano, -pro).")
]
SchemeOption = Annotated[
    str,
    typer.Option(help="Quantisation: native, w4a8, fp8, mxfp4, ptpc-fp8, bf16, none, or a .json file."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout, errors too.")]


def compile_command(
    model: ModelArgument,
    target: Annotated[str, typer.Option(help="What to compile for; `atomc targets` lists them.")] = "cpu",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The artifact's folder.", show_default="MODEL.atom")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Compute dtype: float32 or bfloat16; bfloat16 for a GPU, float32 for the cpu.")
    ] = None,
    scheme: SchemeOption = "native",
    cache_rows: Annotated[
        str | None, typer.Option(help="Window and compressed rows: compute, bf16, fp8.", show_default="the scheme's")
    ] = None,
    index_rows: Annotated[
        str | None, typer.Option(help="Index rows: compute, bf16, fp8, mxfp4.", show_default="the scheme's")
    ] = None,
    scales: Annotated[
        str, typer.Option(help="Scales of weights that are quantised here: amax, or mse (least squared error).")
    ] = "amax",
    calibration: Annotated[
        Path | None, typer.Option(help="A file of `atomc calibrate`: scales by the error of the products on that text.")
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(help="Longest sequence, in tokens.", show_default="the model's, at most 8192")
    ] = None,
    max_batch_tokens: Annotated[int, typer.Option(help="Most tokens of one step.")] = 512,
    max_requests: Annotated[int, typer.Option(help="Most requests of one step.")] = 32,
    max_logit_rows: Annotated[
        int | None,
        typer.Option(help="Most rows of logits of one step.", show_default="--max-batch-tokens, at most 512"),
    ] = None,
    no_weights: Annotated[bool, typer.Option("--no-weights", help="Compile and check without a checkpoint.")] = False,
    dump_ir: Annotated[Path | None, typer.Option(help="Write each region's graph after every pass here.")] = None,
    stop_after: Annotated[str | None, typer.Option(help="Stop after this pass; writes no artifact.")] = None,
    parallel: Annotated[
        list[str] | None,
        typer.Option(help="A layout on many ranks beside that of one: dp=N,tp=N,moe=tp|ep. Once for each."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compile a model for a target into an artifact. Needs no GPU."""
    from atomc.cli.paths import check_folder
    from atomc.targets import get_target

    known = get_target(target)
    _check_positive(
        ("--max-context", max_context), ("--max-batch-tokens", max_batch_tokens), ("--max-requests", max_requests),
        ("--max-logit-rows", max_logit_rows),
    )  # fmt: skip
    path = output or Path(f"{Path(model).resolve().name.removesuffix('.json')}.atom")
    if dump_ir is not None:
        check_folder(dump_ir, "--dump-ir")
    layouts = tuple(parallel or ())
    _check_end(path, stop_after, known, layouts)
    from atomc.compiler import Options

    options = Options(
        dtype=dtype or ("bfloat16" if known.is_gpu else "float32"),
        scheme=scheme, rows=cache_rows or "", index_rows=index_rows or "", scales=scales,
        calibration=calibration,
        max_context=max_context or 0, max_batch_tokens=max_batch_tokens, max_requests=max_requests,
        max_logit_rows=min(max_batch_tokens, 512) if max_logit_rows is None else max_logit_rows,
        with_weights=not no_weights, dump_ir=dump_ir, stop_after=stop_after,
        parallel=layouts,
    )  # fmt: skip
    result, seconds = _compile(model, target, path, options)
    summary = _summary(result, seconds, options)
    if as_json:
        from atomc.cli.console import emit_json

        emit_json(summary)
    else:
        _show(result, summary, options)


def _check_end(output: Path, stop_after: str | None, target: Target, parallel: tuple[str, ...]) -> None:
    """Whether the compile can end as it is asked to, before it starts."""
    from atomc.artifact.store import check_output
    from atomc.cli.failure import OptionError
    from atomc.compiler import CompileError, check_stop
    from atomc.parallel.layout import LayoutError
    from atomc.ranks import layouts_of

    try:
        layouts_of(parallel)
        if stop_after is not None:
            check_stop(stop_after, target, parallel)
    except (CompileError, LayoutError) as error:
        raise OptionError(str(error)) from error
    if stop_after is None:
        check_output(output)


def _check_positive(*limits: tuple[str, int | None]) -> None:
    """Before the model is opened, which takes a while; the compiler knows the upper limits."""
    from atomc.cli.failure import OptionError

    for flag, value in limits:
        if value is not None and value < 1:
            raise OptionError(f"{flag} {value} is out of range: it must be 1 or more.")


def _compile(model: str, target: str, output: Path, options: Options) -> tuple[Result, float]:
    from atomc.cli.console import stages, stderr
    from atomc.compiler import compile_model

    start = time.perf_counter()
    try:
        with stages() as progress:
            result = compile_model(model, target, output, options, progress)
    except BaseException as error:
        for note in getattr(error, "__notes__", ()):  # the finished shards that it leaves take room on the disk
            stderr().print(note, soft_wrap=True, markup=False)
        raise
    return result, time.perf_counter() - start


def _summary(result: Result, seconds: float, options: Options) -> dict[str, Any]:
    """Everything `--json` writes and the panel shows."""
    from atomc.artifact import facts
    from atomc.artifact.store import read_manifest
    from atomc.cli.layouts import as_data
    from atomc.report import matches, nodes

    before, after = nodes(result.explanation)
    summary: dict[str, Any] = {
        "model": result.model, "target": result.target.name, "scheme": options.scheme,
        "output": result.output, "sha256": result.hash,
        "seconds": round(seconds, 3), "peak_rss_bytes": _peak_rss(), "nodes_before": before, "nodes_after": after,
        "matches": matches(result.explanation), "regions": dict.fromkeys(result.explanation, 0),
        "calibrated": result.calibrated, "ranks": [as_data(one) for one in result.ranks],
    }  # fmt: skip
    if result.program is None or result.output is None:
        return summary
    program, regions = result.program, result.regions
    serving = read_manifest(result.output).serving
    weights, state = facts.weights(program, regions), facts.state_bytes(program, serving)
    return summary | {
        "regions": dict(facts.uses(program)),
        "steps": sum(facts.operators(program, regions).values()),
        "parameters": weights.parameters,
        "weights_bytes": weights.bytes,
        "prepared_bytes": weights.prepared,
        "arena_bytes": program.arena_bytes,
        "values_bytes": program.values_bytes,
        "state_bytes_per_request": state.request,
        "state_bytes_per_1024_tokens": state.per_1024_tokens,
        "artifact_bytes": result.bytes,
        "packed": _packed(result),
        "kernels": len(result.kernels),
        "kernel_faults": {f"{result.kernels[key].name} {key}": found for key, found in result.faults.items()},
        "max_context": serving.max_context,
        "max_batch_tokens": serving.max_batch_tokens,
        "max_requests": serving.max_requests,
    }


def _packed(result: Result) -> dict[str, Any] | None:
    """What writing the weights took; None with --no-weights."""
    if (packed := result.packed) is None:
        return None
    return {
        "bytes": packed.bytes, "seconds": round(packed.seconds, 3), "mb_per_second": round(packed.mb_per_second, 1),
        "shards": packed.shards, "resumed_shards": packed.resumed,
    }  # fmt: skip


def _packing(packed: dict[str, Any]) -> str:
    from atomc.artifact.facts import bytes_text
    from atomc.pack import shards_text

    new, resumed = packed["shards"] - packed["resumed_shards"], packed["resumed_shards"]
    wrote = f"{shards_text(new)}, {bytes_text(packed['bytes'])} in {packed['seconds']:.1f} s"
    rate = f" ({packed['mb_per_second']:,.0f} MB/s)" if new else ""
    return wrote + rate + (f"; {shards_text(resumed)} taken over from an interrupted compile" if resumed else "")


def _kernels(count: int, faults: dict[str, list[str]]) -> str:
    """What the assembly says of the kernels; the artifact has them all the same."""
    shown = [f"{name}: {'; '.join(found)}" for name, found in faults.items()]
    more = [f"and {len(shown) - 3} more: --json lists them"] if len(shown) > 3 else []
    return "\n".join([f"{count}, {len(shown) or 'none'} with faults in the assembly", *shown[:3], *more])


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _show(result: Result, summary: dict[str, Any], options: Options) -> None:
    from rich.panel import Panel

    from atomc.artifact.facts import bytes_text
    from atomc.cli.console import facts, stdout
    from atomc.cli.layouts import line

    used = summary["regions"]
    rows = [
        ("regions", f"{len(used)} captured, {sum(used.values())} calls" if result.program else str(len(used))),
        ("graph", f"{summary['nodes_before']:,} nodes captured, {summary['nodes_after']:,} after the passes"),
        ("matches", f"{sum(summary['matches'].values()):,} by {len(summary['matches'])} passes"),
    ]
    if (fit := result.calibrated) is not None:
        rows.append(("scales", f"calibrated for {fit[0]} of {fit[1]} kinds of tensors rounded here, mse for the rest"))
    if result.program is not None:
        sizes = {name: bytes_text(value) for name, value in summary.items() if "bytes" in name}
        packed = "" if options.with_weights else ", not packed (--no-weights)"
        rows += [
            ("parameters", f"{summary['parameters']:,}"),
            ("plan", f"{summary['steps']:,} operators in a step of the model"),
            ("weights", f"{sizes['weights_bytes']}, scheme {summary['scheme']}{packed}"),
            ("a step's memory", f"arena {sizes['arena_bytes']}, values {sizes['values_bytes']}"),
            ("a request's state",
             f"{sizes['state_bytes_per_request']} + {sizes['state_bytes_per_1024_tokens']} per 1,024 tokens"),
            *((f"{one.plan.mesh.ranks} ranks", line(one)) for one in result.ranks),
            *([("packing", _packing(summary["packed"]))] if summary["packed"] else []),
            *([("kernels", _kernels(summary["kernels"], summary["kernel_faults"]))] if result.kernels else []),
            ("artifact", f"{summary['output']}, {sizes['artifact_bytes']}"),
            ("sha256", summary["sha256"]),
        ]  # fmt: skip
    elif options.stop_after:
        rows.append(("stopped after", f"{options.stop_after}; no artifact is written"))
    if options.dump_ir is not None:
        rows.append(("graphs", str(options.dump_ir)))
    rows.append(("took", f"{summary['seconds']:.1f} s, at most {bytes_text(summary['peak_rss_bytes'])} of memory"))
    title = f"{result.model} for {result.target.name}"
    stdout().print(Panel(facts("", rows), title=title, title_align="left", expand=False))
