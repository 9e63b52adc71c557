"""Overlap: the order in which a step's tasks are issued to two streams, so that compute hides communication.

Contract:
    Pure: tasks in, a sequence of issues out; nothing of the tasks changes. Every dependence is kept: by what a task
    reads and overwrites, state included, and by what it is told. A collective starts as soon as all that it needs has
    been issued; its wait stands right before the first task that needs it. The peak of live buffers stays within the
    limit. A collective that the graph leaves open is started here and waited for by what comes after; one that is
    pending was started before. Equal graphs give equal schedules. What is not hidden has a reason (`WhyNoOverlap`), and
    a caller that requires overlap gets an error with the reasons where there is none, never a schedule that silently
    has none.

Terms:
    priority   of a task: seconds of the longest chain of dependent tasks from its start to the end (the critical path),
               or from its end (Jackson's rule: of two, the one with more to follow); or none, the order given
    window     how far ahead of the first not yet issued, in the order given, compute may be issued; it bounds memory

Pseudo-code:
    for each rule (a priority, a window):                  list scheduling
        while tasks are left:
            start every collective whose predecessors are issued, the highest priority first
            of the compute tasks that may run, issue the one that stalls least, then the highest priority
            before it, wait for the collectives that it needs
            if memory lets none run, wait for a collective, whose arguments it frees
    the order given is one of the candidates (a window of one); where streams slow one another, or memory is bounded, so
        is each collective waited for at once: the result is never slower than that
    keep the fastest schedule within the memory limit, of equals the one with the lower peak; look no further after
        one that takes no longer than the longest chain, or all compute. What is left open may last as long after the
        end of compute as it takes: what comes after is given it whole
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import networkx as nx

from atomc.parallel.tasks import (
    Action,
    Issue,
    Memory,
    Schedule,
    Stream,
    Task,
    TaskGraph,
    WhyNoOverlap,
    meetings,
    simulate,
)
from atomc.passes.graph import PassError

WINDOWS = (None, 32, 8, 1)  # more of them where memory is bounded
TIGHT = (16, 4, 2)
ROUNDING = 1e-9  # of sums in another order
NOTHING = 1e-12  # seconds: a collective exposed for less is hidden


class OverlapError(PassError):
    """No schedule: the tasks wait for one another, memory does not suffice, or nothing could be hidden."""


def overlap(graph: TaskGraph, limit: int | None = None, *, require: bool = False) -> Schedule:
    """The fastest schedule found.

    Args:
        limit: most bytes of live buffers; None: any. require: something must be hidden.
    Raises:
        OverlapError: a cycle, with its tasks; or no order found is within the limit; or nothing is hidden though
            it is required, with the reason of each collective.
    """
    problem = _Problem(graph)
    found = list(_candidates(problem, limit))
    if not found:
        peak = simulate(graph, graph.in_order(problem.order)).peak
        raise OverlapError(f"the tasks take {peak:,} bytes in the order given, and no order found takes {limit:,}.")
    best = min(found, key=problem.cost)
    free = best if limit is None else min(_candidates(problem, None), key=problem.cost)
    best = replace(best, why=tuple(_reasons(problem, best, free)))
    closed = {task.name: task.seconds for task in graph.tasks if task.stream == "collective"}
    hidden = sum(closed[name] - best.exposed[name] for name in closed.keys() - graph.open)
    if require and best.communication > 0 and hidden <= NOTHING:
        reasons = "; ".join(f"{why.task}: {why.reason}" for why in best.why)
        raise OverlapError(f"no communication is hidden. {reasons}.")
    return best


class _Problem:
    """A graph with what scheduling asks of it again and again."""

    def __init__(self, graph: TaskGraph) -> None:
        self.graph = graph
        self.tasks = {task.name: task for task in graph.tasks}
        self.index = {task.name: i for i, task in enumerate(graph.tasks)}
        self.before = graph.dependences()
        self.dag = nx.DiGraph()
        self.dag.add_nodes_from(self.tasks)
        for name, edges in self.before.items():
            self.dag.add_edges_from((edge, name) for edge in sorted(edges, key=self.index.__getitem__))
        try:
            self.order = list(nx.lexicographical_topological_sort(self.dag, key=self.index.__getitem__))
        except nx.NetworkXUnfeasible:
            cycle = " -> ".join(a for a, _ in nx.find_cycle(self.dag))
            raise OverlapError(f"the tasks wait for one another: {cycle}.") from None
        self.level = self._levels(frozenset())
        compute = sum(task.seconds for task in graph.tasks if task.stream == "compute")
        self.bound = max(compute, *self._levels(graph.open).values(), 0.0)  # no order costs less
        self.left_open = sum(self.tasks[name].seconds for name in graph.open)

    def _levels(self, without: frozenset[str]) -> dict[str, float]:
        """Seconds of the longest chain from the start of each task to the end, some tasks taking none."""
        level: dict[str, float] = {}
        for name in reversed(self.order):
            after = max((level[n] for n in self.dag.successors(name)), default=0.0)
            level[name] = after + (0.0 if name in without else self.tasks[name].seconds)
        return level

    def cost(self, schedule: Schedule) -> tuple[float, int]:
        """What is least: seconds, those that open collectives may last longer left out; then bytes."""
        if not self.graph.open:
            return schedule.seconds - schedule.throttled, schedule.peak
        return max(schedule.computed, schedule.seconds - schedule.throttled - self.left_open), schedule.peak

    def related(self, name: str) -> set[str]:
        """Tasks that must precede or follow one, and itself."""
        return {name, *nx.ancestors(self.dag, name), *nx.descendants(self.dag, name)}


def _candidates(problem: _Problem, limit: int | None) -> Iterator[Schedule]:
    """Schedules within the limit, one for each rule; none after one that no order can beat."""
    seen: set[tuple[Issue, ...]] = set()
    flat = dict.fromkeys(problem.tasks, 0.0)
    tail = {name: level - problem.tasks[name].seconds for name, level in problem.level.items()}
    priorities: tuple[Mapping[str, float], ...] = (problem.level, tail, flat)
    windows = WINDOWS if limit is None else WINDOWS + TIGHT
    for window, priority in itertools.product(windows, priorities):
        issues = _list_schedule(problem, limit, window, priority)
        if issues is None or tuple(issues) in seen:
            continue
        seen.add(tuple(issues))
        found = simulate(problem.graph, issues)
        if limit is None or found.peak <= limit:
            yield found
            if problem.cost(found)[0] <= problem.bound * (1 + ROUNDING):
                return
    slowing = any(task.beside < 1 for task in problem.graph.tasks)
    if slowing or limit is not None:
        blocking = simulate(problem.graph, problem.graph.in_order(problem.order))
        if limit is None or blocking.peak <= limit:
            yield blocking


def _list_schedule(
    problem: _Problem, limit: int | None, window: int | None, priority: Mapping[str, float]
) -> list[Issue] | None:
    """One run of list scheduling; None where the limit leaves nothing that may be issued."""
    state = _State(problem, limit, window, priority)
    while state.left:
        while (name := state.next_collective()) is not None:
            state.start(name)
        if not state.left:
            break
        if (name := state.next_compute()) is not None:
            state.run(name)
        elif not state.wait_for_memory():
            return None
    state.finish()
    return state.issues


class _State:
    """A list schedule in the making."""

    def __init__(self, problem: _Problem, limit: int | None, window: int | None, priority: Mapping[str, float]) -> None:
        self.problem, self.limit, self.window, self.priority = problem, limit, window, priority
        self.memory, self.place = Memory(problem.graph), problem.index
        self.missing = {name: len(edges) for name, edges in problem.before.items()}
        self.ready = {name for name, count in self.missing.items() if not count}
        self.left = len(problem.tasks)
        self.first = 0  # place in the order of the first compute task not issued
        self.issued: set[str] = set()
        self.waited: set[str] = set()
        self.ends: dict[str, float] = {}
        self.compute = self.communication = 0.0
        self.issues: list[Issue] = []

    def next_collective(self) -> str | None:
        return self._best("collective")

    def next_compute(self) -> str | None:
        return self._best("compute")

    def _best(self, stream: Stream) -> str | None:
        names = [n for n in self.ready if self.problem.tasks[n].stream == stream and self._allowed(n)]
        return min(names, key=self._rank, default=None)

    def _allowed(self, name: str) -> bool:
        compute = self.problem.tasks[name].stream == "compute"
        if compute and self.window is not None and self.place[name] - self.first >= self.window:
            return False
        return self.limit is None or self.memory.live + self.memory.needs(name) <= self.limit

    def _rank(self, name: str) -> tuple[float, float, int]:
        """The lowest is issued first: what is under way, what stalls least, then by priority, then the order given."""
        if name in self.problem.graph.pending:
            return -1.0, 0.0, self.place[name]
        available = max((self.ends[c] for c in self._unwaited(name)), default=0.0)
        stall = 0.0 if self.problem.tasks[name].stream == "collective" else max(0.0, available - self.compute)
        return stall, -self.priority[name], self.place[name]

    def _unwaited(self, name: str) -> list[str]:
        """Collectives that a compute task needs and nothing has waited for."""
        before = self.problem.before[name]
        return [c for c in before if self.problem.tasks[c].stream == "collective" and c not in self.waited]

    def start(self, name: str) -> None:
        self.communication = max(self.compute, self.communication) + self.problem.tasks[name].seconds
        self.ends[name] = self.communication
        self._issue("start", name)

    def run(self, name: str) -> None:
        for collective in sorted(self._unwaited(name), key=lambda c: (self.ends[c], self.place[c])):
            self._wait(collective)
        self.compute += self.problem.tasks[name].seconds
        self._issue("run", name)

    def _wait(self, name: str) -> None:
        self.waited.add(name)
        self.compute = max(self.compute, self.ends[name])
        self._record(Issue("wait", name))

    def wait_for_memory(self) -> bool:
        """Wait for the first collective under way, so that what it reads may be freed; whether there was one."""
        if under_way := self._under_way():
            self._wait(under_way[0])
        return bool(under_way)

    def finish(self) -> None:
        """Wait for what nothing has waited for."""
        for name in self._under_way():
            if name not in self.problem.graph.open:
                self._wait(name)

    def _under_way(self) -> list[str]:
        return sorted(self.ends.keys() - self.waited, key=lambda c: (self.ends[c], self.place[c]))

    def _issue(self, action: Action, name: str) -> None:
        self._record(Issue(action, name))
        self.ready.remove(name)
        self.issued.add(name)
        self.left -= 1
        tasks = self.problem.graph.tasks
        while self.first < len(tasks) and (
            tasks[self.first].stream == "collective" or tasks[self.first].name in self.issued
        ):
            self.first += 1
        for follower in self.problem.dag.successors(name):
            self.missing[follower] -= 1
            if not self.missing[follower]:
                self.ready.add(follower)

    def _record(self, issue: Issue) -> None:
        self.memory.issue(issue)
        self.issues.append(issue)


# -- reasons -----------------------------------------------------------------------------------------------------------


def _reasons(problem: _Problem, best: Schedule, free: Schedule) -> Iterator[WhyNoOverlap]:
    for name, seconds in best.exposed.items():
        if seconds > NOTHING:
            reason, by = _reason(problem, best, free, name)
            yield WhyNoOverlap(name, seconds, reason, by)


def _reason(problem: _Problem, best: Schedule, free: Schedule, name: str) -> tuple[str, tuple[str, ...]]:
    task = problem.tasks[name]
    related = problem.related(name)
    work = [t for t in problem.graph.tasks if t.stream == "compute" and t.name not in related and t.seconds > 0]
    total = sum(t.seconds for t in work)
    if not work:
        return "no compute is independent of it", ()
    if total < task.seconds - NOTHING:
        text = f"compute independent of it takes {total * 1e6:.1f} us, it takes {task.seconds * 1e6:.1f} us"
        return text, tuple(t.name for t in work)
    if free.exposed[name] < best.exposed[name] - NOTHING:
        return f"the memory limit; without it {free.exposed[name] * 1e6:.1f} us would be exposed", ()
    others = [c.name for c in problem.graph.tasks if c.stream == "collective" and c.name != name]
    spans = [best.spans[t.name] for t in work]
    met = {at for at, _, seconds in meetings([best.spans[c] for c in others], spans) if seconds > NOTHING}
    if met:
        return "compute independent of it hides other collectives", tuple(others[at] for at in sorted(met))
    return "the order found uses the compute that is independent of it elsewhere", tuple(t.name for t in work)


__all__ = ["OverlapError", "Schedule", "Task", "TaskGraph", "WhyNoOverlap", "overlap"]
