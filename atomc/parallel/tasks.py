"""Tasks of a step on two streams: what the scheduler orders, what a schedule is, and when each task runs.

Contract:
    A device has a compute stream and a communication stream; each runs what is issued to it in order. The host issues
    one sequence: `run` a compute task, `start` a collective, `wait` for it. A collective begins when the one before it
    is over and all compute that was issued before its start; a wait holds the compute stream until the collective is
    over. That is what the functional collectives of torch.distributed do, eager or captured in a graph. While both
    streams run, each task does `beside` of its work in a second: a collective takes compute units and memory bandwidth.
    A compute task that the host waits for (sizes that it reads) needs no rule of its own: it stands on the compute
    stream, so that nothing issued later runs before it is over; what the host takes to start again is in its seconds.

Terms:
    buffer    memory of the step, by name, with its bytes; a name without bytes is state, which lives outside the step
    exposed   seconds in which the compute stream idles because it waits, counted for the collective that runs then
    bubble    any idle time of a stream between its first and its last task
    pending   a collective that was started before these tasks and is under way; open: one that is waited for after them
    live      a buffer is live from the issue that writes it first until its last reader is issued; a collective reads
              and writes until its wait
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from atomc.errors import AtomcError

Stream = Literal["compute", "collective"]
Action = Literal["run", "start", "wait"]


class TaskError(AtomcError):
    """Tasks or a schedule that mean nothing; the message names the task."""


@dataclass(frozen=True)
class Task:
    """One operation.

    Attributes:
        name: unique in its graph. seconds: what it takes alone on its stream.
        reads, writes: names of buffers and state. after: tasks that must precede it beside those it reads from.
        chunk: the micro-batch that it belongs to. where: line of the model, for pictures.
        beside: share of its speed that it keeps while the other stream runs. power: seconds that it takes of the
            device's power; all tasks together take at least the sum of them.
    """

    name: str
    stream: Stream
    seconds: float
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    chunk: int = 0
    where: str = ""
    beside: float = 1.0
    power: float = 0.0


@dataclass(frozen=True)
class TaskGraph:
    """Tasks in an order that is legal: what reads a name reads what the last task before it wrote.

    Attributes:
        buffers: name -> bytes. results: buffers that outlive the tasks.
        pending: collectives that start before all other tasks. open: collectives that need no wait here.
    """

    tasks: tuple[Task, ...]
    buffers: Mapping[str, int] = field(default_factory=dict)
    results: frozenset[str] = frozenset()
    pending: tuple[str, ...] = ()
    open: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        known = set(names)
        if len(known) != len(names):
            raise TaskError(f"two tasks are called {next(n for n in names if names.count(n) > 1)}.")
        for task in self.tasks:
            if not 0 <= task.seconds < float("inf"):
                raise TaskError(f"{task.name} takes {task.seconds} seconds.")
            if not 0 < task.beside <= 1:
                raise TaskError(f"{task.name} keeps {task.beside} of its speed.")
            if unknown := [name for name in task.after if name not in known]:
                raise TaskError(f"{task.name} is to run after {unknown[0]}, which is no task.")

    def dependences(self) -> dict[str, set[str]]:
        """For each task the tasks that must precede it: by what it reads, overwrites, or is told."""
        before: dict[str, set[str]] = {}
        writer: dict[str, str] = {}
        readers: dict[str, set[str]] = {}
        for task in self.tasks:
            edges = set(task.after)
            edges |= {writer[name] for name in (*task.reads, *task.writes) if name in writer}
            for name in task.writes:
                edges |= readers.pop(name, set())
                writer[name] = task.name
            for name in task.reads:
                if name not in task.writes:
                    readers.setdefault(name, set()).add(task.name)
            before[task.name] = edges - {task.name}
        return before

    def in_order(self, order: Iterable[str] | None = None) -> list[Issue]:
        """The tasks in the order given, or in another, each collective waited for at once: no overlap at all."""
        streams = {task.name: task.stream for task in self.tasks}
        issues: list[Issue] = []
        for name in streams if order is None else order:
            if streams[name] == "compute":
                issues.append(Issue("run", name))
                continue
            issues.append(Issue("start", name))
            if name not in self.open:
                issues.append(Issue("wait", name))
        return issues


class Cost(NamedTuple):
    """What a task takes, as in `Task`."""

    seconds: float
    beside: float = 1.0
    power: float = 0.0


class Issue(NamedTuple):
    """One entry of the host's sequence."""

    action: Action
    task: str


