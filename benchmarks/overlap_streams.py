"""Whether overlap happens: schedules of layers in two micro-batches, on one GPU with a stand-in for the collectives.

    python benchmarks/overlap_streams.py [--tokens 8192] [--layers 4] [--out FILE.json]

For each layout the passes' schedule of some V4-Flash layers (`atomc.planning.step`, for eight H100) is played: a
compute task is bfloat16 products, or copies where it is short, that take the seconds it is predicted to take; a
collective is a stand-in of the seconds it is predicted to take, on a second stream. Both are made of units that are
timed first, alone.
The whole schedule is captured in one CUDA graph, and replayed.

Stand-ins:
    engine   a copy from pinned memory by a copy engine: takes no compute units
    units    a kernel of 16 workgroups that reads and writes memory, as a collective's own kernel does

Columns: seconds of compute alone and of collectives alone; of the halves with every collective waited for; scheduled,
predicted from the units' seconds and measured; the hidden share of the collectives, predicted and measured:
1 - (scheduled - compute alone) / collectives alone; and their ratio, which is to be 85 % or more with the copy engine.
The kernel waits for units and takes them, as a collective's does: its ratio says what contention costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timing import captured

from atomc.models.bundled import bundled_config
from atomc.parallel.layout import parse_layout
from atomc.parallel.tasks import Issue, Schedule, TaskGraph, simulate
from atomc.planning.step import Step, schedule
from atomc.targets import get_target

if TYPE_CHECKING:
    from atomc.passes.shard import Form

LAYOUTS = {"all-gather, reduce-scatter": "dp=8,moe=tp", "all-to-all": "dp=8,moe=ep", "all-reduce": "tp=8"}
FIRST = 2  # the first layer with compressed rows; kinds alternate from there
WIDTH = 4096
ROWS = 16  # workgroups of a stand-in kernel
LIMIT = 0.85  # of the predicted hidden share


@dataclass(frozen=True)
class Unit:
    """Work of known seconds."""

    name: str
    work: Callable[[], Any]
    seconds: float


@dataclass(frozen=True)
class Played:
    """A task's stand-in: a unit, so many times."""

    unit: Unit
    times: int

    @property
    def seconds(self) -> float:
        return self.unit.seconds * self.times

    def issue(self) -> None:
        """Issue it to the current stream."""
        for _ in range(self.times):
            self.unit.work()


def choose(units: Sequence[Unit], seconds: float) -> Played:
    """The unit, and how often, that comes nearest to the seconds; of those within 2 %, the fewest times."""
    found = [Played(unit, max(1, round(seconds / unit.seconds))) for unit in units]
    off = [abs(played.seconds - seconds) for played in found]
    near = [played for played, by in zip(found, off, strict=True) if by <= max(min(off), 0.02 * seconds)]
    return min(near, key=lambda played: (played.times, abs(played.seconds - seconds)))


def as_played(graph: TaskGraph, played: dict[str, Played]) -> TaskGraph:
    """The graph with the seconds of what stands for its tasks; contention and power are what is measured, so none."""
    tasks = tuple(replace(task, seconds=played[task.name].seconds, beside=1.0, power=0.0) for task in graph.tasks)
    return replace(graph, tasks=tasks)


# -- on the device -----------------------------------------------------------------------------------------------------


class Player:
    """Units of both streams, and graphs of schedules.

    Raises:
        RuntimeError: no GPU.
    """

    def __init__(self, stand_in: str) -> None:
        self.other = torch.cuda.Stream(priority=-1)
        self.compute = [*_products(), *_copies()]
        self.collective = _engine(self.other) if stand_in == "engine" else _units(self.other)

    def plays(self, graph: TaskGraph) -> dict[str, Played]:
        """What stands for each task."""
        units = {"compute": self.compute, "collective": self.collective}
        return {task.name: choose(units[task.stream], task.seconds) for task in graph.tasks}

    def graph(
        self, issues: Sequence[Issue], played: dict[str, Played], *, computes: bool = True, sends: bool = True
    ) -> torch.cuda.CUDAGraph:
        """One CUDA graph of a sequence of issues, or of one stream's part of it."""

        def run() -> None:
            here, done = torch.cuda.current_stream(), dict[str, torch.cuda.Event]()
            self.other.wait_stream(here)
            for action, name in issues:
                if action == "run" and computes:
                    played[name].issue()
                elif action == "start" and sends:
                    self.other.wait_stream(here)
                    with torch.cuda.stream(self.other):
                        played[name].issue()
                        done[name] = torch.cuda.Event()
                        done[name].record()
                elif action == "wait" and sends:
                    here.wait_event(done[name])
            here.wait_stream(self.other)

        return captured(run)


def replayed(graphs: Sequence[torch.cuda.CUDAGraph], repeat: int = 9, warm: int = 2) -> list[float]:
    """Median seconds of each, replayed in turn, so that a clock that changes changes all of them."""
    spent: list[list[float]] = [[] for _ in graphs]
    for turn in range(warm + repeat):
        for at, graph in enumerate(graphs):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= warm:
                spent[at].append(start.elapsed_time(end) / 1e3)
    return [statistics.median(times) for times in spent]


def timed(name: str, work: Callable[[], Any], stream: torch.cuda.Stream | None = None, times: int = 20) -> Unit:
    """A unit with its seconds, alone, one after the other in a graph."""

    def run() -> None:
        here = torch.cuda.current_stream()
        if stream is not None:
            stream.wait_stream(here)
        with torch.cuda.stream(stream):
            for _ in range(times):
                work()
        if stream is not None:
            here.wait_stream(stream)

    return Unit(name, work, replayed([captured(run)])[0] / times)


