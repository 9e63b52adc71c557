"""Running `atomc` in tests: in this process where that is enough, in one of its own where signals and limits matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-c", "from atomc.cli import main; main()")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "160"}


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout, which must be one JSON document and nothing else."""
        return json.loads(self.out)

    def failed(self, code: int, *said: str) -> None:
        """Asserts a clear error: the exit code, what the message says, no traceback, nothing on stdout."""
        assert self.code == code, (self.code, self.out, self.err)
        assert "Traceback" not in self.err, self.err
        assert self.out == ""
        for text in said:
            assert text in self.err, (text, self.err)


class Cli:
    """`cli("inspect", path)` runs a command in this process and gives back what it printed."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *args: str | Path) -> Ran:
        from atomc.cli.app import app
        from atomc.cli.failure import run

        handler = signal.getsignal(signal.SIGTERM)
        self._capture.readouterr()
        try:
            code = run(app, [str(a) for a in args])
        finally:
            signal.signal(signal.SIGTERM, handler)
        return Ran(code, *self._capture.readouterr())


def environment() -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT}


def start(*args: str | Path, before: Callable[[], None] | None = None, **options: Any) -> subprocess.Popen[str]:
    """A command in a process of its own."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [*PROGRAM, *map(str, args)]
    return subprocess.Popen(command, env=environment(), text=True, preexec_fn=before, **pipes)


def run_apart(*args: str | Path, before: Callable[[], None] | None = None, **options: Any) -> Ran:
    """A command in a process of its own, to its end."""
    process = start(*args, before=before, **options)
    out, err = process.communicate(timeout=300)
    return Ran(process.returncode, out or "", err or "")
