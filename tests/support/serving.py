"""A real HTTP server on the loopback, in a thread, over a fake executor."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai

from atomc.runtime.async_engine import AsyncEngine
from atomc.runtime.engine import Engine
from atomc.runtime.server.run import Server, make_server
from tests.support.fake_executor import FakeExecutor, FakeServing

SERVING = FakeServing(model_name="deepseek-v4-fake", max_context=2048, max_batch_tokens=64)


class Running:
    """A server that runs, and clients for it."""

    def __init__(self, engine: AsyncEngine, server: Server, url: str) -> None:
        self.engine, self.server, self.url = engine, server, url
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
        self.http = httpx.Client(base_url=url, timeout=30)

    def wait_until_idle(self, seconds: float = 10) -> None:
        """Every request is gone and every pool is whole."""
        deadline = time.monotonic() + seconds
        while self.engine.active or self.engine.engine.has_work:
            assert time.monotonic() < deadline, f"{self.engine.active} requests were not freed"
            time.sleep(0.01)
        self.engine.engine.caches.check_idle()


@contextmanager
def serving(
    tokenizer_path: Path,
    *,
    script: Callable[[list[int]], int | None] = lambda tokens: None,
    before_step: Callable[[int], None] = lambda step: None,
    facts: FakeServing = SERVING,
    drain_seconds: float = 0.0,
    max_waiting: int = 100,
) -> Iterator[Running]:
    """Starts a server and shuts it down at the end; fails if either takes more than ten seconds."""
    executor = FakeExecutor(
        facts, num_blocks=1000, tokenizer_path=tokenizer_path, script=script, before_step=before_step
    )
    engine = AsyncEngine(Engine(executor), max_waiting=max_waiting)
    server = make_server(engine, port=0, drain_seconds=drain_seconds, log_level="warning")
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    running = Running(engine, server, f"http://127.0.0.1:{port}")
    try:
        yield running
    finally:
        running.http.close()
        running.openai.close()
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive(), "the server did not stop"
