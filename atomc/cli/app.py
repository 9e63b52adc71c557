"""The `atomc` program: its commands, and how it is entered. Modules of commands import what is heavy inside them."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from atomc import __version__
from atomc.cli.calibrate import calibrate_command
from atomc.cli.compile import compile_command
from atomc.cli.evaluate import eval_command
from atomc.cli.explain import explain_command
from atomc.cli.failure import run
from atomc.cli.generate import generate_command
from atomc.cli.inspect import inspect_command
from atomc.cli.listing import passes_command, schemes_command, targets_command
from atomc.cli.plan import plan_command
from atomc.cli.serve import serve_command
from atomc.cli.verify import verify_command

app = typer.Typer(
    name="atomc",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich's help takes twice as long to come
    pretty_exceptions_enable=False,  # failure.run decides what an exception looks like
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in (
    ("compile", compile_command),
    ("generate", generate_command),
    ("serve", serve_command),
    ("inspect", inspect_command),
    ("plan", plan_command),
    ("explain", explain_command),
    ("verify", verify_command),
    ("eval", eval_command),
    ("calibrate", calibrate_command),
    ("passes", passes_command),
    ("targets", targets_command),
    ("schemes", schemes_command),
):
    app.command(_name)(_command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"atomc {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compile DeepSeek-V4 ahead of time, without the GPU, and serve it."""


def main() -> None:
    """The entry point of the `atomc` program."""
    code = run(app, sys.argv[1:])
    if "atomc.runtime.ranks" in sys.modules:  # what is left of a run is torch, which takes seconds to end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