class Span(NamedTuple):
    """When a task runs, in seconds from the start of the step."""

    start: float
    end: float


@dataclass(frozen=True)
class WhyNoOverlap:
    """Why a collective is not wholly hidden: seconds exposed, the reason, the tasks that the reason names."""

    task: str
    exposed: float
    reason: str
    by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """A sequence of issues of a graph's tasks, and what it takes.

    Attributes:
        spans: when each task runs. exposed: collective -> seconds. seconds: of the whole.
        throttled: of them, those that the device takes longer than its streams because of its power.
        live: bytes of live buffers after each issue; peak: the most, while a task runs.
        why: of each collective that is exposed.
    """

    graph: TaskGraph
    issues: tuple[Issue, ...]
    spans: Mapping[str, Span]
    exposed: Mapping[str, float]
    live: tuple[int, ...]
    peak: int
    seconds: float
    why: tuple[WhyNoOverlap, ...] = ()
    throttled: float = 0.0

    @property
    def communication(self) -> float:
        """Seconds of all collectives, each alone."""
        return sum(task.seconds for task in self.graph.tasks if task.stream == "collective")

    @property
    def hidden(self) -> float:
        """Seconds of collectives, each alone, that do not hold the compute stream up."""
        return self.communication - sum(self.exposed.values())

    @property
    def computed(self) -> float:
        """When the compute stream is free for what comes after; open collectives may last longer."""
        ended = [self.spans[t.name].end for t in self.graph.tasks if t.stream == "compute"]
        ended += [self.spans[name].end for action, name in self.issues if action == "wait"]
        return max(ended, default=0.0)

    def bubbles(self, stream: Stream) -> list[Span]:
        """Gaps of a stream between its tasks."""
        busy = sorted(self.spans[task.name] for task in self.graph.tasks if task.stream == stream)
        return [Span(a.end, b.start) for a, b in itertools.pairwise(busy) if b.start > a.end]


def simulate(graph: TaskGraph, issues: Iterable[Issue]) -> Schedule:
    """When each task runs, what is exposed, and what is live. The sequence must be legal; the scheduler sees to that.

    Raises:
        TaskError: an issue is not of this graph, comes twice or does not fit its task; or one is missing.
    """
    tasks = {task.name: task for task in graph.tasks}
    memory, sequence = Memory(graph), tuple(issues)
    started: set[str] = set()
    waited: set[str] = set()
    live: list[int] = []
    for action, name in sequence:
        _check(tasks, started, waited, action, name)
        (waited if action == "wait" else started).add(name)
        memory.issue(Issue(action, name))
        live.append(memory.live)
    collectives = [task.name for task in graph.tasks if task.stream == "collective"]
    unused = [n for n in tasks if n not in started] + [c for c in collectives if c not in waited | graph.open]
    if unused:
        raise TaskError(f"{unused[0]} is never {'waited for' if unused[0] in started else 'issued'}.")
    spans, gaps = _Streams(tasks, sequence).run()
    exposed = dict.fromkeys(collectives, 0.0)
    for at, _, seconds in meetings([spans[name] for name in collectives], gaps):
        exposed[collectives[at]] += seconds
    end = max((span.end for span in spans.values()), default=0.0)
    throttled = max(0.0, sum(task.power for task in graph.tasks) - end)
    return Schedule(graph, sequence, spans, exposed, tuple(live), memory.peak, end + throttled, (), throttled)


