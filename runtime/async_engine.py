"""`AsyncEngine`: an engine in a thread of its own, used from asyncio by the server.

Contract:
    A stream that is cancelled frees its requests before the next step. Messages to the thread are the only way in;
    what the thread has to say goes to the streams' event loop, once per step.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Sequence
from typing import NamedTuple

from atomc.runtime.engine import Engine
from atomc.runtime.errors import UnavailableError
from atomc.runtime.frontend import Frontend
from atomc.runtime.request import Request


class _Add(NamedTuple):
    request: Request


class _Leave(NamedTuple):
    request_id: str


class _Stop(NamedTuple):
    message: str


_Message = _Add | _Leave | _Stop


class AsyncEngine(Frontend):
    """Starts its thread at once; `shutdown` ends it. `max_waiting` bounds the queue: beyond it clients are refused."""

    def __init__(self, engine: Engine, *, max_waiting: int = 1024) -> None:
        most = max_waiting + engine.serving.max_requests
        super().__init__(engine.intake, engine.metrics, engine.executor.tokenizer_path, most)
        self.engine = engine
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="atomc-engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> Exception | None:
        return self.engine.failure

    def _add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._inbox.put(_Add(request))

    def _abort(self, request_id: str) -> None:
        self._inbox.put(_Leave(request_id))

    async def _stop(self, message: str) -> None:
        self._inbox.put(_Stop(message))
        await asyncio.to_thread(self._thread.join)

    # -- below: the engine's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                if not self._take_messages():
                    return
                self._deliver(self.engine.step())
            except Exception as error:  # noqa: BLE001 - a defect of ours must not leave a client waiting either
                self._deliver(self.engine.fail(error))
                for stream in list(self._streams.values()):
                    self._refuse(stream.requests, str(self.engine.failure))

    def _take_messages(self) -> bool:
        """Obeys all messages, waiting for one when there is nothing else to do; False when told to stop."""
        while True:
            try:
                message = self._inbox.get(block=not self.engine.has_work)
            except queue.Empty:
                return True
            match message:
                case _Add(request):
                    try:
                        self.engine.submit(request)
                    except UnavailableError as error:  # the engine failed after the request was let in
                        self._refuse((request,), str(error))
                case _Leave(request_id):
                    self._streams.pop(request_id, None)
                    self.engine.abort(request_id)
                case _Stop(text):
                    self._deliver(self.engine.abort_all(text))
                    return False
