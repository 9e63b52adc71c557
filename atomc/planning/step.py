"""A step of a model on one rank as tasks: whole, or in two micro-batches; and its schedule.

Contract:
    One rank stands for all: ranks have equal work. Layer by layer, the first half's operators come before the second's,
    and state orders them as in a chunked graph (`passes.chunk`). Nothing here is measured: seconds are of the roofline
    and of the links; what a collective takes of the compute units and of memory while it runs is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.parallel.layout import Layout
from atomc.parallel.tasks import Schedule, Task, TaskGraph
from atomc.passes.overlap import overlap
from atomc.planning.operators import LayerOperators, Operator, Part
from atomc.targets import Target

STATE = frozenset({"window", "rows", "partial", "index_rows", "index_partial"})


@dataclass(frozen=True)
class Step:
    """A step of every `dp` rank: tokens, requests, and tokens of context of each when it ends."""

    tokens: int
    requests: int
    context: int

    @property
    def phase(self) -> str:
        return "decode" if self.tokens == self.requests else "prefill"

    @property
    def whole(self) -> list[Part]:
        """The step as one part."""
        return [Part(self.tokens, self.requests, self.context)]

    @property
    def halves(self) -> list[Part] | None:
        """Two parts: decode by requests, prefill at the middle of the tokens; None where there is no middle."""
        if self.phase == "decode":
            first = (self.requests + 1) // 2
            rest = self.requests - first
            return [Part(n, n, self.context) for n in (first, rest)] if rest else None
        first, rest = (self.tokens + 1) // 2, self.tokens // 2
        if self.requests == 1:  # the first half is what the second finds in the caches
            return [Part(first, 1, self.context - rest), Part(rest, 1, self.context)] if rest else None
        return [Part(n, self.requests / 2, self.context) for n in (first, rest)]


def step_graph(
    config: DeepseekV4Config, layout: Layout, target: Target, parts: list[Part], layers: Iterable[int] | None = None
) -> TaskGraph:
    """The tasks of a step; of some layers only where `layers` says which."""
    chosen = list(range(config.num_hidden_layers) if layers is None else layers)
    tasks: list[Task] = []
    buffers: dict[str, float] = {}
    for at, layer in enumerate(chosen):
        for half, part in enumerate(parts):
            operators = LayerOperators(config, layer, layout, part).operators
            tasks += [_task(operator, target, at, layer, half, len(parts), buffers) for operator in operators]
    last = len(chosen)
    results = frozenset(f"{name}.{last}.{half}" for name in ("h", "y_in") for half in range(len(parts)))
    if layers is None:
        for half, part in enumerate(parts):
            head = _head(config, layout, part)
            tasks += [_task(operator, target, last, last, half, len(parts), buffers) for operator in head]
        results = frozenset(f"logits.{last}.{half}" for half in range(len(parts)))
    for half, part in enumerate(parts):
        buffers[f"h.0.{half}"] = part.tokens * config.hc_mult * config.hidden_size * 2
        buffers[f"y_in.0.{half}"] = part.tokens * config.hidden_size * 2
    return TaskGraph(tuple(tasks), {name: round(size) for name, size in buffers.items()}, results)


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
    return Task(
        f"{layer}.{operator.name}{suffix}",
        "compute" if operator.collective is None else "collective",
        operator.seconds(target),
        tuple(place(name, False) for name in operator.reads),
        tuple(place(name, True) for name in operator.writes),
        chunk=half,
        where=operator.group,
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
    config: DeepseekV4Config, layout: Layout, target: Target, parts: list[Part], limit: int | None = None
) -> Schedule:
    """The schedule of a whole step."""
    return overlap(step_graph(config, layout, target, parts), limit)
