"""`atomc inspect`: what is in an artifact, checked against its manifest."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atomc.cli.compile import JsonOption

if TYPE_CHECKING:
    from atomc.artifact.facts import MemoryPlan
    from atomc.artifact.manifest import Manifest
    from atomc.artifact.plan import ProgramPlan, RegionPlan

ArtifactArgument = Annotated[Path, typer.Argument(help="An artifact's folder, as `atomc compile` writes it.")]


@dataclass(frozen=True)
class Opened:
    """A verified artifact; its weights are not read."""

    folder: Path
    sha256: str
    manifest: Manifest
    program: ProgramPlan
    regions: dict[str, RegionPlan]


def inspect_command(
    artifact: ArtifactArgument,
    plan: Annotated[
        str | None, typer.Option(metavar="REGION", help="Print the steps of this region; with --kernels their costs.")
    ] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="Print the kernels, their work, predicted times.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Draw the memory plan, and for a GPU a roofline, into this HTML file.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests: of the memory plan; with --kernels of a decode step.",
            show_default="the artifact's most; 1, 16, 64, 128",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of each request.", show_default="the artifact's most; with --kernels 4096"),
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(help="Draw predicted steps of --parallel on two streams: HTML, or .json for a Chrome trace."),
    ] = None,
    parallel: Annotated[str, typer.Option(help="The layout of --timeline.")] = "dp=8,moe=tp,tbo=auto",
    as_json: JsonOption = False,
) -> None:
    """Check and show an artifact: facts, files, regions, operators, memory plan; kernels and predicted times."""
    if html is not None:
        from atomc.cli.paths import check_file

        check_file(html, "--html")
    if timeline is not None:
        from atomc.cli.paths import check_file

        check_file(timeline, "--timeline")
    opened = open_artifact(artifact)
    if timeline is not None:
        _draw_timeline(timeline, opened, parallel, batch, context)
    if plan is not None:
        _check_region(opened, plan)
        if kernels and batch is not None:
            from atomc.cli.failure import OptionError

            raise OptionError("--batch is of a whole decode step, and --kernels --plan shows one region's operators.")
    if html is not None:
        from atomc.cli.picture import write_picture

        write_picture(html, opened, context)
    if as_json:
        _emit(opened, kernels, batch, context)
        return
    if kernels:
        from atomc.cli.kernels import show_kernels

        show_kernels(opened, plan, batch, context)
    elif plan is not None:
        _show_plan(opened, plan)
    else:
        _show(opened)
        _show_memory(opened, batch, context)
    for drawn in (html, timeline):
        if drawn is not None:
            typer.echo(f"\nDrawn in {drawn}.")


def _draw_timeline(path: Path, opened: Opened, parallel: str, batch: int | None, context: int | None) -> None:
    from atomc.cli.timeline import draw_artifact

    manifest = opened.manifest
    requests, tokens = batch or manifest.limits.max_requests, context or manifest.limits.max_context
    most = manifest.limits.max_batch_tokens
    draw_artifact(path, opened.folder, manifest.model, manifest.target, parallel, requests, tokens, most)


def _emit(opened: Opened, kernels: bool, batch: int | None, context: int | None) -> None:
    from atomc.cli.console import emit_json

    more: dict[str, Any] = {}
    if kernels:
        from atomc.cli.kernels import kernels_json

        more["predictions"] = kernels_json(opened, batch, context)
    emit_json(_summary(opened) | {"memory_plan": _plan_json(opened, batch, context)} | more)


def _check_region(opened: Opened, name: str) -> None:
    from atomc.cli.failure import OptionError

    if name not in opened.regions:
        raise OptionError(f"--plan {name}: no such region; choose one of {', '.join(opened.regions)}.")


def open_artifact(folder: Path) -> Opened:
    """Read manifest and plan, check the hash of every file and what the plan claims. Raises `ArtifactError`."""
    from atomc.artifact.check import check_program
    from atomc.artifact.store import artifact_hash, read_manifest, verify
    from atomc.cli.console import stages
    from atomc.runtime.loader import read_plan

    manifest = read_manifest(folder)
    with stages() as progress:
        done = iter(range(len(manifest.files)))
        verify(folder, manifest, lambda name: progress(f"check {name}", next(done), len(manifest.files)))
    program, regions = read_plan(folder)
    check_program(str(folder), manifest, program, regions)
    in_order = {call.region: regions[call.region] for call in program.calls}
    return Opened(folder, artifact_hash(folder), manifest, program, in_order)


def _summary(opened: Opened) -> dict[str, Any]:
    from atomc.artifact import facts

    manifest, program, regions = opened.manifest, opened.program, opened.regions
    uses, weights = facts.uses(program), facts.weights(program, regions)
    state = facts.state_bytes(program, manifest.serving)
    return {
        "artifact": opened.folder, "sha256": opened.sha256, "verified": True, "model": manifest.model,
        "target": manifest.target, "dtype": manifest.dtype, "scheme": manifest.scheme, "scales": manifest.scales,
        "with_weights": manifest.with_weights,
        "schema": manifest.schema, "config_sha256": manifest.config_sha256, "tools": manifest.tools,
        "limits": manifest.limits, "serving": manifest.serving, "files": manifest.files,
        "regions": {
            name: {"uses": uses[name], "steps": len(region.steps), "arena_bytes": region.arena_bytes}
            for name, region in regions.items()
        },
        "operators": dict(facts.operators(program, regions).most_common()),
        "memory": {
            "parameters": weights.parameters, "weights_bytes": weights.bytes, "prepared_bytes": weights.prepared,
            "arena_bytes": program.arena_bytes,
            "values_bytes": program.values_bytes, "state_bytes_per_request": state.request,
            "state_bytes_per_1024_tokens": state.per_1024_tokens,
        },
    }  # fmt: skip


def _show(opened: Opened) -> None:
    from atomc.artifact.facts import bytes_text
    from atomc.artifact.facts import operators as operators_of
    from atomc.artifact.facts import uses as uses_of
    from atomc.cli.console import facts, stdout, table

    manifest, program = opened.manifest, opened.program
    console = stdout()
    console.print(facts(f"{manifest.model} for {manifest.target}", _facts(opened)))
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for name, entry in manifest.files.items():
        groups[f"{name.split('/')[0]}/" if "/" in name else name].append(entry.bytes)
    rows = [[name, str(len(sizes)), bytes_text(sum(sizes))] for name, sizes in groups.items()]
    console.print()
    console.print(
        table(f"{len(manifest.files)} files, every sha256 as in the manifest", ["", "files", "bytes"], rows, (1, 2))
    )
    uses = uses_of(program)
    regions = [[n, str(uses[n]), str(len(r.steps)), bytes_text(r.arena_bytes)] for n, r in opened.regions.items()]
    console.print()
    console.print(table("regions", ["region", "uses", "steps", "arena at the largest step"], regions, right=(1, 2, 3)))
    count = operators_of(program, opened.regions).most_common()
    console.print()
    rows = [[op.removesuffix(".default"), str(calls)] for op, calls in count]
    console.print(table(f"{sum(n for _, n in count):,} operators of a step", ["operator", "calls"], rows, right=(1,)))


def _facts(opened: Opened) -> list[tuple[str, str]]:
    from atomc.artifact import facts
    from atomc.artifact.facts import bytes_text

    manifest, program = opened.manifest, opened.program
    limits, serving = manifest.limits, manifest.serving
    weights, state = facts.weights(program, opened.regions), facts.state_bytes(program, serving)
    whole = limits.max_requests * state.at(limits.max_context)
    ratios = "/".join(str(r) for r in (serving.csa_ratio, serving.hca_ratio) if r) or "none"
    step = f"{limits.max_batch_tokens:,} tokens, {limits.max_requests:,} requests, {limits.max_logit_rows:,} logit rows"
    pages = f"window {serving.window} in pages of {serving.window_page}, blocks of {serving.block_tokens} tokens"
    packed = "" if manifest.with_weights else "; not in the artifact (--no-weights)"
    count = f"{weights.parameters:,} parameters in {weights.tensors:,} tensors"
    return [
        ("artifact", f"{opened.folder}, schema {manifest.schema}"),
        ("sha256", opened.sha256),
        ("model config", f"sha256 {manifest.config_sha256}"),
        ("compiled by", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())),
        ("limits", f"{limits.max_context:,} tokens of context; a step: {step}"),
        ("caches", f"{pages}, compression {ratios}"),
        ("computes in", f"{manifest.dtype}, quantisation scheme {manifest.scheme['name']}"),
        ("weights", f"{count}, {bytes_text(weights.bytes)} packed, {bytes_text(weights.prepared)} prepared{packed}"),
        ("a step", f"arena {bytes_text(program.arena_bytes)}, values {bytes_text(program.values_bytes)}"),
        ("a request's state", f"{bytes_text(state.request)} + {bytes_text(state.per_1024_tokens)} per 1,024 tokens"),
        ("all state", f"{bytes_text(whole)} for {limits.max_requests} requests of {limits.max_context:,} tokens"),
    ]


def _show_plan(opened: Opened, name: str) -> None:
    from atomc.cli.plan_text import plan_lines

    for line in plan_lines(opened.regions[name]):
        typer.echo(line)


def _memory_of(opened: Opened, batch: int | None, context: int | None) -> tuple[int, int, MemoryPlan]:
    """Requests, tokens of each, and what they need. The flags may exceed the artifact's limits: it is arithmetic."""
    from atomc.artifact.facts import memory_plan

    limits = opened.manifest.limits
    requests, tokens = batch or limits.max_requests, context or limits.max_context
    return requests, tokens, memory_plan(opened.program, opened.regions, opened.manifest.serving, requests, tokens)


