"""`serve`: an executor behind HTTP, until a signal; then running answers end, or their clients get an error."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from types import FrameType

import uvicorn

from atomc.runtime.async_engine import AsyncEngine
from atomc.runtime.engine import Engine
from atomc.runtime.errors import AddressError
from atomc.runtime.frontend import Frontend
from atomc.runtime.protocols import Executor
from atomc.runtime.server.app import create_app


def listen(host: str, port: int) -> socket.socket:
    """A socket bound before anything is loaded, so that what is wrong with the address is said at once.

    Raises:
        AddressError: it is in use, or no address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise AddressError(
            f"cannot listen on {host} port {port}: {_reason(error)}. Choose another --host or --port."
        ) from error


def _reason(error: OSError) -> str:
    """Without the address that Python adds; getaddrinfo has numbers of its own."""
    found = error.strerror if isinstance(error, socket.gaierror) or error.errno is None else os.strerror(error.errno)
    return found or str(error)


class Server(uvicorn.Server):
    """uvicorn, with our shutdown before its own: while answers end, new requests are refused with 503."""

    def __init__(self, config: uvicorn.Config, engine: Frontend, drain_seconds: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._hurried = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal of any kind ends the wait for running answers."""
        self._hurried = self.should_exit
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._engine.shutdown(self._drain_seconds, hurry=lambda: self._hurried)
        await super().shutdown(sockets)


def make_server(
    engine: Frontend,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    names: Sequence[str] = (),
    drain_seconds: float = 30.0,
    log_level: str = "info",
) -> Server:
    """A server that is not running yet; `await server.serve()` runs it and shuts the engine down at its end."""
    config = uvicorn.Config(
        create_app(engine, names=names),
        host=host,
        port=port,
        log_level=log_level,
        # By then every stream has got its last event; what is left are clients that do not read.
        timeout_graceful_shutdown=5,
    )
    return Server(config, engine, drain_seconds)


def serve(
    executor: Executor,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    names: Sequence[str] = (),
    drain_seconds: float = 30.0,
    max_waiting: int = 1024,
    log_level: str = "info",
) -> None:
    """Serves until SIGINT or SIGTERM. Raises `ServingError` when the caches cannot hold even one request."""
    engine = AsyncEngine(Engine(executor), max_waiting=max_waiting)
    server = make_server(engine, host=host, port=port, names=names, drain_seconds=drain_seconds, log_level=log_level)
    asyncio.run(server.serve())
