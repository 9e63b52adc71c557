"""`RankedFront`: the front end of a run: requests go to the rank with the least to do, outputs come back to clients.

Contract:
    No call here waits for a rank: each has a thread that writes to it and one that reads from it. When a rank is lost,
    by its closed connection or by the watchdog's word, every client gets an error that names it, at once.
"""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from prometheus_client import Gauge

from atomc.runtime.detokenize import Vocabulary
from atomc.runtime.errors import RankError
from atomc.runtime.frontend import Frontend
from atomc.runtime.intake import Intake
from atomc.runtime.metrics import Metrics
from atomc.runtime.protocols import Serving
from atomc.runtime.ranks.beats import FRONT, Bounds
from atomc.runtime.ranks.group import Stores, machine
from atomc.runtime.ranks.lines import Line, Lines
from atomc.runtime.ranks.watchdog import Watchdog
from atomc.runtime.ranks.wire import Abort, Add, Done, Leave, Outputs, Ready, Stop, ToFront, Wake
from atomc.runtime.request import Output, Request

_LOOK_SECONDS: Final = 0.1
# How long a server whose run has failed still says so to those who ask.
_LINGER_SECONDS: Final = 1.0
# What a rank takes to end after it has noticed a fault, at most.
_END_SECONDS: Final = 1.0


class RankedFront(Frontend):
    """Requests to the first of each `tp` ranks; `gather` first. `max_waiting` bounds the queue of all ranks together.

    `on_end` is called once, from some thread, when the run ends before `shutdown`: a rank was lost, or was told to
    leave by a signal.
    """

    failed_as = (503, "rank_lost")

    def __init__(
        self,
        serving: Serving,
        tokenizer_path: Path,
        size: int,
        stores: Stores,
        bounds: Bounds,
        *,
        tp: int = 1,
        max_waiting: int = 1024,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        vocabulary = Vocabulary.from_file(tokenizer_path)
        super().__init__(Intake(serving, vocabulary, serving.max_context), Metrics(), tokenizer_path, max_waiting)
        self.size, self.on_end = size, on_end
        self.leaders = range(0, size, tp)
        self._stores = stores  # kept: one of them may host the run's store
        self.error: RankError | None = None
        self.lines: list[Line] = []
        self._books = threading.Lock()  # over the next two
        self._where: dict[str, tuple[int, Request]] = {}
        self._loads = [[0, 0] for _ in range(size)]  # requests and their prompts' tokens, of each rank
        self._all_done = threading.Event()
        self._done: set[int] = set()
        self._holding = Gauge(
            "atomc_rank_requests", "Requests of a rank", ["rank", "state"], registry=self.metrics.registry
        )
        self._steps = Gauge("atomc_rank_step", "Last step that gave tokens", ["rank"], registry=self.metrics.registry)
        self.watchdog = Watchdog(
            FRONT, size, stores.beats, stores.faults, bounds, hosted=stores.hosted, on_fault=self._fail,
            end_process=False,
        )  # fmt: skip

    def gather(self, lines: Lines) -> None:
        """Wait until every rank has called. Raises `RankError` when one is lost before that."""
        found: dict[int, Line] = {}
        while len(found) < self.size:
            with suppress(queue.Empty):
                connection, ready = lines.arrived.get(timeout=0.05)
                found[ready.rank] = Line(connection, ready, self._take, self._gone)
            if self.error is not None:
                raise self.error
        lines.close()
        self.lines = [found[rank] for rank in range(self.size)]
        self.intake.token_capacity = min(line.ready.token_capacity for line in self.lines)
        self.max_live += sum(self.lines[rank].ready.max_requests for rank in self.leaders)

    # -- a Frontend ----------------------------------------------------------------------------------------------------

    @property
    def failure(self) -> Exception | None:
        return self.error

    def _add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            rank = self._enter(request)
            self.metrics.accepted(request)
            self.lines[rank].send(
                Add(request.id, request.tokens, request.params, request.limit, sorted(request.stop_ids))
            )
        for line in self.lines:
            line.send(Wake())

    def _enter(self, request: Request) -> int:
        """Put a request into the books of the rank with the fewest requests, then the fewest tokens of prompts."""
        with self._books:
            rank = min(self.leaders, key=lambda each: (*self._loads[each], each))
            self._loads[rank][0] += 1
            self._loads[rank][1] += request.prompt_tokens
            self._where[request.id] = rank, request
        return rank

    def _abort(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        if (rank := self._forget(request_id, "abort")) is not None:
            self.lines[rank].send(Abort(request_id))

    async def _stop(self, message: str) -> None:
        for line in self.lines:
            line.send(Stop(message))
        while self.error is None and not await asyncio.to_thread(self._all_done.wait, _LOOK_SECONDS):
            pass
        if self.error is not None:  # meanwhile clients whose requests are on their way are answered too
            await asyncio.gather(asyncio.to_thread(self._end_ranks), asyncio.sleep(_LINGER_SECONDS))
        self.watchdog.stop()
        for line in self.lines:
            line.close()

    # -- below: called from the threads of the lines and of the watchdog -----------------------------------------------

    def _take(self, rank: int, message: ToFront) -> None:
        match message:
            case Outputs():
                if self.error is None:
                    self._count(rank, message)
                    self._deliver(message.outputs)
            case Leave():
                self.on_end()
            case Done():
                self._done.add(rank)
                if len(self._done) == self.size:
                    self._all_done.set()
            case Ready():
                pass

    def _count(self, rank: int, message: Outputs) -> None:
        now = self.intake.clock()
        self._steps.labels(rank).set(message.step)
        self._holding.labels(rank, "running").set(message.running)
        self._holding.labels(rank, "waiting").set(message.waiting)
        for output in message.outputs:
            if (found := self._where.get(output.request_id)) is None:
                continue
            if output.token_ids:
                self.metrics.token(found[1], now)
                self.metrics.generated_tokens.inc(len(output.token_ids))
            if output.finish_reason is not None:
                self._forget(output.request_id, output.finish_reason)

    def _forget(self, request_id: str, reason: str) -> int | None:
        """Take a request out of the books; the rank that had it."""
        with self._books:
            found = self._where.pop(request_id, None)
            if found is None:
                return None
            rank, request = found
            self._loads[rank][0] -= 1
            self._loads[rank][1] -= request.prompt_tokens
        self.metrics.ended(request, reason, self.intake.clock())
        return rank

    def _gone(self, rank: int, why: str) -> None:
        """A rank's connection was closed without a last word."""
        self.watchdog.accuse([rank], why)

    def _fail(self, error: RankError) -> None:
        with self._gate:  # what is let in after this is refused, what was let in before gets its error below
            self.error = error
        waiting = [Output(id, "", (), (), 0, 0, "error", error.message) for id in list(self._streams)]
        self._deliver(waiting)
        for output in waiting:
            self._forget(output.request_id, "error")
        self.on_end()

    def _end_ranks(self) -> None:
        """After a fault: every rank ends itself. One that cannot would hold ports and memory for ever: end it here.

        What others accuse of silence has had its time already.
        """
        fault, here = self.watchdog.fault, machine()
        until = time.monotonic() + self.watchdog.bounds.grace_ms / 1000 + _END_SECONDS
        for line in self.lines:
            silent = fault is not None and line.ready.rank in fault.members and line.ready.rank != fault.seen_by
            ended = line.ended.wait(0 if silent else max(0.0, until - time.monotonic()))
            if not ended and line.ready.machine == here:
                with suppress(OSError):
                    os.kill(line.ready.pid, signal.SIGKILL)
