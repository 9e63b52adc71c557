"""What all ranks do in a step, from one report of each. Pure: equal reports give equal decisions, on every rank.

Contract:
    A rank that has nothing to run still reports, and every rank sees every report; so nobody waits for a rank that has
    decided otherwise. No clock is read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from atomc.ops.batch import Batch


class Report(NamedTuple):
    """What a rank says of itself before a step; integers, sent as they are.

    Attributes:
        step: its number of the step; all must agree. stop: 1 when it is told to stop.
        tokens, requests, csa_ends, hca_ends, logit_rows: sizes of its batch; 0 when it has nothing to run, or when it
            runs the batch of another rank.
    """

    step: int
    stop: int
    tokens: int = 0
    requests: int = 0
    csa_ends: int = 0
    hca_ends: int = 0
    logit_rows: int = 0

    @classmethod
    def of(cls, step: int, stop: bool, batch: Batch | None) -> Report:
        """`batch`: what it would run."""
        if batch is None:
            return cls(step, int(stop))
        fields = batch.ids, batch.slots, batch.csa_ends, batch.hca_ends, batch.logit_rows
        return cls(step, int(stop), *(len(field) for field in fields))


@dataclass(frozen=True)
class Decision:
    """What a step is, the same on every rank.

    Attributes:
        stop: the ranks end before this step. tokens: of each rank in this step, those of a tp group the same.
        bucket: what uniform steps are padded to, the most of them.
        prefill: on some rank it is more than one token of each request and its logits, so that sizes are each rank's
            own and no graph is replayed.
    """

    stop: bool
    prefill: bool
    tokens: tuple[int, ...]
    bucket: int

    @property
    def busy(self) -> bool:
        """Some rank runs something."""
        return self.bucket > 0


def decide(reports: Sequence[Report], tp: int = 1) -> Decision:
    """The decision for reports of one step, in the order of ranks; each `tp` of them run the batch of the first."""
    firsts = reports[::tp]
    tokens = tuple(report.tokens for report in firsts for _ in range(tp))
    return Decision(
        stop=all(report.stop for report in reports),
        prefill=any(not report.tokens == report.requests == report.logit_rows for report in firsts),
        tokens=tokens,
        bucket=max(tokens),
    )
