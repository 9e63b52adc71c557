"""`Lockstep`: the loop of one rank. Each turn: messages, plan, one agreement, the step, outputs.

Contract:
    All ranks take the same turns. A rank without requests reports zeros and, when the executor's steps hold
    collectives, runs a batch of padding instead; one that does not lead its tp group runs the batch of the one that
    does. Outputs of a step leave only if the run has no fault after it.
"""

from __future__ import annotations

import time
from typing import Final

from atomc.runtime.batch import idle_batch
from atomc.runtime.engine import Engine, StepPlan
from atomc.runtime.protocols import ShardedExecutor
from atomc.runtime.ranks.beats import FIRST, RUN
from atomc.runtime.ranks.decide import Decision, Report, decide
from atomc.runtime.ranks.group import Ranks
from atomc.runtime.ranks.wire import Abort, Add, Channel, Done, Leave, Outputs, Stop, ToRank, Wake
from atomc.runtime.request import Output, Request

# How long an idle rank waits for a message before it reports again: also what a prompt waits if a wake is lost.
_IDLE_SECONDS: Final = 0.1


class Lockstep:
    """Runs `engine` in step with all ranks until the front end stops them.

    `leave`, once set, by a signal, tells the front end that the run shall end.
    """

    def __init__(self, engine: Engine, ranks: Ranks, channel: Channel) -> None:
        self.engine, self.ranks, self.channel = engine, ranks, channel
        executor = engine.executor
        self._sharded = executor if isinstance(executor, ShardedExecutor) else None
        self.leave = False
        self._told, self._ran = False, False
        self._step, self._stop = 0, False

    def run(self) -> None:
        """Raises `RankError` when a rank or the front end is lost, this one included."""
        while (decision := self._turn()) is not None:
            if not decision.busy:
                self._obey(_IDLE_SECONDS)
        self._send(Done())

    def _turn(self) -> Decision | None:
        self._obey(0)
        if self.leave and not self._told:
            self._told = True
            self._send(Leave())
        plan = self._plan()
        report = Report.of(self._step, self._stop, None if plan is None else plan.batch)
        reports = self.ranks.agree(report)
        decision = decide(reports, self.ranks.tp)
        if decision.stop:
            return None
        if decision.busy:
            outputs = self._run(plan, reports, decision)
            self.ranks.watchdog.check()
            self._answer(outputs)
        self._step += 1
        return decision

    def _plan(self) -> StepPlan | None:
        try:
            return self.engine.plan()
        except Exception as error:  # noqa: BLE001  whatever it is, the others must not wait for this rank
            self.ranks.failed(error)
        return None

    def _run(self, plan: StepPlan | None, reports: list[Report], decision: Decision) -> list[Output]:
        leader = reports[self.ranks.rank // self.ranks.tp * self.ranks.tp]
        batch = None if plan is None else plan.batch
        if self.ranks.tp > 1 and leader.tokens:
            batch = self.ranks.share(batch, leader, self.engine.serving)
        runs = self._sharded is not None or plan is not None
        if runs:
            self.ranks.watchdog.announce(self._step, RUN if self._ran else FIRST)
        self._ran = self._ran or runs
        try:
            if self._sharded is not None:
                self._sharded.begin(decision.tokens, decision.bucket, decision.prefill)
                if plan is None:
                    self._sharded.step(batch or idle_batch(self.engine.serving))
            return [] if plan is None else self.engine.run(plan)
        except Exception as error:  # noqa: BLE001  what this rank's caches hold is unknown
            self.ranks.failed(error)
        return []

    def _answer(self, outputs: list[Output]) -> None:
        if outputs:
            scheduler = self.engine.scheduler
            self._send(Outputs(self._step, outputs, len(scheduler.running), len(scheduler.waiting)))

    def _send(self, message: Outputs | Leave | Done) -> None:
        try:
            self.channel.send(message)
        except OSError as error:
            self.ranks.front_is_gone(error)

    def _obey(self, wait_seconds: float) -> None:
        """Obeys the messages that are there; waits for the first one, if told to."""
        try:
            until = time.monotonic() + wait_seconds
            message = self.channel.receive(wait_seconds)
            while message is not None and time.monotonic() < until + _IDLE_SECONDS:
                self._obey_one(message)
                message = self.channel.receive()
            if message is not None:
                self._obey_one(message)
        except (EOFError, OSError) as error:
            self.ranks.front_is_gone(error)

    def _obey_one(self, message: ToRank) -> None:
        match message:
            case Add():
                self.engine.submit(
                    Request(
                        id=message.id, tokens=message.tokens, prompt_tokens=len(message.tokens), params=message.params,
                        limit=message.limit, stop_ids=frozenset(message.stop_ids), arrival=self.engine.clock(),
                    )
                )  # fmt: skip
            case Abort():
                self.engine.abort(message.id)
            case Stop():
                self._stop = True
                self._answer(self.engine.abort_all(message.message))
            case Wake():
                pass
