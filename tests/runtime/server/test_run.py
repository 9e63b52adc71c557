"""How a server ends: the first signal lets answers end, the second of any kind does not."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import pytest
import uvicorn

from atomc.runtime.server.run import Server


class Hurries:
    """In a front end's place: whether it was told to hurry."""

    def __init__(self) -> None:
        self.told: list[bool] = []

    async def shutdown(self, drain_seconds: float, hurry: Callable[[], bool]) -> None:
        self.told.append(hurry())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_hurries(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    async def nothing(self: uvicorn.Server, sockets: object = None) -> None:
        pass

    monkeypatch.setattr(uvicorn.Server, "shutdown", nothing)
    front = Hurries()
    server = Server(uvicorn.Config(app="none:app"), front, 30.0)  # type: ignore[arg-type]
    for _ in range(2):
        server.handle_exit(number, None)
        assert server.should_exit
        asyncio.run(server.shutdown())
    assert front.told == [False, True]
