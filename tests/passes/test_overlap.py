"""The scheduler: legal on thousands of random graphs by an independent checker, near the best there is on tiny ones."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atomc.parallel.tasks import Issue, Stream, Task, TaskError, TaskGraph, simulate
from atomc.passes.overlap import OverlapError, overlap
from tests.support import schedules

BUFFERS, STATE = ("a", "b", "c", "d", "e"), ("cache", "ring")


@st.composite
def graphs(draw: Any, most: int = 9, shares: tuple[float, ...] = ()) -> TaskGraph:
    """Tasks that read and write a few buffers and some state; half of them collectives; seconds may be zero.

    `shares`: of their speed that some tasks keep beside the other stream.
    """
    tasks = []
    for number in range(draw(st.integers(1, most))):
        stream: Stream = draw(st.sampled_from(("compute", "collective")))
        names = st.lists(st.sampled_from((*BUFFERS, *STATE)), max_size=3, unique=True)
        told = draw(st.lists(st.integers(0, number - 1), max_size=1)) if number else []
        after = tuple(f"t{i}" for i in told)
        seconds, beside = float(draw(st.integers(0, 5))), draw(st.sampled_from((1.0, 1.0, *shares)))
        task = Task(f"t{number}", stream, seconds, tuple(draw(names)), tuple(draw(names)), after, beside=beside)
        tasks.append(task)
    sizes = {name: draw(st.integers(0, 9)) for name in BUFFERS}
    return TaskGraph(tuple(tasks), sizes, frozenset(draw(st.lists(st.sampled_from(BUFFERS), max_size=2))))


def check(graph: TaskGraph, share: float | None) -> None:
    """A schedule with any memory, or with `share` of the way from what some order takes at least to what it took."""
    free = overlap(graph)
    limit = None
    if share is not None:
        least = min(free.peak, simulate(graph, graph.in_order()).peak)
        limit = round(least + share * (free.peak - least))
    found = overlap(graph, limit)
    issues = list(found.issues)
    assert schedules.faults(graph, issues) == []
    assert found.spans == schedules.clock(graph, issues)
    assert found.peak == schedules.peak(graph, issues)
    assert limit is None or found.peak <= limit
    assert found.seconds <= simulate(graph, graph.in_order()).seconds
    assert found.seconds == max(span.end for span in found.spans.values())
    gaps = sum(task.seconds for task in graph.tasks if task.stream == "compute") + sum(found.exposed.values())
    assert gaps == found.seconds  # every second the compute stream works or is held up
    assert {why.task for why in found.why} == {name for name, seconds in found.exposed.items() if seconds > 0}
    if limit is None:
        check_places(graph, issues)


def check_places(graph: TaskGraph, issues: list[Issue]) -> None:
    """Starts stand as early and waits as late as they can: next to a task that must be before, or after, them."""
    pairs = set(schedules.conflicts(graph))
    for at, (action, name) in enumerate(issues):
        if action == "start":
            run = max((i for i, issue in enumerate(issues[:at]) if issue.action == "run"), default=None)
            if run is not None:  # what was issued since: the run that it needed, or a collective that needed the run
                assert any((before.task, name) in pairs for before in issues[run:at]), name
        elif action == "wait" and (runs := [i.task for i in issues[at:] if i.action == "run"]):
            assert (name, runs[0]) in pairs, name


@given(graphs(), st.sampled_from((None, 0.0, 0.5)))
@settings(max_examples=300)
def test_schedules_of_random_graphs_are_legal(graph: TaskGraph, share: float | None) -> None:
    check(graph, share)


@given(graphs(9, (0.5, 0.25)))
@settings(max_examples=200)
def test_streams_that_slow_one_another_down(graph: TaskGraph) -> None:
    """Legal, never slower than no overlap, and every task does its work: at its share while the other stream runs."""
    found = overlap(graph)
    assert schedules.faults(graph, list(found.issues)) == []
    assert found.seconds <= simulate(graph, graph.in_order()).seconds + 1e-9
    for task in graph.tasks:
        span = found.spans[task.name]
        others = [found.spans[other.name] for other in graph.tasks if other.stream != task.stream]
        both = sum(max(0.0, min(span.end, o.end) - max(span.start, o.start)) for o in others)
        assert span.end - span.start - both + both * task.beside == pytest.approx(task.seconds, abs=1e-9)


def test_power_bounds_a_step() -> None:
    """What all tasks take of the power together is the least time, whatever is hidden."""
    tasks = (
        Task("a", "compute", 1.0, (), ("x",), power=1.25),
        Task("c", "collective", 1.0, ("x",), ("y",), power=0.5),
        Task("other", "compute", 1.0, (), ("z",), power=1.25),
        Task("b", "compute", 1.0, ("y", "z"), ("w",), power=1.25),
    )
    found = overlap(TaskGraph(tasks))
    assert (found.seconds, found.throttled) == (4.25, 1.25)
    assert sum(found.exposed.values()) == 0
    assert simulate(TaskGraph(tasks), TaskGraph(tasks).in_order()).throttled == 0.25


def test_a_region_that_is_stitched_to_others() -> None:
    """What is pending starts first and is waited for where it is needed; what is open is started and not waited for."""
    tasks = (
        Task("before", "collective", 2.0, ("m", "b"), ("m", "b")),
        Task("first", "compute", 2.0, ("a",), ("x",)),
        Task("gather", "collective", 1.0, ("x",), ("y",)),
        Task("second", "compute", 2.0, ("b",), ("z",)),
        Task("experts", "compute", 1.0, ("y",), ("p",)),
        Task("last", "collective", 3.0, ("z",), ("q",)),
    )
    graph = TaskGraph(tasks, dict.fromkeys("abmxyzpq", 10), frozenset("pq"), ("before",), frozenset({"last"}))
    found = overlap(graph, require=True)
    assert [str(i.task) for i in found.issues][:2] == ["before", "first"]
    assert Issue("wait", "last") not in found.issues
    assert Issue("wait", "before") in found.issues
    assert (found.computed, found.spans["last"].end) == (5.0, 7.0)
    assert found.live[-1] == 30  # results, and what the open collective reads
    with pytest.raises(TaskError, match="last is never waited for"):
        simulate(TaskGraph(tasks, graph.buffers, graph.results, ("before",)), found.issues)


@pytest.mark.slow
@given(graphs(14), st.sampled_from((None, 0.0, 0.5)))
@settings(max_examples=3000)
def test_schedules_of_thousands_of_random_graphs_are_legal(graph: TaskGraph, share: float | None) -> None:
    check(graph, share)


@given(graphs())
@settings(max_examples=50)
def test_equal_graphs_give_equal_schedules(graph: TaskGraph) -> None:
    again = TaskGraph(graph.tasks, dict(reversed(graph.buffers.items())), graph.results)
    assert overlap(graph).issues == overlap(again).issues


def tiny(rng: random.Random) -> TaskGraph:
    """At most seven tasks, a third of them collectives, each reading what a few earlier ones wrote."""
    tasks = []
    for number in range(rng.randint(4, 7)):
        reads = tuple({f"b{rng.randrange(number)}" for _ in range(rng.randint(0, 2))}) if number else ()
        stream: Stream = "collective" if rng.random() < 1 / 3 else "compute"
        tasks.append(Task(f"t{number}", stream, float(rng.randint(1, 6)), reads, (f"b{number}",)))
    return TaskGraph(tuple(tasks))


def test_the_gap_to_the_best_order_of_tiny_graphs(record_property: Any) -> None:
    """List scheduling is no search: how far from the best it stays is counted, for fixed graphs."""
    gaps = [overlap(g).seconds / schedules.best(g) - 1 for g in map(tiny, map(random.Random, range(150)))]
    assert min(gaps) >= 0  # the exhaustive search found no worse
    exact = sum(gap == 0 for gap in gaps)
    record_property("optimal", f"{exact} of {len(gaps)}, mean gap {sum(gaps) / len(gaps):.3%}, worst {max(gaps):.1%}")
    assert exact >= 0.9 * len(gaps)
    assert max(gaps) < 0.25


def test_reasons_hold_in_every_order() -> None:
    """No independent compute, or too little: then no order exposes less. Memory: none within the limit does better."""
    seen: set[str] = set()
    for graph in map(tiny, map(random.Random, range(60))):
        found = overlap(graph)
        orders = [simulate(graph, issues) for issues in schedules.every_order(graph)]
        for why in found.why:
            seconds = next(task.seconds for task in graph.tasks if task.name == why.task)
            least = min(order.exposed[why.task] for order in orders)
            if why.reason == "no compute is independent of it":
                seen.add("none")
                assert least == seconds
            elif why.reason.startswith("compute independent of it takes"):
                seen.add("too little")
                work = sum(task.seconds for task in graph.tasks if task.name in why.by)
                assert least >= seconds - work > 0
            else:  # these speak of the order found alone
                assert why.reason in ELSEWHERE
                seen.add("elsewhere")
    assert seen == {"none", "too little", "elsewhere"}


ELSEWHERE = (
    "compute independent of it hides other collectives",
    "the order found uses the compute that is independent of it elsewhere",
)


# -- what must come out ------------------------------------------------------------------------------------------------


def test_two_halves_hide_all_but_the_ends() -> None:
    """With compute as long as communication, the pipeline is full: only its first and last collective show."""
    found = overlap(schedules.halves(6, 2.0, 1.0), require=True)
    assert schedules.faults(found.graph, list(found.issues)) == []
    assert sum(found.exposed.values()) == 1.0  # the last reduce-scatter: nothing is left to hide it
    assert [why.task for why in found.why] == ["scatter5.1"]
    assert found.why[0].reason == "compute independent of it hides other collectives"


def test_the_second_half_reads_the_cache_after_the_first_wrote_it() -> None:
    found = overlap(schedules.halves(3, 2.0, 1.0))
    for layer in range(3):
        assert found.spans[f"attention{layer}.0"].end <= found.spans[f"attention{layer}.1"].start


def test_one_batch_hides_nothing_and_says_why() -> None:
    graph = schedules.halves(2, 2.0, 1.0)
    whole = TaskGraph(tuple(task for task in graph.tasks if task.chunk == 0), graph.buffers)
    found = overlap(whole)
    assert found.hidden == 0
    assert {why.reason for why in found.why} == {"no compute is independent of it"}
    with pytest.raises(OverlapError, match=r"no communication is hidden. gather0.0: no compute is independent of it"):
        overlap(whole, require=True)


def test_a_collective_longer_than_what_could_hide_it() -> None:
    tasks = (
        Task("a", "compute", 1.0, (), ("x",)),
        Task("c", "collective", 5.0, ("x",), ("y",)),
        Task("other", "compute", 2.0, (), ("z",)),
        Task("b", "compute", 1.0, ("y", "z"), ("w",)),
    )
    found = overlap(TaskGraph(tasks))
    assert [str(issue.task) for issue in found.issues] == ["a", "c", "other", "c", "b"]
    assert found.why[0].exposed == 3.0
    assert found.why[0].by == ("other",)
    assert "takes 2000000.0 us, it takes 5000000.0 us" in found.why[0].reason


def test_memory_is_bounded_and_the_reason_names_it() -> None:
    graph = schedules.halves(4, 2.0, 1.0)
    free = overlap(graph)
    tight = overlap(graph, free.peak - 100)
    assert tight.peak <= free.peak - 100
    assert tight.seconds > free.seconds
    assert any(why.reason.startswith("the memory limit") for why in tight.why)
    with pytest.raises(OverlapError, match="no order found takes 10"):
        overlap(graph, 10)


def test_tasks_that_wait_for_one_another_are_named() -> None:
    with pytest.raises(OverlapError, match=r"wait for one another: (a -> b|b -> a)"):
        overlap(TaskGraph((Task("a", "compute", 1.0, after=("b",)), Task("b", "compute", 1.0, after=("a",)))))


@pytest.mark.parametrize(
    ("issues", "message"),
    [
        (["run a"], "c is never issued"),
        (["run a", "start c"], "c is never waited for"),
        (["run a", "start c", "start c"], "a second time"),
        (["run a", "wait c"], "it has not started"),
        (["start a"], "it is a compute task"),
        (["run z"], "no such task"),
    ],
)
def test_sequences_that_mean_nothing_are_refused(issues: list[str], message: str) -> None:
    graph = TaskGraph((Task("a", "compute", 1.0), Task("c", "collective", 1.0)))
    sequence: Any = [Issue(*text.split()) for text in issues]  # type: ignore[arg-type]
    with pytest.raises(TaskError, match=message):
        simulate(graph, sequence)


def test_graphs_that_mean_nothing_are_refused() -> None:
    for tasks, message in (
        ((Task("a", "compute", 1.0), Task("a", "compute", 1.0)), "two tasks are called a"),
        ((Task("a", "compute", -1.0),), "a takes -1"),
        ((Task("a", "compute", 1.0, after=("b",)),), "after b, which is no task"),
    ):
        with pytest.raises(TaskError, match=message):
            TaskGraph(tasks)


MUTATIONS = ("drop a wait", "start too early", "run before its wait", "swap the halves' caches")


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_checker_sees_an_illegal_schedule(mutation: str) -> None:
    found = overlap(schedules.halves(2, 2.0, 1.0))
    issues = list(found.issues)
    if mutation == "drop a wait":
        issues.remove(Issue("wait", "gather0.0"))
    elif mutation == "start too early":
        issues.remove(Issue("start", "gather0.0"))
        issues.insert(0, Issue("start", "gather0.0"))
    elif mutation == "run before its wait":
        issues.remove(Issue("run", "experts0.0"))
        issues.insert(issues.index(Issue("wait", "gather0.0")), Issue("run", "experts0.0"))
    else:
        a, b = issues.index(Issue("run", "attention1.0")), issues.index(Issue("run", "attention1.1"))
        issues[a], issues[b] = issues[b], issues[a]
    assert schedules.faults(found.graph, issues)
