"""Whether a step is worth two micro-batches: by what the schedule predicts to gain, for each phase and size.

Contract:
    `tbo=off` never, `prefill` and `all` wherever a step has two halves, `auto` where the prediction gains more than
    `MARGIN`. Sizes are those of every rank, so that all ranks decide alike. A refusal says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.parallel.layout import Layout
from atomc.parallel.tasks import Schedule
from atomc.passes.overlap import OverlapError
from atomc.passes.shard import form_of
from atomc.planning.step import Step, schedule
from atomc.targets import Target

# Of measured chains, those for which up to 0.028 was predicted gained 0.02 at most (docs/planning.md).
MARGIN: Final = 0.03


@dataclass(frozen=True)
class Decision:
    """One step of a phase, whole and in halves.

    Attributes:
        whole, halves: schedules; no halves where a step cannot be cut, or where nobody asks. why: in words.
    """

    step: Step
    whole: Schedule
    halves: Schedule | None
    on: bool
    why: str

    @property
    def gain(self) -> float:
        """Throughput of the halves over the whole step's, less one; 0 without halves."""
        return 0.0 if self.halves is None else self.whole.seconds / self.halves.seconds - 1

    @property
    def chosen(self) -> Schedule:
        """The schedule that the step runs by."""
        return self.halves if self.on and self.halves is not None else self.whole


def decide(config: DeepseekV4Config, layout: Layout, target: Target, step: Step, limit: int | None = None) -> Decision:
    """Whether a step runs in halves; `limit`: bytes of buffers that a region of them may have."""
    form = form_of(layout, target, step.phase)
    whole = schedule(config, layout, target, step.whole, form=form)
    parts = step.halves
    if layout.tbo == "off":
        return Decision(step, whole, None, False, "tbo=off")
    if layout.tbo == "prefill" and step.phase != "prefill":
        return Decision(step, whole, None, False, "tbo=prefill leaves decode whole")
    if parts is None:
        return Decision(step, whole, None, False, "it has no two halves")
    try:
        halves = schedule(config, layout, target, parts, limit, form=form)
    except OverlapError as error:
        return Decision(step, whole, None, False, f"two halves do not fit into memory: {error}")
    gain = whole.seconds / halves.seconds - 1
    if layout.tbo != "auto":
        return Decision(step, whole, halves, True, f"tbo={layout.tbo}; {gain:+.1%} predicted")
    if gain > MARGIN:
        return Decision(step, whole, halves, True, f"{gain:+.1%} predicted")
    return Decision(step, whole, halves, False, f"{gain:+.1%} predicted: {_cost(whole, halves)}")


def _cost(whole: Schedule, halves: Schedule) -> str:
    """Why the halves gain little: what they hide against what they compute more."""
    hidden = sum(whole.exposed.values()) - sum(halves.exposed.values())
    busy = [sum(t.seconds for t in s.graph.tasks if t.stream == "compute") for s in (whole, halves)]
    return f"{_ms(hidden)} less of exposed communication, {_ms(busy[1] - busy[0])} more of compute (weights read twice)"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
