"""Whether a schedule is legal, checked by brute force: every pair of tasks that conflict, every order of a tiny graph.

Nothing here is shared with the scheduler: conflicts are recomputed pair by pair, and what happens before what is a
transitive closure over the rules of the two streams.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from atomc.parallel.tasks import Issue, Task, TaskGraph


def conflicts(graph: TaskGraph) -> Iterator[tuple[str, str]]:
    """Pairs of tasks that must keep their order: one writes what the other reads or writes, or is told so."""
    for (i, a), (j, b) in itertools.permutations(enumerate(graph.tasks), 2):
        touched = bool(set(a.writes) & (set(b.reads) | set(b.writes)) or set(a.reads) & set(b.writes))
        if (i < j and touched) or a.name in b.after:
            yield a.name, b.name


def happens_before(graph: TaskGraph, issues: list[Issue]) -> set[tuple[str, str]]:
    """Pairs (a, b) where a is over when b begins, by the rules of the streams, whatever anything takes."""
    direct: set[tuple[str, str]] = set()
    for later, (action, name) in enumerate(issues):
        if action == "wait":
            continue
        for earlier, before in issues[:later]:
            # Compute: what ran, what was waited for. A collective: these, and the collectives before it.
            if earlier in ("run", "wait") or action == "start":
                direct.add((before, name))
    names = [task.name for task in graph.tasks]
    closed = set(direct)
    for k, i, j in itertools.product(names, repeat=3):
        if (i, k) in closed and (k, j) in closed:
            closed.add((i, j))
    return closed


def faults(graph: TaskGraph, issues: list[Issue]) -> list[str]:
    """What is wrong with a sequence of issues; empty if it is legal."""
    wanted = sorted(
        [("run", t.name) for t in graph.tasks if t.stream == "compute"]
        + [(action, t.name) for t in graph.tasks if t.stream == "collective" for action in ("start", "wait")]
    )
    if sorted((a, n) for a, n in issues) != wanted:
        return ["a task is missing, doubled or of the wrong kind"]
    before = happens_before(graph, issues)
    found = [f"{b} may begin before {a} is over" for a, b in conflicts(graph) if (a, b) not in before]
    position = {issue: i for i, issue in enumerate(issues)}
    late = [n for a, n in issues if a == "start" and position[Issue("wait", n)] < position[Issue("start", n)]]
    return found + [f"{name} is waited for before it starts" for name in late]


def faults_between(graph: TaskGraph, issues: list[Issue]) -> list[str]:
    """As `faults`, for graphs too large for every pair: each dependence on its own, one that reads a name after it."""
    over: dict[str, int] = {}  # when it is known to be over: a run at its issue, a collective at its wait
    begun: dict[str, int] = {}
    for at, (action, name) in enumerate(issues):
        if action != "start":
            over[name] = at
        begun.setdefault(name, at)
    collectives = {task.name for task in graph.tasks if task.stream == "collective"}
    return [
        f"{after} may begin before {before} is over"
        for before, after in conflicts_of_names(graph)
        if (begun if {before, after} <= collectives else over)[before] >= begun[after]
    ]


def conflicts_of_names(graph: TaskGraph) -> Iterator[tuple[str, str]]:
    """`conflicts`, name by name."""
    touching: dict[str, list[tuple[int, Task, bool]]] = {}
    for at, task in enumerate(graph.tasks):
        for name in {*task.reads, *task.writes}:
            touching.setdefault(name, []).append((at, task, name in task.writes))
    for users in touching.values():
        for (_, a, writes), (_, b, also) in itertools.combinations(users, 2):
            if writes or also:
                yield a.name, b.name


def clock(graph: TaskGraph, issues: list[Issue]) -> dict[str, tuple[float, float]]:
    """When each task runs, from the happens-before rules alone: as soon as all that must be over is over."""
    seconds = {task.name: task.seconds for task in graph.tasks}
    spans: dict[str, tuple[float, float]] = {}
    for at, (action, name) in enumerate(issues):
        if action != "wait":
            over = [spans[n][1] for a, n in issues[:at] if a in ("run", "wait") or action == "start"]
            begin = max(over, default=0.0)
            spans[name] = (begin, begin + seconds[name])
    return spans


def peak(graph: TaskGraph, issues: list[Issue]) -> int:
    """Most bytes of buffers that are held at a time, buffer by buffer."""
    tasks = {task.name: task for task in graph.tasks}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for at, (_, name) in enumerate(issues):
        for buffer in {*tasks[name].reads, *tasks[name].writes}:
            first.setdefault(buffer, at)
            last[buffer] = at
    for buffer in list(first):
        users = [t for t in graph.tasks if buffer in (*t.reads, *t.writes)]
        if buffer in users[0].reads:  # it is there from the start
            first[buffer] = -1
        if buffer in graph.results:
            last[buffer] = len(issues)
    return max(
        sum(size for buffer, size in graph.buffers.items() if buffer in first and first[buffer] <= at <= last[buffer])
        for at in range(-1, len(issues))
    )


def every_order(graph: TaskGraph) -> Iterator[list[Issue]]:
    """Every legal sequence whose waits stand as late as they can: which tasks are issued in which order."""
    before: dict[str, set[str]] = {task.name: set() for task in graph.tasks}
    for a, b in conflicts(graph):
        before[b].add(a)
    tasks = {task.name: task for task in graph.tasks}

    def extend(done: list[str], issues: list[Issue], waited: frozenset[str]) -> Iterator[list[Issue]]:
        if len(done) == len(tasks):
            yield issues + [Issue("wait", n) for n in done if tasks[n].stream == "collective" and n not in waited]
            return
        for name, task in tasks.items():
            if name in done or not before[name] <= set(done):
                continue
            if task.stream == "collective":
                yield from extend([*done, name], [*issues, Issue("start", name)], waited)
            else:
                waits = [n for n in done if n in before[name] and tasks[n].stream == "collective" and n not in waited]
                more = [*issues, *(Issue("wait", n) for n in waits), Issue("run", name)]
                yield from extend([*done, name], more, waited | set(waits))

    return extend([], [], frozenset())


def best(graph: TaskGraph) -> float:
    """Seconds of the fastest order there is."""
    return min(max((end for _, end in clock(graph, i).values()), default=0.0) for i in every_order(graph))


def halves(layers: int, compute: float, collective: float) -> TaskGraph:
    """Two micro-batches through layers of attention, all-gather, experts, reduce-scatter, with a cache between them."""
    tasks: list[Task] = []
    for layer in range(layers):
        for half in (0, 1):
            x, cache, here = f"x{layer}.{half}", f"cache{layer}", f"{layer}.{half}"
            tasks += [
                Task(f"attention{here}", "compute", compute, (x, cache), (f"h{here}", cache), (), half),
                Task(f"gather{here}", "collective", collective, (f"h{here}",), (f"g{here}",), (), half),
                Task(f"experts{here}", "compute", compute, (f"g{here}",), (f"p{here}",), (), half),
                Task(f"scatter{here}", "collective", collective, (f"p{here}",), (f"x{layer + 1}.{half}",), (), half),
            ]  # fmt: skip
    names = {name for task in tasks for name in (*task.reads, *task.writes) if not name.startswith("cache")}
    last = frozenset({f"x{layers}.0", f"x{layers}.1"})
    return TaskGraph(tuple(tasks), dict.fromkeys(sorted(names), 100), last)
