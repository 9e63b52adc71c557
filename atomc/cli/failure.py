"""How a command ends: the one place where errors become messages and exit codes.

An `AtomcError` is the user's to mend: its message on stderr and its `exit_code`; with `--json` the object
`{"error": ...}` on stdout instead, so that stdout is one JSON document whatever happens. Usage errors exit with 2,
Ctrl-C with 130, SIGTERM with 143, a reader of the output that left with 1 and without a word. Any other exception is a
defect of atomc: its traceback is shown, and the exit code is 70.
"""

from __future__ import annotations

import errno
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from types import FrameType
from typing import Any, NoReturn

import typer

from atomc.errors import AtomcError

USAGE, DEFECT, INTERRUPTED, TERMINATED = 2, 70, 128 + signal.SIGINT, 128 + signal.SIGTERM
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)
# typer's own base of all usage errors; older versions take it from click.
_UsageError = typer.BadParameter.__bases__[0]


class OptionError(AtomcError):
    """An option or argument whose value cannot be used; the message names it."""

    exit_code = USAGE


class OutputError(AtomcError):
    """A file that cannot be written; the message names it and says why."""


def run(app: typer.Typer, args: Sequence[str]) -> int:
    """Runs the program; returns its exit code and never raises, but for `SystemExit`."""
    as_json = "--json" in args[: args.index("--")] if "--" in args else "--json" in args
    _prepare_process()
    try:
        code = app(list(args), standalone_mode=False, prog_name="atomc")
        sys.stdout.flush()
    except AtomcError as error:
        return _fail(error.message, error.exit_code, as_json, type(error).__name__, _facts(error) if as_json else {})
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        if error.errno not in _NO_ROOM:
            return _defect()
        return _fail(f"cannot write {error.filename or 'the output'}: {error.strerror}.", 1, as_json, "OSError", {})
    except Exception as error:  # noqa: BLE001  a defect of ours: shown whole, with where to report it
        if isinstance(error, _UsageError):
            return _usage(error, as_json)
        return _defect()
    if code == INTERRUPTED:
        return _fail("interrupted.", INTERRUPTED, as_json, "KeyboardInterrupt", {})
    return code if isinstance(code, int) else 0


def _prepare_process() -> None:
    """SIGTERM unwinds like Ctrl-C does, so that nothing half written is left; any terminal can show any text."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)


def _usage(error: Any, as_json: bool) -> int:
    """What typer calls a usage error: the usage line, and what is wrong."""
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is the message, and typer has printed it
        return USAGE
    context = getattr(error, "ctx", None)
    hint = "" if context is None else f"{context.get_usage()}\nTry `{context.command_path} --help`."
    return _fail(error.format_message(), USAGE, as_json, "UsageError", {}, hint)


def _facts(error: AtomcError) -> dict[str, Any]:
    """The error's own attributes (where, problems, missing, param, code, ...), for programs."""
    import msgspec

    facts: dict[str, Any] = {}
    for name, value in vars(error).items():
        if name != "message" and not name.startswith("_"):
            with suppress(TypeError):  # not data
                facts[name] = msgspec.to_builtins(value)
    return facts


def _fail(message: str, code: int, as_json: bool, kind: str, facts: dict[str, Any], hint: str = "") -> int:
    if as_json:
        from atomc.cli.console import emit_json

        emit_json({"error": {"type": kind, "message": message, "exit_code": code, **facts}})
        return code
    from rich.text import Text

    from atomc.cli.console import stderr

    if hint:
        stderr().print(Text(hint), soft_wrap=True)
    stderr().print(Text.assemble(("error: ", "bold red"), (message, "red")), soft_wrap=True)
    return code


def _defect() -> int:
    traceback.print_exc()
    print(  # noqa: T201
        "\nThis is a defect of atomc itself. Please open an issue with the command, `atomc --version` and all of this.",
        file=sys.stderr,
    )
    return DEFECT
