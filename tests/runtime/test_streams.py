"""A capture's forks and joins, on streams that keep a graph as a capture does: its edges are those of the plan."""

from __future__ import annotations

from typing import Any

from hypothesis import given

from atomc.artifact.order import STREAMS, before, owners_of
from atomc.artifact.plan import RegionPlan
from atomc.runtime.streams import Streams
from tests.codegen.test_streams import regions


class Graph:
    """Nodes of a capture, each with all that it follows."""

    def __init__(self) -> None:
        self.follows: list[set[int]] = []
        self.dependent: list[int] = []  # nodes that may begin before the one that they follow ends

    def add(self, dependencies: set[int]) -> int:
        self.follows.append(set().union(dependencies, *(self.follows[d] for d in dependencies)))
        return len(self.follows) - 1


class Stream:
    """A stream under capture: what is launched next depends on `last`; None: it is not part of the capture."""

    def __init__(self, graph: Graph, captured: bool = False) -> None:
        self.graph, self.last = graph, set[int]() if captured else None
        self.launched = -1

    def launch(self, dependent: bool) -> int:
        assert self.last is not None, "a launch on a stream that is not captured"
        assert not dependent or (self.last == {self.launched}), "an edge to more than the launch before"
        node = self.launched = self.graph.add(self.last)
        self.last = {node}
        self.graph.dependent += [node] * dependent
        return node

    def record_event(self) -> set[int]:
        assert self.last is not None
        return set(self.last)

    def wait_event(self, event: set[int]) -> None:
        self.last = (self.last or set()) | event

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


def captured(plan: RegionPlan, streams: Any, times: int) -> list[list[int]]:
    """The nodes of each call of a region, by step; -1 where nothing is launched."""
    calls = []
    for _ in range(times):
        nodes = []
        for at, step in enumerate(plan.steps):
            if step.buckets:
                stream = streams.enter(step.stream, step.waits)
                nodes.append(stream.launch(streams.launch(step.stream)))
            else:
                nodes.append(-1)
            if any(at in other.waits for other in plan.steps):
                streams.leave(at, step.stream)
        streams.join()
        calls.append(nodes)
    return calls


@given(regions())
def test_the_graph_has_the_order_of_the_plan(plan: RegionPlan) -> None:
    graph = Graph()
    main = Stream(graph, captured=True)
    side: Any = [Stream(graph) for _ in range(STREAMS - 1)]
    first, second = captured(plan, Streams(main, side, True), 2)  # type: ignore[arg-type]
    assert main.last is not None
    last = set().union(main.last, *(graph.follows[n] for n in main.last))
    assert last == set(range(len(graph.follows))), "the main stream does not end after everything"
    for at, over in enumerate(before(plan.steps, owners_of(plan.slots))):
        if plan.steps[at].buckets:
            expected = {node for j, node in enumerate(first) if over >> j & 1}
            assert graph.follows[first[at]] == expected
            again = {node for j, node in enumerate(second) if over >> j & 1} | {n for n in first if n >= 0}
            assert graph.follows[second[at]] == again, "a call begins before the one before it ends"


@given(regions())
def test_on_one_stream_the_order_is_the_plans(plan: RegionPlan) -> None:
    graph = Graph()
    main: Any = Stream(graph, captured=True)
    captured(plan, Streams(main, [], True), 2)
    assert all(follows == set(range(node)) for node, follows in enumerate(graph.follows))
    assert graph.dependent == list(range(1, len(graph.follows))), "each but the first follows a launch"


@given(regions())
def test_no_launch_is_dependent_where_that_is_off(plan: RegionPlan) -> None:
    graph = Graph()
    main: Any = Stream(graph, captured=True)
    captured(plan, Streams(main, [], False), 2)
    assert graph.dependent == []