class _Streams:
    """The clock of both streams: what is issued to each, in order, and what it must wait for."""

    def __init__(self, tasks: Mapping[str, Task], issues: Sequence[Issue]) -> None:
        self.tasks = tasks
        self.queues: dict[Stream, deque[tuple[str, list[str]]]] = {"compute": deque(), "collective": deque()}
        waits: list[str] = []
        runs: list[str] = []
        for action, name in issues:
            if action == "wait":
                waits.append(name)
            elif action == "run":
                self.queues["compute"].append((name, waits))
                waits, runs = [], [name]
            else:
                self.queues["collective"].append((name, runs))
        self.last = waits  # after the last compute
        self.running: dict[Stream, str] = {}
        self.started: dict[str, float] = {}
        self.ends: dict[str, float] = {}  # of what is over, and of what runs if nothing changes
        self.over: set[str] = set()

    def run(self) -> tuple[dict[str, Span], list[Span]]:
        """When each task runs; when compute idles because it waits."""
        now = 0.0
        order: list[str] = []
        while True:
            for stream, queue in self.queues.items():
                if stream not in self.running and queue and self.over.issuperset(queue[0][1]):
                    name, _ = queue.popleft()
                    self._start(stream, name, now)
                    order += [name] if stream == "compute" else []
            if not self.running:
                break
            now = min(self.ends[name] for name in self.running.values())
            for stream, name in list(self.running.items()):
                if self.ends[name] <= now:
                    self._stop(stream, name, now)
        spans = {name: Span(start, self.ends[name]) for name, start in self.started.items()}
        return spans, list(self._gaps(spans, order))

    def _start(self, stream: Stream, name: str, now: float) -> None:
        self.started[name] = now
        self.ends[name] = now + self.tasks[name].seconds
        self.running[stream] = name
        self._change(now, slower=True)

    def _stop(self, stream: Stream, name: str, now: float) -> None:
        self._change(now, slower=False)
        del self.running[stream]
        self.over.add(name)

    def _change(self, now: float, *, slower: bool) -> None:
        """Both streams run from now on, or no longer do: what is left of each task lasts longer, or less long."""
        for name in self.running.values() if len(self.running) == 2 else ():
            left, beside = max(0.0, self.ends[name] - now), self.tasks[name].beside
            if beside != 1.0 and left:
                self.ends[name] = now + (left / beside if slower else left * beside)

    def _gaps(self, spans: Mapping[str, Span], order: Sequence[str]) -> Iterator[Span]:
        at = 0.0
        for name in order:
            if spans[name].start > at:
                yield Span(at, spans[name].start)
            at = spans[name].end
        end = max((spans[name].end for name in self.last), default=0.0)
        if end > at:
            yield Span(at, end)


def meetings(a: Sequence[Span], b: Sequence[Span]) -> Iterator[tuple[int, int, float]]:
    """Pairs of a span of a and one of b that meet, by their places, and for how long; spans of one side do not meet."""
    rows, columns = (sorted(range(len(s)), key=s.__getitem__) for s in (a, b))
    i = j = 0
    while i < len(rows) and j < len(columns):
        x, y = a[rows[i]], b[columns[j]]
        if (seconds := min(x.end, y.end) - max(x.start, y.start)) > 0:
            yield rows[i], columns[j], seconds
        i, j = (i + 1, j) if x.end <= y.end else (i, j + 1)


def _check(tasks: Mapping[str, Task], started: set[str], waited: set[str], action: Action, name: str) -> None:
    if name not in tasks:
        raise TaskError(f"{action} {name}: no such task.")
    if (action == "run") != (tasks[name].stream == "compute"):
        raise TaskError(f"{action} {name}: it is a {tasks[name].stream} task.")
    if (action == "wait") == (name not in started) or name in waited:
        raise TaskError(f"{action} {name}: {'it has not started' if name not in started else 'a second time'}.")


class Memory:
    """Bytes of live buffers while a graph's tasks are issued.

    Attributes:
        live: now. peak: the most so far, counting what a task reads and writes at a time.
    """

    def __init__(self, graph: TaskGraph) -> None:
        self._graph = graph
        self._of = {t.name: frozenset(n for n in (*t.reads, *t.writes) if n in graph.buffers) for t in graph.tasks}
        self._uses: dict[str, int] = {}
        written: set[str] = set()
        given: set[str] = set()
        for task in graph.tasks:
            for name in self._of[task.name]:
                self._uses[name] = self._uses.get(name, 0) + 1
            given |= {name for name in task.reads if name in graph.buffers and name not in written}
            written |= set(task.writes)
        self._held = given
        self.live = self.peak = sum(graph.buffers[name] for name in given)

    def needs(self, name: str) -> int:
        """Bytes that the issue of a task adds."""
        return sum(self._graph.buffers[b] for b in self._of[name] - self._held)

    def issue(self, issue: Issue) -> None:
        """Count an issue."""
        buffers = self._of[issue.task]
        if issue.action != "wait":
            self.live += self.needs(issue.task)
            self._held |= buffers
            self.peak = max(self.peak, self.live)
        if issue.action != "start":
            for name in buffers:
                self._uses[name] -= 1
                if not self._uses[name] and name not in self._graph.results:
                    self._held.discard(name)
                    self.live -= self._graph.buffers[name]