def _plan_json(opened: Opened, batch: int | None, context: int | None) -> dict[str, int]:
    from dataclasses import asdict

    requests, tokens, plan = _memory_of(opened, batch, context)
    sizes = {f"{name}_bytes": size for name, size in asdict(plan).items()}
    return {"requests": requests, "context": tokens, **sizes, "total_bytes": plan.total}


def _show_memory(opened: Opened, batch: int | None, context: int | None) -> None:
    from dataclasses import asdict

    from atomc.artifact.facts import bytes_text
    from atomc.cli.console import stdout, table
    from atomc.targets import get_target

    requests, tokens, plan = _memory_of(opened, batch, context)
    target = get_target(opened.manifest.target)
    what = {
        "weights": "packed, as in the artifact", "prepared": "made of the weights when they are loaded",
        "rows": "compressed rows and index rows", "window": "window rows, in whole pages",
        "partial": "unfinished windows of the compressors", "arena": "temporaries of the largest step",
        "values": "between regions, at the largest step",
    }  # fmt: skip
    rows = [[name, bytes_text(size), f"{size:,}", what[name]] for name, size in asdict(plan).items()]
    share = f"{plan.total / target.memory_bytes:.1%} of a {target.product}" if target.is_gpu else ""
    rows.append(["total", bytes_text(plan.total), f"{plan.total:,}", share])
    title = f"memory of {requests:,} requests of {tokens:,} tokens"
    stdout().print()
    stdout().print(table(title, ["", "size", "bytes", ""], rows, right=(1, 2)))
