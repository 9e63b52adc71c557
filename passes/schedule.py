"""Schedule: the nodes of a region in an order that hides its collectives, on two streams (`passes.overlap`).

Contract:
    The pass only moves nodes: what a graph computes, and every node in it, stays. Order edges hold: data, and writes of
    state before later reads of it. A collective stands as early and its `wait_tensor` as late as the schedule says; one
    graph is every rank's, so the order of collectives is the same on all. Where nothing can be hidden though the graph
    has collectives, that is an error with the reasons; what is exposed in part is refused with its reason each.

Terms:
    task     a call; views, sizes and tuple items take no time and no memory
    buffer   the storages that a call makes, each item of a tuple its own; of a collective, its result until the last
             reader of its wait

Pseudo-code:
    tasks of the calls in order, waits belonging to their collectives; seconds by the caller's cost model
    overlap(tasks); place the nodes in the order of the issues
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from atomc.parallel.collectives import WAIT, is_collective
from atomc.parallel.tasks import Cost, Schedule, Task, TaskGraph
from atomc.passes.graph import PassError, base_of, bytes_of, calls, location, op_name, order_edges, storage_of
from atomc.passes.overlap import overlap
from atomc.passes.runner import Context, Match, Pass, Refusal, Report

Seconds = Callable[[Node], float | Cost]


@dataclass(frozen=True)
class ScheduleOverlap(Pass):
    """Reorder a region's nodes.

    Attributes:
        seconds: what a call takes. sizes: symbol of the graph -> its value, for bytes. limit: most bytes of live
            buffers. require: raise where nothing is hidden. under_way: seconds of what the region before left open.
    """

    name: ClassVar[str] = "schedule"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "values"})
    seconds: Seconds = field(repr=False)
    sizes: Mapping[str, int] = field(default_factory=dict)
    limit: int | None = None
    require: bool = True
    under_way: float = 0.0

    def run(self, gm: GraphModule, ctx: Context) -> Report:
        found = overlap(
            task_graph(gm.graph, self.seconds, self.sizes, self.under_way), self.limit, require=self.require
        )
        place(gm.graph, found)
        nodes = {node.name: node for node in calls(gm.graph)}
        where = {task.name: task.where for task in found.graph.tasks}
        takes = {task.name: task.seconds for task in found.graph.tasks}
        refused = [
            Refusal(
                f"{where[why.task]} {why.task}",
                f"{why.exposed * 1e6:.0f} of {takes[why.task] * 1e6:.0f} us are not hidden: {why.reason}",
            )
            for why in found.why
        ]
        refused += [Refusal(f"{where[name]} {name}", "left to the next region") for name in sorted(found.graph.open)]
        shown = nodes.keys() - found.graph.open
        hidden = [nodes[name] for name, exposed in found.exposed.items() if not exposed and name in shown]
        return Report([Match(location(node), op_name(node.target)) for node in hidden], refused)


def task_graph(graph: Graph, seconds: Seconds, sizes: Mapping[str, int], under_way: float = 0.0) -> TaskGraph:
    """The calls of a graph as tasks, named as their nodes; a wait is part of its collective.

    A collective without a wait is left open (`passes.borders`); what a wait of an input waits for is pending, and takes
    `under_way` seconds from the start.

    Raises:
        PassError: a size has a symbol without a value; a wait waits for no collective.
    """
    before, tasks, buffers = order_edges(graph), [], dict[str, int]()
    waits = {_collective(node): node for node in calls(graph) if node.target is WAIT}
    for source, wait in waits.items():
        if source.op == "placeholder":
            tasks.append(Task(source.name, "collective", under_way, where=location(source)))
        elif not is_collective(source):
            raise PassError(f"{wait.name} ({location(wait)}) waits for {source}, which is no collective.")
    pending = tuple(task.name for task in tasks)
    for node in calls(graph):
        if node.target is WAIT:
            continue
        after = {_collective(n).name for n in before[node] if n.op == "call_function"}
        reads = {name for n in node.all_input_nodes if (name := _buffer(n))}
        made = {name: size for name, size in _made(node, sizes).items() if name not in reads}
        buffers |= made
        found = seconds(node)
        cost = found if isinstance(found, Cost) else Cost(found)
        tasks.append(
            Task(
                node.name, "collective" if is_collective(node) else "compute", cost.seconds, tuple(sorted(reads)),
                tuple(made), tuple(sorted(after)), int(node.meta.get("half", 0)), location(node), cost.beside,
                cost.power,
            )
        )  # fmt: skip
    output = next(node for node in graph.nodes if node.op == "output")
    results = frozenset(name for n in output.all_input_nodes if (name := _buffer(n)))
    left_open = frozenset(node.name for node in calls(graph) if is_collective(node) and node not in waits)
    return TaskGraph(tuple(tasks), buffers, results, pending, left_open)


def _collective(node: Node) -> Node:
    """What a wait waits for; any other node itself."""
    if node.target is not WAIT:
        return node
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _buffer(node: Node) -> str | None:
    """The name of the storage of a tensor; None for inputs, sizes and tuples. An item of a tuple is its call's."""
    base = base_of(_collective(base_of(node)))
    if base.op != "call_function" or not isinstance(base.meta.get("val"), torch.Tensor):
        return None
    if base.target is operator.getitem:
        return f"%{base.all_input_nodes[0].name}[{base.args[1]}]"
    return f"%{base.name}"


def _made(node: Node, sizes: Mapping[str, int]) -> dict[str, int]:
    """The storages that a call makes, with their bytes: of a tuple those of its items, whoever takes them out of it."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        name = _buffer(node)
        return {name: _bytes(node, value, sizes)} if name and node.target is not operator.getitem else {}
    if not isinstance(value, (list, tuple)):
        return {}
    given = {storage_of(n) for n in node.all_input_nodes}
    items = {at: item for at, item in enumerate(value) if isinstance(item, torch.Tensor)}
    made = {at: item for at, item in items.items() if item.untyped_storage()._cdata not in given}
    return {f"%{node.name}[{at}]": _bytes(node, item, sizes) for at, item in made.items()}


def _bytes(node: Node, value: torch.Tensor, sizes: Mapping[str, int]) -> int:
    try:
        return bytes_of(value, sizes)
    except PassError as error:
        raise PassError(f"{node.name} ({location(node)}) has {error}.") from None


def place(graph: Graph, schedule: Schedule) -> None:
    """Put the nodes of a graph in the order of a schedule of its tasks."""
    nodes = {node.name: node for node in calls(graph)}
    waits = {_collective(node).name: node for node in nodes.values() if node.target is WAIT}
    placed: list[Node] = []
    done: set[Node] = set()

    def put(node: Node) -> None:
        for wait in (n for n in node.all_input_nodes if n.target is WAIT):
            put(wait)  # of a collective that another one reads
        if node not in done:
            done.add(node)
            placed.append(node)

    for action, name in schedule.issues:
        if action != "wait" and name not in schedule.graph.pending:
            put(nodes[name])
        elif action == "wait" and name in waits:
            put(waits[name])
    output = next(node for node in graph.nodes if node.op == "output")
    for node in placed:
        output.prepend(node)
