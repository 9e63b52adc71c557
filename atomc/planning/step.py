"""A step of a model on one rank as tasks, whole or in two micro-batches, and the schedule that the passes make of it.

Contract:
    One rank stands for all: ranks have equal work. The regions of a step are its layers and its head, and each is
    scheduled by itself (`passes.schedule`), as a compile does it once for each kind of layer. In two micro-batches the
    first half's operators come before the second's, state orders them as in a chunked graph (`passes.chunk`), and what
    needs the last collective of a region moves into the next (`atomc.parallel.borders`, `passes.borders`). The step is
    the regions' sequences one after the other, timed as a whole. Nothing here is measured: seconds are of the roofline
    and of the links, and what both streams take from one another while they run is of `Link.units` and its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.parallel.borders import cut, under_way
from atomc.parallel.layout import Layout
from atomc.parallel.tasks import Issue, Schedule, Task, TaskGraph, WhyNoOverlap, simulate
from atomc.passes.overlap import NOTHING, overlap
from atomc.planning.operators import LayerOperators, Operator, Part
from atomc.targets import Target

if TYPE_CHECKING:
    from atomc.passes.shard import Form

STATE: Final = frozenset({"window", "rows", "partial", "index_rows", "index_partial"})
AFTER: Final = "what the region before left under way holds it up"


@dataclass(frozen=True)
class Step:
    """A step of every `dp` rank: tokens, requests, and tokens of context of each when it ends.

    `live`: tokens of all `dp` ranks together, where some have fewer; None: as many on each.
    """

    tokens: int
    requests: int
    context: int
    live: int | None = None

    @property
    def phase(self) -> Literal["prefill", "decode"]:
        return "decode" if self.tokens == self.requests else "prefill"

    @property
    def whole(self) -> list[Part]:
        """The step as one part."""
        return [self._part(self.tokens, self.requests, self.context)]

    @property
    def halves(self) -> list[Part] | None:
        """Two parts: decode by requests, prefill at the middle of the tokens; None where there is no middle."""
        if self.phase == "decode":
            first = (self.requests + 1) // 2
            rest = self.requests - first
            return [self._part(n, n, self.context) for n in (first, rest)] if rest else None
        first, rest = (self.tokens + 1) // 2, self.tokens // 2
        if self.requests == 1:  # the first half is what the second finds in the caches
            return [self._part(first, 1, self.context - rest), self._part(rest, 1, self.context)] if rest else None
        return [self._part(n, self.requests / 2, self.context) for n in (first, rest)]

    def _part(self, tokens: int, requests: float, context: int) -> Part:
        live = None if self.live is None else self.live * tokens / self.tokens
        return Part(tokens, requests, context, live)


@dataclass(frozen=True)
class StepTasks:
    """The regions of a step, each with its tasks in order and its kind: regions of one kind are alike."""

    regions: tuple[tuple[Task, ...], ...]
    kinds: tuple[int | str, ...]
    graph: TaskGraph


def step_tasks(
    config: DeepseekV4Config, layout: Layout, target: Target, parts: list[Part], layers: Iterable[int] | None = None,
    form: Form = "gather",
) -> StepTasks:  # fmt: skip
    """The tasks of a step; of some layers only, and no head, where `layers` says which."""
    chosen = list(range(config.num_hidden_layers) if layers is None else layers)
    regions: list[tuple[Task, ...]] = []
    kinds: list[int | str] = [config.compress_ratios[layer] for layer in chosen]
    buffers: dict[str, float] = {}
    for at, layer in enumerate(chosen):
        halves = [LayerOperators(config, layer, layout, part, form).operators for part in parts]
        regions.append(_region(halves, target, at, layer, buffers))
    last = len(chosen)
    results = frozenset(f"{name}.{last}.{half}" for name in ("h", "y_in") for half in range(len(parts)))
    if layers is None:
        regions.append(_region([_head(config, layout, part) for part in parts], target, last, last, buffers))
        kinds.append("head")
        results = frozenset(f"logits.{last}.{half}" for half in range(len(parts)))
    for half, part in enumerate(parts):
        buffers[f"h.0.{half}"] = part.tokens * config.hc_mult * config.hidden_size * 2
        buffers[f"y_in.0.{half}"] = part.tokens * config.hidden_size * 2
    sizes = {name: round(size) for name, size in buffers.items()}
    graph = TaskGraph(tuple(task for region in regions for task in region), sizes, results)
    return StepTasks(tuple(regions), tuple(kinds), graph)


def _region(
    halves: list[list[Operator]], target: Target, at: int, layer: int, buffers: dict[str, float]
) -> tuple[Task, ...]:
    return tuple(
        _task(operator, target, at, layer, half, len(halves), buffers)
        for half, operators in enumerate(halves)
        for operator in operators
    )


def _task(
    operator: Operator, target: Target, at: int, layer: int, half: int, halves: int, buffers: dict[str, float]
) -> Task:
    """An operator as a task of a layer and a half; notes the bytes of what it writes."""

    def place(name: str, written: bool) -> str:
        if name in STATE:
            return f"{layer}.{name}"
        if written and name in ("h_out", "y_out"):
            return f"{'h' if name == 'h_out' else 'y_in'}.{at + 1}.{half}"
        return f"{name}.{at}.{half}"

    for name, size in operator.writes.items():
        if size is not None:
            buffers[place(name, True)] = size
    suffix = f".{half}" if halves > 1 else ""
    cost = operator.cost(target)
    return Task(
        f"{layer}.{operator.name}{suffix}",
        "compute" if operator.collective is None else "collective",
        cost.seconds,
        tuple(place(name, False) for name in operator.reads),
        tuple(place(name, True) for name in operator.writes),
        chunk=half,
        where=operator.group,
        beside=cost.beside,
        power=cost.power,
    )


def _head(config: DeepseekV4Config, layout: Layout, part: Part) -> list[Operator]:
    """Collapse of the streams and logits of each request's last token; the vocabulary is cut along `tp`."""
    rows, d, n = part.requests, config.hidden_size, config.hc_mult
    columns = config.vocab_size / layout.tp
    mixed = rows * d * 2
    collapse = Operator("hc_head", "head", ("h", "y_in"), {"x_head": mixed}, rows * d * 2 * (n + 2))
    size = d * columns * 2 + rows * columns * 4
    out = "logits" if layout.tp == 1 else "columns"
    logits = Operator("head", "head", ("x_head",), {out: rows * columns * 4}, size, {"bf16": 2 * rows * d * columns})
    if layout.tp == 1:
        return [collapse, logits]
    own = rows * columns * 4
    gathered = {"logits": own * layout.tp}
    return [
        collapse, logits,
        Operator("logits", "communication", ("columns",), gathered, own, {}, 1, "all_gather", layout.tp),
    ]  # fmt: skip


