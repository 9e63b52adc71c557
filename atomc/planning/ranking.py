"""Ranking of layouts for a workload: predicted throughput, memory, and why each loses.

Contract:
    A closed loop: so many requests at a time, each with a prompt and an answer of given lengths. Prompts are computed
    in steps of at most `BUDGET` tokens a `dp` rank, all ranks at once; answers in decode steps of all requests that are
    there. Throughput is that of one round of all of them: prompt and answer tokens over prefill and decode time. What
    does not fit into memory at a time waits for the next round. Every figure is predicted, none measured; host time,
    sampling, uneven experts and ranks are not in it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from atomc.dividing import model_sizes
from atomc.errors import AtomcError
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.parallel.layout import Layout, LayoutError, ModelSizes, Tbo, divisors
from atomc.passes.scheme import SCHEMES
from atomc.planning.decide import Decision, decide
from atomc.planning.memory import rank_memory
from atomc.planning.step import Step
from atomc.targets import Target

BUDGET: Final = 8192  # tokens of a prefill step on each rank of dp


class WorkloadError(AtomcError):
    """A workload that cannot be read."""


@dataclass(frozen=True)
class Workload:
    """Tokens of a prompt and of an answer, and requests at a time."""

    prompt: int
    answer: int
    concurrency: int

    @staticmethod
    def parse(text: str, concurrency: int) -> Workload:
        """`8k/1k`, `1000/200`: prompt, answer.

        Raises:
            WorkloadError
        """
        found = re.fullmatch(r"(\d+)(k?)/(\d+)(k?)", text.strip().lower())
        sizes = [int(n) * (1024 if k else 1) for n, k in (found.group(1, 2), found.group(3, 4))] if found else []
        if not sizes or min(sizes) < 1:
            raise WorkloadError(f"--workload {text} is no PROMPT/ANSWER in tokens, such as 8k/1k or 1000/200.")
        return Workload(sizes[0], sizes[1], concurrency)


@dataclass(frozen=True)
class Row:
    """One layout.

    Attributes:
        fits: requests at a time that memory holds, at most the workload's. bytes: a rank's memory with them.
        prefill, decode: one step of each, and seconds of all of them in a round. why: why it is not the first.
    """

    layout: Layout
    fits: int
    bytes: float
    prefill: Decision | None = None
    decode: Decision | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    tokens: int = 0
    why: str = ""

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds

    @property
    def throughput(self) -> float:
        """Tokens of prompts and answers a second, of all ranks together; 0 where the model does not fit."""
        return self.tokens / self.seconds if self.tokens else 0.0

    def groups(self) -> Counter[str]:
        """Seconds of a round by what they go to; communication is what is exposed of it."""
        found: Counter[str] = Counter()
        for decision, seconds in ((self.prefill, self.prefill_seconds), (self.decode, self.decode_seconds)):
            if decision is not None and decision.chosen.seconds:
                scale, chosen = seconds / decision.chosen.seconds, decision.chosen
                for task in chosen.graph.tasks:
                    spent = task.seconds if task.stream == "compute" else chosen.exposed[task.name]
                    found[task.where] += spent * scale  # type: ignore[assignment]
        return found


def layouts(config: DeepseekV4Config, ranks: int, tbo: Tbo) -> Iterator[Layout]:
    """Every legal layout on so many ranks."""
    for tp in divisors(ranks):
        for moe in ("tp", "ep"):
            layout = Layout(ranks // tp, tp, moe, tbo if ranks > 1 else "off")
            try:
                layout.check(sizes_of(config))
            except LayoutError:
                continue
            if ranks > 1 or moe == "tp":
                yield layout


def sizes_of(config: DeepseekV4Config) -> ModelSizes:
    """The numbers that a layout must divide: those that a compile with the checkpoint's own formats goes by."""
    return model_sizes(config, SCHEMES["native"])


def rank(config: DeepseekV4Config, target: Target, ranks: int, workload: Workload, tbo: Tbo = "auto") -> list[Row]:
    """All layouts, the one with the highest predicted throughput first."""
    rows = [_row(config, layout, target, workload) for layout in layouts(config, ranks, tbo)]
    rows.sort(key=lambda row: (-row.throughput, str(row.layout)))
    return [_explained(row, rows[0], workload) for row in rows]


def _row(config: DeepseekV4Config, layout: Layout, target: Target, workload: Workload) -> Row:
    context = workload.prompt + workload.answer
    memory = rank_memory(config, layout, target, context, BUDGET)
    fits = min(workload.concurrency, memory.requests * layout.dp)
    if fits < 1:
        return Row(layout, 0, memory.at(1))
    mine = -(-fits // layout.dp)  # requests of the fullest rank
    tokens = min(BUDGET, mine * workload.prompt)
    steps = (
        _prefill(tokens, workload.prompt, min(fits, layout.dp)),
        Step(mine, mine, workload.prompt + workload.answer // 2, live=fits),
    )
    prefill, decode = (decide(config, layout, target, step, memory.left(mine)) for step in steps)
    rounds = workload.concurrency / fits
    times = mine * workload.prompt / tokens
    return Row(
        layout, fits, memory.at(mine), prefill, decode, rounds * times * prefill.chosen.seconds,
        rounds * workload.answer * decode.chosen.seconds, workload.concurrency * context,
    )  # fmt: skip


def _prefill(tokens: int, prompt: int, ranks: int) -> Step:
    """A step of whole prompts, or the middle part of one that is longer than a step, on so many ranks of `dp`."""
    if tokens >= prompt:
        return Step(tokens, max(1, tokens // prompt), prompt, tokens * ranks)
    return Step(tokens, 1, (prompt + tokens) // 2, tokens * ranks)


def _explained(row: Row, best: Row, workload: Workload) -> Row:
    if row is best:
        return replace(row, why="" if row.tokens else "it does not fit into memory")
    if not row.tokens:
        return replace(row, why="weights leave no memory for one request")
    mine, theirs = row.groups(), best.groups()
    worst, more = max(((g, mine[g] - theirs[g]) for g in mine.keys() | theirs.keys()), key=lambda x: (x[1], x[0]))
    share = more / row.seconds
    text = f"{WORDS[worst]} {share:.0%} of its time more than {best.layout}"
    if row.fits < workload.concurrency:
        text += f"; memory holds {row.fits} of {workload.concurrency} requests"
    if worst == "communication":
        text += f" ({_longest(row)})"
    return replace(row, why=text)


WORDS: Final = {
    "attention": "attention takes", "caches": "cache writes and norms take", "streams": "mixing of streams takes",
    "experts": "experts take", "head": "the head takes", "communication": "exposed communication takes",
}  # fmt: skip


def _longest(row: Row) -> str:
    """The collective that is exposed longest in a step of the phase that takes longer."""
    decision = row.prefill if row.prefill_seconds > row.decode_seconds else row.decode
    assert decision is not None
    found: Counter[str] = Counter()
    for name, seconds in decision.chosen.exposed.items():
        found[name.split(".")[1]] += seconds  # type: ignore[assignment]
    return f"most of it {found.most_common(1)[0][0]}, in {decision.step.phase}"
