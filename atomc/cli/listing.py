"""`atomc passes`, `atomc targets` and `atomc schemes`: what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from atomc.cli.compile import JsonOption

if TYPE_CHECKING:
    from atomc.passes.runner import Pass
    from atomc.targets import Target


def targets_command(as_json: JsonOption = False) -> None:
    """List the targets and what atomc knows of each."""
    from dataclasses import asdict

    from atomc.cli.console import emit_json, stdout, table
    from atomc.targets import TARGETS

    if as_json:
        emit_json([asdict(target) for target in TARGETS.values()])
        return
    head = ["target", "product", "arch", "bf16", "fp8", "fp4", "mx", "units", "memory", "bandwidth", "shared"]
    rows = [_target_row(target) for target in TARGETS.values()]
    stdout().print(table("", head, rows, right=(3, 4, 5, 7, 8, 9, 10)))
    stdout().print("Dense peaks in TFLOP/s; memory in 10^9 bytes; cpu figures are nominal.", style="dim")


def _target_row(target: Target) -> list[str]:
    peaks = target.peaks
    rates = ["–" if rate is None else f"{rate / 1e12:,.0f}" for rate in (peaks.bf16, peaks.fp8, peaks.fp4)]
    if peaks.bf16 < 1e13:
        rates[0] = f"{peaks.bf16 / 1e12:.2f}"
    memory, rate = f"{target.memory_bytes / 1e9:,.0f} GB", f"{target.memory_rate / 1e12:.2f} TB/s"
    shared = f"{target.shared_bytes // 1024} KiB" if target.shared_bytes else "–"
    return [
        target.name,
        target.product,
        target.arch,
        *rates,
        target.mx,
        str(target.compute_units),
        memory,
        rate,
        shared,
    ]


def schemes_command(
    name: Annotated[str | None, typer.Argument(help="One scheme; with --json a file that --scheme takes.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the quantisation schemes, or show the rules of one."""
    from atomc.cli.console import emit_json, stdout, table
    from atomc.passes.scheme import DESCRIPTIONS, SCHEMES, get_scheme

    if name is not None:
        scheme = get_scheme(name)
        if as_json:
            emit_json(scheme)
            return
        lines = [[str(i), r.op, r.path, r.weight, r.activation or "as it is"] for i, r in enumerate(scheme.rules, 1)]
        stdout().print(table(DESCRIPTIONS.get(name, ""), ["rule", "op", "path", "weight", "activation"], lines))
        stdout().print(
            f"cache rows: {scheme.rows}; index rows: {scheme.index_rows}; weights without a rule: {scheme.full} dtype",
            style="dim",
        )
        return
    if as_json:
        emit_json(SCHEMES)
        return
    rows = [[s.name, DESCRIPTIONS[s.name], s.rows, s.index_rows] for s in SCHEMES.values()]
    stdout().print(table("", ["scheme", "", "cache rows", "index rows"], rows))
    stdout().print("`atomc explain MODEL --scheme NAME --layouts` shows what each does to every tensor.", style="dim")


def passes_command(
    target: Annotated[str, typer.Option(help="What the compile is for: a GPU has passes of its own.")] = "mi355x",
    as_json: JsonOption = False,
) -> None:
    """List the passes of a compile. In order, each with its contract."""
    from atomc.cli.console import emit_json, stdout, table
    from atomc.passes import pipelines
    from atomc.targets import get_target

    pipeline = pipelines.compilation(target=get_target(target))
    rows = [(str(number), step.label, contract(step)) for number, step in enumerate(pipeline, start=1)]
    if as_json:
        emit_json(
            [
                {
                    "pass": step.label, "contract": contract(step), "fingerprint": step.fingerprint(),
                    "requires": sorted(step.requires), "ensures": sorted(step.ensures), "breaks": sorted(step.breaks),
                }
                for step in pipeline
            ]
        )  # fmt: skip
        return
    stdout().print(table("", ["", "pass", "contract"], rows, right=(0,)))
    stdout().print("`atomc explain` shows what each did to a model; --stop-after takes these names.", style="dim")


def contract(step: Pass) -> str:
    """One line: what a pass does. A fusion says which operator it makes, and what that operator computes."""
    import inspect

    from atomc.ops import OPS
    from atomc.passes.fuse import Fuse

    if isinstance(step, Fuse):
        what = (OPS[step.op].reference.__doc__ or OPS[step.op].schema).strip().partition("\n\n")[0]
        return f"atom.{step.op}: " + " ".join(what.split())
    text = type(step).__doc__ or ""
    if "module's contract" in text or text.startswith("`"):  # the module says it, in its first paragraph
        text = (inspect.getmodule(type(step)) or step).__doc__ or ""
    return " ".join(text.strip().partition("\n\n")[0].split()).removeprefix(f"{type(step).__name__}: ")
