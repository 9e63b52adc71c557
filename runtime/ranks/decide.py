"""What all ranks do in a step, from one report of each. Pure: equal reports give equal decisions, on every rank.

Contract:
    A rank that has nothing to run still reports, and every rank sees every report; so nobody waits for a rank that has
    decided otherwise. No clock is read here: a wait is a number in a report, and each rank judges its own clock.

Terms:
    hold    waiting prompts do not join in the next step, so that more of them share one: a step with a prompt in it
            costs every rank, whoever's prompt it is. Bounded in milliseconds of the oldest prompt's wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Report(NamedTuple):
    """What a rank says of itself before a step; integers, sent as they are.

    Attributes:
        step: its number of the step; all must agree. stop: 1 when it is told to stop.
        tokens, requests: that it runs in this step; 0 when it has nothing to run.
        prefill: 1 when one of them is a part of a prompt. running: requests that hold a slot.
        pending: tokens of prompts that wait to join, at most `max_batch_tokens`.
        waited_ms: how long the oldest of those has waited.
    """

    step: int
    stop: int
    tokens: int
    requests: int
    prefill: int
    running: int
    pending: int
    waited_ms: int


@dataclass(frozen=True)
class HoldPolicy:
    """`bound_ms`: longest hold, 0 never holds. `fill`: share of all ranks' token budget that is worth a step."""

    bound_ms: int = 0
    fill: float = 0.9
    max_batch_tokens: int = 1


@dataclass(frozen=True)
class Decision:
    """What a step is, the same on every rank.

    Attributes:
        stop: the ranks end before this step. admit: waiting prompts may join in the *next* step.
        tokens: of each rank in this step. bucket: what uniform steps are padded to, the most of them.
        prefill: some rank computes a part of a prompt, so that sizes are each rank's own and no graph is replayed.
    """

    step: int
    stop: bool
    admit: bool
    prefill: bool
    tokens: tuple[int, ...]
    bucket: int

    @property
    def busy(self) -> bool:
        """Some rank runs something."""
        return self.bucket > 0


def decide(reports: Sequence[Report], policy: HoldPolicy) -> Decision:
    """The decision for reports of one step, in the order of ranks."""
    tokens = tuple(report.tokens for report in reports)
    return Decision(
        step=reports[0].step,
        stop=all(report.stop for report in reports),
        admit=not _hold(reports, policy),
        prefill=any(report.prefill for report in reports),
        tokens=tokens,
        bucket=max(tokens),
    )


def _hold(reports: Sequence[Report], policy: HoldPolicy) -> bool:
    if policy.bound_ms == 0:
        return False
    if not any(report.running for report in reports):
        return False  # nothing runs that a prompt would disturb
    if any(report.prefill for report in reports):
        return False  # the step is a prefill step already
    if any(report.waited_ms >= policy.bound_ms for report in reports):
        return False
    budget = len(reports) * policy.max_batch_tokens
    return sum(report.pending for report in reports) < policy.fill * budget
