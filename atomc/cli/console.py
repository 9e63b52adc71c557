"""What the commands print with: consoles, tables, progress on stderr, JSON on stdout. Imported by running commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import msgspec
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

WIDE = 160  # columns of a table that is piped: nothing is cut


@cache
def stdout() -> Console:
    """The console of results."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


@cache
def stderr() -> Console:
    """The console of messages and progress."""
    return Console(stderr=True, highlight=False)


def emit_json(value: object) -> None:
    """One JSON document on stdout."""
    data = msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2)
    sys.stdout.write(data.decode() + "\n")
    sys.stdout.flush()


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Group:
    """A table below its title; the columns `right` hold numbers."""
    made = Table(header_style="bold")
    for position, name in enumerate(head):
        numbers = position in right
        made.add_column(name, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    for row in rows:
        made.add_row(*map(escape, row))
    return Group(*([Text(title, style="bold")] if title else []), made)


def facts(title: str, rows: Sequence[tuple[str, str]]) -> Group:
    """Names and values, without lines."""
    made = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(name, escape(value))
    return Group(*([Text(title, style="bold")] if title else []), made)


class Stages:
    """Progress of work in stages: `stages(name, done, total)`; a total of 0 is unknown."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`stage` is a phase and what it works on: "capture head" is a step of the phase "capture"."""
        phase = stage.partition(" ")[0]
        if phase not in self._tasks:
            for before in self._progress.tasks:  # a new phase begins: the ones before are done
                self._progress.update(before.id, total=before.completed)
            self._tasks[phase] = self._progress.add_task(phase, total=None)
        self._progress.update(self._tasks[phase], description=stage, completed=done, total=total or None)


@contextmanager
def stages() -> Iterator[Stages]:
    """Bars on stderr while the block runs, if that is a terminal; gone when it ends."""
    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=stderr(), transient=True, disable=not stderr().is_terminal) as progress:
        yield Stages(progress)