def _products() -> list[Unit]:
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16, device="cuda") * 0.02
    units = []
    for rows in (256, 512, 1024, 1536, 2048, 3072, 4096):
        x = torch.randn(rows, WIDTH, dtype=torch.bfloat16, device="cuda")
        out = torch.empty_like(x)
        units.append(timed(f"product of {rows} rows", partial(torch.mm, x, weight, out=out)))
    return units


def _copies() -> list[Unit]:
    units = []
    for size in (1 << 16, 1 << 22, 1 << 24):
        source = torch.zeros(size, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        units.append(timed(f"copy of {size:,} bytes", partial(torch.add, source, 1, out=target)))
    return units


def _engine(stream: torch.cuda.Stream) -> list[Unit]:
    host = torch.zeros(64 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(host.shape[0], dtype=torch.uint8, device="cuda")
    units = []
    for size in (1 << 12, 1 << 19, 1 << 21, 3 << 20, 1 << 23, 3 << 22, 1 << 24, 3 << 23, 1 << 25, 1 << 26):
        work = partial(target[:size].copy_, host[:size], non_blocking=True)
        units.append(timed(f"{size:,} bytes from the host", work, stream))
    return units


def _units(stream: torch.cuda.Stream) -> list[Unit]:
    units = []
    for columns in (1 << 12, 1 << 14, 1 << 16, 3 << 15, 1 << 17, 1 << 18, 1 << 19, 1 << 20):
        x = torch.zeros(ROWS, columns, device="cuda")
        out = torch.empty_like(x)
        units.append(timed(f"16 rows of {columns:,}", partial(torch.softmax, x, -1, out=out), stream))
    return units


# -- the table ---------------------------------------------------------------------------------------------------------


def plan_of(layout: str, tokens: int, layers: int) -> Schedule:
    """The schedule of a prefill in two micro-batches, of some layers."""
    config, parts = bundled_config("deepseek-v4-flash"), Step(tokens, 1, tokens).halves
    assert parts is not None
    form: Form = "route" if "ep" in layout else "gather"
    layered = range(FIRST, FIRST + layers)
    return schedule(config, parse_layout(layout), get_target("h100"), parts, layers=layered, form=form)


def measure(player: Player, plan: Schedule) -> dict[str, Any]:
    """A schedule played, and what it was to take."""
    played = player.plays(plan.graph)
    predicted = simulate(as_played(plan.graph, played), plan.issues)
    graphs = [
        player.graph(plan.issues, played), player.graph(plan.issues, played, sends=False),
        player.graph(plan.issues, played, computes=False), player.graph(plan.graph.in_order(), played),
    ]  # fmt: skip
    scheduled, compute, collectives, waited = replayed(graphs)
    hidden, expected = 1 - (scheduled - compute) / collectives, predicted.hidden / predicted.communication
    return {
        "tasks": len(plan.graph.tasks), "planned_hidden": plan.hidden / plan.communication,
        "compute": compute, "collectives": collectives, "waited_for": waited, "predicted": predicted.seconds,
        "predicted_compute": sum(p.seconds for n, p in played.items() if _is_compute(plan, n)),
        "predicted_collectives": predicted.communication, "scheduled": scheduled, "predicted_hidden": expected,
        "hidden": hidden, "ratio": hidden / expected,
    }  # fmt: skip


def _is_compute(plan: Schedule, name: str) -> bool:
    return plan.spans.keys() >= {name} and name not in plan.exposed


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the table; milliseconds, shares."""
    spent = [found[key] * 1e3 for key in ("compute", "collectives", "waited_for", "predicted", "scheduled")]
    shares = [found[key] for key in ("predicted_hidden", "hidden", "ratio")]
    return f"{name:44}" + "".join(f"{value:12.3f}" for value in spent) + "".join(f"{value:10.1%}" for value in shares)


def main() -> int:
    """Print the table, write the file; 1 if a ratio of the copy engine is below 85 %, or a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--stand-ins", nargs="+", default=["engine", "units"], choices=["engine", "units"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": args.tokens,
        "layers": args.layers, "cases": {}, "failed": {},
    }  # fmt: skip
    print(
        f"{found['device']}, torch {found['torch']}; {args.layers} layers, {args.tokens} tokens a rank; ms", flush=True
    )
    head = ("compute", "collectives", "waited for", "predicted", "scheduled")
    print(
        f"{'':44}"
        + "".join(f"{name:>12}" for name in head)
        + "".join(f"{n:>10}" for n in ("expected", "hidden", "ratio"))
    )
    for stand_in in args.stand_ins:
        player: Player | None = None
        for name, layout in LAYOUTS.items():
            case = f"{stand_in}: {layout} ({name})"
            try:
                player = player or Player(stand_in)
                found["cases"][case] = measure(player, plan_of(layout, args.tokens, args.layers))
                print(row(case, found["cases"][case]), flush=True)
            except RuntimeError as error:
                found["failed"][case] = str(error)
                print(f"{case}: failed: {error}", flush=True)
            if args.out:
                args.out.write_text(json.dumps(found, indent=1) + "\n")
    missed = [name for name, case in found["cases"].items() if name.startswith("engine") and case["ratio"] < LIMIT]
    return int(bool(found["failed"] or missed))


if __name__ == "__main__":
    raise SystemExit(main())
