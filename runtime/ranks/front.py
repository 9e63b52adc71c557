"""`RankedFront`: the front end of a run: requests go to the rank with the least to do, outputs come back to clients.

Contract:
    No call here waits for a rank: each has a thread that writes to it and one that reads from it. When a rank is lost,
    by its closed connection or by the watchdog's word, every client gets an error that names it, at once.
"""

from __future__ import annotations

import asyncio
import os
import queue
import secrets
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Final

from prometheus_client import Gauge

from atomc.runtime.detokenize import Vocabulary
from atomc.runtime.errors import RankError
from atomc.runtime.frontend import Frontend
from atomc.runtime.intake import Intake
from atomc.runtime.metrics import Metrics
from atomc.runtime.protocols import Serving
from atomc.runtime.ranks.group import Stores, machine
from atomc.runtime.ranks.watchdog import FRONT, Bounds, Watchdog
from atomc.runtime.ranks.wire import (
    Abort,
    Add,
    Done,
    Leave,
    Outputs,
    Ready,
    Stop,
    ToFront,
    ToRank,
    Wake,
    decode_for_front,
    encode,
)
from atomc.runtime.request import Output, Request

_LOOK_SECONDS: Final = 0.1
# How long a server whose run has failed still says so to those who ask.
_LINGER_SECONDS: Final = 1.0
# What a rank takes to end after it has noticed a fault, at most.
_END_SECONDS: Final = 1.0


class _Line:
    """The connection to one rank, with its two threads. `gone` is called once, when it ends without `Done`."""

    def __init__(
        self, connection: Connection, ready: Ready, take: Callable[[int, ToFront], None], gone: Callable[[int], None]
    ) -> None:
        self.ready, self.ended = ready, threading.Event()
        self._connection, self._take, self._gone = connection, take, gone
        self._out: queue.SimpleQueue[ToRank | None] = queue.SimpleQueue()
        for work in (self._read, self._write):
            threading.Thread(target=work, name=f"atomc-rank-{ready.rank}", daemon=True).start()

    def send(self, message: ToRank) -> None:
        self._out.put(message)

    def close(self) -> None:
        self._out.put(None)

    def _read(self) -> None:
        try:
            while not isinstance(message := decode_for_front(self._connection.recv_bytes()), Done):
                self._take(self.ready.rank, message)
            self.ended.set()
            self._take(self.ready.rank, message)
        except (EOFError, OSError):
            self.ended.set()
            self._gone(self.ready.rank)

    def _write(self) -> None:
        with suppress(OSError):  # the reader sees the same end, and says so
            while (message := self._out.get()) is not None:
                self._connection.send_bytes(encode(message))
        with suppress(OSError):
            self._connection.close()


class Lines:
    """Where ranks call: listens at a free port of `host`, which it tells in the run's store, with the run's key."""

    def __init__(self, host: str, size: int) -> None:
        self.size, self._key = size, secrets.token_bytes(32)
        self._listener = Listener((host, 0), backlog=size, authkey=self._key)

    def tell(self, stores: Stores) -> None:
        host, port = self._listener.address
        stores.words.set("front", f"{host} {port} {self._key.hex()}")

    def accept(self) -> tuple[Connection, Ready]:
        """The next rank that calls, and what it says of itself. Raises `OSError` once closed."""
        while True:
            try:
                connection = self._listener.accept()
                message = decode_for_front(connection.recv_bytes())
            except (EOFError, ConnectionError, AuthenticationError):
                continue  # no rank of this run, or one that died while it called: the watchdog sees that
            if isinstance(message, Ready):
                return connection, message

    def close(self) -> None:
        self._listener.close()


class RankedFront(Frontend):
    """Requests to ranks; `gather` first. `max_waiting` bounds the queue of all ranks together.

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
        max_waiting: int = 1024,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        vocabulary = Vocabulary.from_file(tokenizer_path)
        super().__init__(Intake(serving, vocabulary, serving.max_context), Metrics(), tokenizer_path, max_waiting)
        self.size, self.on_end = size, on_end
        self.error: RankError | None = None
        self.lines: list[_Line] = []
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
            FRONT, size, stores.words, stores.looks, bounds, on_fault=self._fail, end_process=False
        )

    def gather(self, lines: Lines) -> None:
        """Wait until every rank has called. Raises `RankError` when one is lost before that."""
        waiting: queue.SimpleQueue[tuple[Connection, Ready]] = queue.SimpleQueue()
        threading.Thread(target=_accept_all, args=(lines, waiting), name="atomc-accept", daemon=True).start()
        found: dict[int, _Line] = {}
        while len(found) < self.size:
            with suppress(queue.Empty):
                connection, ready = waiting.get(timeout=0.05)
                found[ready.rank] = _Line(connection, ready, self._take, self._gone)
            if self.error is not None:
                raise self.error
        lines.close()
        self.lines = [found[rank] for rank in range(self.size)]
        self.intake.token_capacity = min(line.ready.token_capacity for line in self.lines)
        self.max_live += sum(line.ready.max_requests for line in self.lines)

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
            rank = min(range(self.size), key=lambda each: (*self._loads[each], each))
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

    def _gone(self, rank: int) -> None:
        """A rank's connection was closed without a last word: its process has ended."""
        if self.error is None:
            self.watchdog.accuse(rank, "its process ended", self.watchdog.latest(rank))

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
            silent = fault is not None and fault.member == line.ready.rank != fault.seen_by
            ended = line.ended.wait(0 if silent else max(0.0, until - time.monotonic()))
            if not ended and line.ready.machine == here:
                with suppress(OSError):
                    os.kill(line.ready.pid, signal.SIGKILL)


def _accept_all(lines: Lines, found: queue.SimpleQueue[tuple[Connection, Ready]]) -> None:
    with suppress(OSError):  # closed: all are there
        for _ in range(lines.size):
            found.put(lines.accept())
