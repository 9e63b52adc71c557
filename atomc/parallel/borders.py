"""Borders of regions: what two micro-batches leave under way at the end of one and finish in the next.

A region cut in two ends with a collective of the second half that nothing in the region is left to hide. So what needs
its result moves over the border, and the next region's first half computes meanwhile.

Terms:
    open    the last collective of the second half: started in its region, waited for in the next
    moved   what needs its result, done in the next region before the second half's own beginning
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from atomc.parallel.tasks import Task, TaskGraph


@dataclass(frozen=True)
class Border:
    """The tasks of a region, cut at its end. Without an open collective nothing moves."""

    stays: tuple[Task, ...]
    open: Task | None
    moved: tuple[Task, ...]


def cut(tasks: Sequence[Task]) -> Border:
    """Where a region's tasks are cut: nowhere, if they are of one half, or a collective needs the last one's result."""
    sent = [task for task in tasks if task.stream == "collective" and task.chunk == 1]
    if not sent:
        return Border(tuple(tasks), None, ())
    last = sent[-1]
    moved = {last.name}
    for name, before in TaskGraph(tuple(tasks)).dependences().items():
        if before & moved:
            moved.add(name)
    after = tuple(task for task in tasks if task.name in moved and task is not last)
    if any(task.stream == "collective" for task in after):
        return Border(tuple(tasks), None, ())
    return Border(tuple(task for task in tasks if task.name not in moved or task is last), last, after)


def under_way(task: Task) -> Task:
    """An open collective as the next region sees it: pending, with what it reads and writes held from the start."""
    held = (*task.reads, *task.writes)
    return replace(task, reads=held, writes=task.writes, after=())
