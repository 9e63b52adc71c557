"""Timelines say what the schedule says: every task once, on its stream, at its time."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from atomc.parallel.tasks import Span, Task, TaskGraph
from atomc.parallel.timeline import _held_up, chrome_trace, page, summary, svg
from atomc.passes.overlap import overlap
from tests.support.schedules import halves


def test_the_trace_has_every_task_at_its_time() -> None:
    found = overlap(halves(3, 2e-3, 1e-3))
    events = json.loads(chrome_trace([("halves", found)]))["traceEvents"]
    bars = {event["name"]: event for event in events if event["ph"] == "X"}
    assert bars.keys() == found.spans.keys()
    for task in found.graph.tasks:
        event = bars[task.name]
        assert event["tid"] == (task.stream == "collective")
        assert event["ts"] == found.spans[task.name].start * 1e6
        assert event["args"]["micro-batch"] == task.chunk
    assert max(event["args"]["bytes"] for event in events if event["ph"] == "C") == found.peak
    assert sum(event["args"].get("exposed_us", 0) for event in bars.values()) / 1e6 == sum(found.exposed.values())


def test_the_picture_is_well_formed_and_shows_every_bar() -> None:
    found = overlap(halves(3, 2.0, 1.0))
    drawn = ElementTree.fromstring(svg(found))
    titles = [title.text or "" for title in drawn.iter("title")]
    assert sum(": " in title for title in titles) == len(found.graph.tasks)
    assert sum(title.startswith("waits 1000.000 ms while scatter2.1 runs") for title in titles) == 1
    part = ElementTree.fromstring(svg(found, Span(0.0, 2.0)))
    assert len(list(part.iter("title"))) < len(titles)


def test_live_bytes_are_drawn_forwards_and_waits_are_what_is_exposed() -> None:
    """A collective is issued before it begins; two in a row are each blamed for the seconds in which they run."""
    tasks = (
        Task("a", "compute", 1e-3, (), ("x", "z")),
        Task("c", "collective", 2e-3, ("x",), ("y",)),
        Task("d", "collective", 3e-3, ("z",), ("w",)),
        Task("b", "compute", 1e-3, ("y", "w"), ("v",)),
    )
    for graph in (TaskGraph(tasks, dict.fromkeys("xyzwv", 8)), halves(4, 2.0, 1.5)):
        found = overlap(graph)
        times = [e["ts"] for e in json.loads(chrome_trace([("", found)]))["traceEvents"] if e["ph"] == "C"]
        assert times == sorted(times)
        held: dict[str, float] = {}
        for name, span in _held_up(found):
            held[name] = held.get(name, 0.0) + span.end - span.start
        assert held == pytest.approx({name: s for name, s in found.exposed.items() if s})


def test_a_page_compares_schedules_and_says_why() -> None:
    graph = halves(2, 2.0, 1.0)
    whole = TaskGraph(tuple(task for task in graph.tasks if task.chunk == 0), graph.buffers)
    text = page("<layout>", "predicted", [("whole", overlap(whole)), ("halves", overlap(graph))], window=1.0)
    assert "&lt;layout&gt;" in text
    assert "no compute is independent of it" in text
    assert text.count("<svg") == 4


def test_the_summary_has_the_figures() -> None:
    found = overlap(
        TaskGraph((Task("a", "compute", 1e-3, writes=("x",)), Task("c", "collective", 2e-3, ("x",), ("y",))))
    )
    assert summary(found) == (
        "3.000 ms predicted; communication 2.000 ms, exposed 2.000 ms; bubbles 0.0 us of compute, 0.0 us of "
        "communication; peak 0.0 MiB"
    )
