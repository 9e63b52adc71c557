"""`Lockstep`: the loop of one rank. Each turn: messages, plan, one agreement, the step, outputs.

Contract:
    All ranks take the same turns. A rank without requests reports zeros and, when the executor's steps hold
    collectives, runs a batch of padding instead. Outputs of a step leave only if the run has no fault after it.
"""

from __future__ import annotations

import time
from typing import Final

from atomc.runtime.batch import idle_batch
from atomc.runtime.engine import Engine, StepPlan
from atomc.runtime.protocols import ShardedExecutor
from atomc.runtime.ranks.decide import Decision, HoldPolicy, Report, decide
from atomc.runtime.ranks.group import Ranks
from atomc.runtime.ranks.watchdog import RUN
from atomc.runtime.ranks.wire import Abort, Add, Channel, Done, Leave, Outputs, Stop, ToRank, Wake
from atomc.runtime.request import Output, Request

# How long an idle rank waits for a message before it reports again: also what a prompt waits if a wake is lost.
_IDLE_SECONDS: Final = 0.1


class Lockstep:
    """Runs `engine` in step with all ranks until the front end stops them.

    `asked_to_leave` is called once a turn; when it says so, the front end is told.
    """

    def __init__(self, engine: Engine, ranks: Ranks, channel: Channel, policy: HoldPolicy | None = None) -> None:
        self.engine, self.ranks, self.channel = engine, ranks, channel
        self.policy = policy or HoldPolicy()
        self.leave = False  # set by a signal
        self._told = False
        self._step, self._admit, self._stop = 0, True, False

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
        decision = decide(self.ranks.agree(self._report(plan)), self.policy)
        if decision.stop:
            return None
        if decision.busy:
            self.ranks.watchdog.announce(self._step, RUN)
            outputs = self._run(plan, decision)
            self.ranks.watchdog.check()
            self._answer(outputs)
        self._admit = decision.admit
        self._step += 1
        return decision

    def _plan(self) -> StepPlan | None:
        try:
            return self.engine.plan(admit=self._admit)
        except Exception as error:  # noqa: BLE001  whatever it is, the others must not wait for this rank
            self._failed(error)
        return None

    def _run(self, plan: StepPlan | None, decision: Decision) -> list[Output]:
        executor = self.engine.executor
        try:
            if isinstance(executor, ShardedExecutor):
                executor.begin(decision.tokens, decision.bucket, decision.prefill)
                if plan is None:
                    executor.step(idle_batch(self.engine.serving))
            return [] if plan is None else self.engine.run(plan)
        except Exception as error:  # noqa: BLE001
            self._failed(error)
        return []

    def _failed(self, error: Exception) -> None:
        """Raises `RankError`: what this rank's caches hold is unknown, and the others depend on it."""
        self.ranks.watchdog.check()  # a collective inside of the step fails when another rank is lost
        self.ranks.watchdog.accuse(self.ranks.rank, f"{type(error).__name__}: {error}")
        self.ranks.watchdog.check()

    def _report(self, plan: StepPlan | None) -> Report:
        scheduler, serving = self.engine.scheduler, self.engine.serving
        chunks = [] if plan is None else plan.chunks
        pending = sum(request.pending for request in scheduler.waiting)
        oldest = min((request.arrival for request in scheduler.waiting), default=None)
        return Report(
            step=self._step,
            stop=int(self._stop),
            tokens=sum(chunk.length for chunk in chunks),
            requests=len(chunks),
            prefill=int(any(chunk.length > 1 or not chunk.request.generated for chunk in chunks)),
            running=len(scheduler.running),
            pending=min(pending, serving.max_batch_tokens),
            waited_ms=0 if oldest is None else int((self.engine.clock() - oldest) * 1000),
        )

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