def schedule(
    config: DeepseekV4Config, layout: Layout, target: Target, parts: list[Part], limit: int | None = None,
    layers: Iterable[int] | None = None, form: Form = "gather",
) -> Schedule:  # fmt: skip
    """The schedule of a step, region by region; `limit`: bytes of buffers that a region may have."""
    return by_regions(step_tasks(config, layout, target, parts, layers, form), limit)


def by_regions(step: StepTasks, limit: int | None = None) -> Schedule:
    """Each region's schedule, one after the other, timed as a whole.

    Raises:
        OverlapError: a region has no schedule within the limit.
    """
    known: dict[tuple[object, ...], tuple[TaskGraph, Schedule]] = {}
    issues: list[Issue] = []
    why: dict[str, WhyNoOverlap] = {}
    moved: tuple[Task, ...] = ()
    left: Task | None = None
    for at, region in enumerate(step.regions):
        last = at == len(step.regions) - 1
        border = cut(region)
        stays = region if last else border.stays
        graph = _graph(step.graph, left, (*moved, *stays), None if last else border.open)
        key = (step.kinds[at - 1] if at else None, step.kinds[at], last)
        if key not in known:
            known[key] = graph, overlap(graph, limit)
        found = _renamed(*known[key], graph)
        issues += [i for i in found[0] if left is None or i != Issue("start", left.name)]
        why |= found[1]
        moved, left = ((), None) if last else (border.moved, border.open)
    timed = simulate(step.graph, issues)
    reasons = (
        replace(why.get(name, WhyNoOverlap(name, seconds, AFTER)), exposed=seconds)
        for name, seconds in timed.exposed.items()
        if seconds > NOTHING
    )
    return replace(timed, why=tuple(reasons))


def _graph(whole: TaskGraph, left: Task | None, tasks: Sequence[Task], open_end: Task | None) -> TaskGraph:
    """A region's own tasks, with what is under way before and stays so after; buffers that others use are results."""
    mine = (*(() if left is None else (under_way(left),)), *tasks)
    names = {task.name for task in mine}
    touched = {name for task in mine for name in (*task.reads, *task.writes)}
    after = {name for task in whole.tasks if task.name not in names for name in task.reads}
    results = frozenset(name for name in touched if name in after or name in whole.results)
    buffers = {name: size for name, size in whole.buffers.items() if name in touched}
    pending = () if left is None else (left.name,)
    return TaskGraph(mine, buffers, results, pending, frozenset() if open_end is None else frozenset({open_end.name}))


def _renamed(of: TaskGraph, found: Schedule, graph: TaskGraph) -> tuple[list[Issue], dict[str, WhyNoOverlap]]:
    """A schedule of a region as one of another region of its kind: task by task in order."""
    names = {a.name: b.name for a, b in zip(of.tasks, graph.tasks, strict=True)}
    why = {names[w.task]: replace(w, task=names[w.task], by=tuple(names[b] for b in w.by)) for w in found.why}
    return [Issue(action, names[name]) for action, name in found.issues], why
