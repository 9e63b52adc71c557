"""`AsyncEngine`: an engine in a thread of its own, used from asyncio by the server.

Contract:
    Every request that `submit` took gets a last output, whatever happens: answer, engine failure, shutdown. A stream
    that is cancelled frees its requests before the next step. Messages to the thread are the only way in; what the
    thread has to say goes to the streams' event loop, once per step.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal, NamedTuple

from atomc.runtime.engine import Engine, Prompt
from atomc.runtime.errors import UnavailableError
from atomc.runtime.request import Output, Request, SamplingParams

Status = Literal["ready", "stopping", "failed"]

# Encoding a longer text in the event loop would hold up every stream.
_LONG_TEXT = 4096
_DRAIN_POLL_SECONDS = 0.02


class _Add(NamedTuple):
    request: Request


class _Abort(NamedTuple):
    request_id: str


class _Stop(NamedTuple):
    message: str


_Message = _Add | _Abort | _Stop


class Stream:
    """Iterates over (index of the request, output) of requests submitted together, until all have ended."""

    def __init__(self, requests: Sequence[Request], cancel: Callable[[str], None]) -> None:
        self.requests = tuple(requests)
        self.loop = asyncio.get_running_loop()
        self._cancel = cancel
        self._open = {request.id: index for index, request in enumerate(requests)}
        self._outputs: asyncio.Queue[Output] = asyncio.Queue()

    def put(self, output: Output) -> None:
        """Called in the stream's event loop."""
        self._outputs.put_nowait(output)

    def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        while self._open:
            output = await self._outputs.get()
            index = self._open.get(output.request_id)
            if index is None:  # it was cancelled after this output was on its way
                continue
            if output.finish_reason is not None:
                del self._open[output.request_id]
            return index, output
        raise StopAsyncIteration

    def cancel(self, index: int | None = None) -> None:
        """Frees one request, or all, unless their last output was read; may be called any number of times."""
        for request in self.requests if index is None else (self.requests[index],):
            if self._open.pop(request.id, None) is not None:
                self._cancel(request.id)


class AsyncEngine:
    """Starts its thread at once; `shutdown` ends it. `max_waiting` bounds the queue: beyond it clients are refused."""

    def __init__(self, engine: Engine, *, max_waiting: int = 1024) -> None:
        self.engine = engine
        self.max_waiting = max_waiting
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}
        # Makes "still accepting?" and "put into the inbox" one act, so that nothing can be added behind a _Stop.
        self._gate = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="atomc-engine", daemon=True)
        self._thread.start()

    @property
    def status(self) -> Status:
        if self.engine.failure is not None:
            return "failed"
        return "stopping" if self._stopping else "ready"

    @property
    def active(self) -> int:
        """Requests that have not got their last output."""
        return len(self._streams)

    async def submit(self, jobs: Sequence[tuple[Prompt, SamplingParams]]) -> Stream:
        """Takes several requests in, or none. Raises `RequestError` (the client's fault) or `UnavailableError`."""
        if any(isinstance(prompt, str) and len(prompt) > _LONG_TEXT for prompt, _ in jobs):
            requests = await asyncio.to_thread(self._prepare, jobs)
        else:
            requests = self._prepare(jobs)
        stream = Stream(requests, lambda request_id: self._inbox.put(_Abort(request_id)))
        with self._gate:
            self._refuse_if_unavailable(len(requests))
            for request in requests:
                self._streams[request.id] = stream
                self._inbox.put(_Add(request))
        return stream

    async def shutdown(self, drain_seconds: float = 0.0, hurry: Callable[[], bool] = lambda: False) -> None:
        """Refuses new requests, lets running ones end for up to `drain_seconds` or until `hurry()`, fails the rest.

        Returns when the thread has ended. May be called again.
        """
        with self._gate:
            self._stopping = True
        deadline = time.monotonic() + drain_seconds
        while self._streams and time.monotonic() < deadline and not hurry():
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        self._inbox.put(_Stop("The server is shutting down."))
        await asyncio.to_thread(self._thread.join)

    def _prepare(self, jobs: Sequence[tuple[Prompt, SamplingParams]]) -> list[Request]:
        return [self.engine.prepare(prompt, params) for prompt, params in jobs]

    def _refuse_if_unavailable(self, count: int) -> None:
        if self.engine.failure is not None:
            raise UnavailableError(f"The engine has failed and must be restarted: {self.engine.failure}")
        if self._stopping:
            raise UnavailableError("The server is shutting down.")
        if len(self._streams) + count > self.max_waiting + self.engine.serving.max_requests:
            raise UnavailableError(f"The queue is full: {len(self._streams)} requests are waiting or running.")

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
                case _Abort(request_id):
                    self._streams.pop(request_id, None)
                    self.engine.abort(request_id)
                case _Stop(text):
                    self._deliver(self.engine.abort_all(text))
                    return False

    def _refuse(self, requests: Sequence[Request], message: str) -> None:
        self._deliver([Output(r.id, "", (), (), r.prompt_tokens, 0, "error", message) for r in requests])

    def _deliver(self, outputs: list[Output]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Output]]] = {}
        for output in outputs:
            ended = output.finish_reason is not None
            stream = self._streams.pop(output.request_id, None) if ended else self._streams.get(output.request_id)
            if stream is not None:
                by_loop.setdefault(stream.loop, []).append((stream, output))
        for loop, pairs in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
                loop.call_soon_threadsafe(_put_all, pairs)


def _put_all(pairs: list[tuple[Stream, Output]]) -> None:
    for stream, output in pairs:
        stream.put(output)
