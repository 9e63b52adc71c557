"""`atomc calibrate`: what enters each product on real text, so that `compile` can choose scales by it."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from atomc.cli.compile import JsonOption
from atomc.cli.engine import MemoryOption, open_engine
from atomc.cli.inspect import ArtifactArgument


def calibrate_command(
    artifact: ArtifactArgument,
    text: Annotated[Path, typer.Argument(help="A .txt, .jsonl or .jsonl.xz file, as `eval` takes it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The calibration file.")] = Path(
        "calibration.safetensors"
    ),
    samples: Annotated[int, typer.Option(min=1, help="Pieces of text to read.")] = 256,
    length: Annotated[int, typer.Option(min=16, help="Characters of a piece.")] = 1024,
    memory: MemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what enters each product. Of an artifact of --scheme none; `compile --calibration` reads it."""
    from atomc.calibrate import calibrate
    from atomc.calibration import write_calibration
    from atomc.cli.console import emit_json, facts, stages, stdout
    from atomc.cli.paths import check_file
    from atomc.cli.texts import pieces, read_documents

    check_file(output, "--output")
    documents = list(itertools.islice(pieces(read_documents(text), length), samples))
    executor, _ = open_engine(artifact, memory=memory)
    with stages() as progress:
        means = calibrate(executor, documents, partial(progress, "tokens"))
    write_calibration(output, means)
    summary = {"output": str(output), "pieces": len(documents), "weights": len(means)}
    if as_json:
        emit_json(summary)
        return
    stdout().print(facts("calibration", [(name, str(value)) for name, value in summary.items()]))
