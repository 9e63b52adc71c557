"""The engine's thread: streams get their last output whatever happens, and what is cancelled is freed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from atomc.runtime.async_engine import AsyncEngine
from atomc.runtime.detokenize import Vocabulary
from atomc.runtime.engine import Engine
from atomc.runtime.errors import RequestError, UnavailableError
from atomc.runtime.frontend import Stream
from atomc.runtime.request import Output, SamplingParams
from tests.support.fake_executor import FakeExecutor, FakeServing

PARAMS = SamplingParams(seed=1, max_tokens=10, ignore_eos=True)
ENDLESS = SamplingParams(seed=1, ignore_eos=True)


@asynccontextmanager
async def running(
    vocabulary: Vocabulary, before_step: Callable[[int], None] = lambda step: None, *, max_waiting: int = 100
) -> AsyncIterator[AsyncEngine]:
    executor = FakeExecutor(FakeServing(max_context=4096), num_blocks=2000, before_step=before_step)
    engine = AsyncEngine(Engine(executor, vocabulary=vocabulary), max_waiting=max_waiting)
    try:
        yield engine
    finally:
        await engine.shutdown()


async def read(stream: Stream) -> list[tuple[int, Output]]:
    return [pair async for pair in stream]


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.005)


def slowly(step: int) -> None:
    time.sleep(0.005)


def test_several_jobs_in_one_stream(vocabulary: Vocabulary) -> None:
    async def scenario() -> None:
        async with running(vocabulary) as engine:
            pairs = await read(await engine.submit([([5, 6], PARAMS), ("hello" * 1000, PARAMS)]))
            for index in (0, 1):
                mine = [output for which, output in pairs if which == index]
                assert [output.completion_tokens for output in mine] == list(range(1, 11))
                assert mine[-1].finish_reason == "length"
            assert engine.active == 0

    asyncio.run(scenario())


def test_all_jobs_or_none(vocabulary: Vocabulary) -> None:
    async def scenario() -> None:
        async with running(vocabulary) as engine:
            with pytest.raises(RequestError):
                await engine.submit([([5], PARAMS), ([], PARAMS)])
            assert engine.active == 0

    asyncio.run(scenario())


def test_a_cancelled_stream_frees_its_requests(vocabulary: Vocabulary) -> None:
    async def scenario() -> None:
        async with running(vocabulary, slowly) as engine:
            stream = await engine.submit([([5], ENDLESS), ([6], ENDLESS)])
            await anext(stream)
            stream.cancel(0)
            assert {index for index, _ in [await anext(stream) for _ in range(5)]} == {1}
            await until(lambda: engine.engine.caches.slots.used == 1)
            stream.cancel()
            await until(lambda: engine.active == 0 and not engine.engine.has_work)
            engine.engine.caches.check_idle()
            assert await read(stream) == []

    asyncio.run(scenario())


def test_an_engine_failure_reaches_every_stream_and_later_ones_are_refused(vocabulary: Vocabulary) -> None:
    def explode(step: int) -> None:
        slowly(step)
        if step == 5:
            raise RuntimeError("gone")

    async def scenario() -> None:
        async with running(vocabulary, explode) as engine:
            streams = [await engine.submit([([5], ENDLESS)]) for _ in range(7)]
            ends = await asyncio.wait_for(asyncio.gather(*map(read, streams)), 10)
            assert {pairs[-1][1].finish_reason for pairs in ends} == {"error"}
            assert engine.status == "failed"
            with pytest.raises(UnavailableError, match="gone"):
                await engine.submit([([5], PARAMS)])

    asyncio.run(scenario())


def test_a_defect_outside_a_step_leaves_nobody_waiting(vocabulary: Vocabulary) -> None:
    async def scenario() -> None:
        async with running(vocabulary, slowly) as engine:
            streams = [await engine.submit([([5], ENDLESS)]) for _ in range(3)]
            await anext(streams[0])
            engine.engine.abort = None  # type: ignore[assignment,method-assign]
            streams[0].cancel()
            ends = await asyncio.wait_for(asyncio.gather(*map(read, streams[1:])), 10)
            assert {pairs[-1][1].finish_reason for pairs in ends} == {"error"}
            assert engine.status == "failed"

    asyncio.run(scenario())


def test_a_full_queue_refuses(vocabulary: Vocabulary) -> None:
    async def scenario() -> None:
        async with running(vocabulary, slowly, max_waiting=2) as engine:
            streams = [await engine.submit([([5], ENDLESS)]) for _ in range(6)]
            with pytest.raises(UnavailableError, match="full"):
                await engine.submit([([5], PARAMS)])
            for stream in streams:
                stream.cancel()

    asyncio.run(scenario())


def test_shutdown_waits_for_answers(vocabulary: Vocabulary) -> None:
    async def scenario() -> None:
        async with running(vocabulary, slowly) as engine:
            stream = await engine.submit([([5], PARAMS)])
            closing = asyncio.create_task(engine.shutdown(drain_seconds=30))
            await asyncio.sleep(0)
            assert engine.status == "stopping"
            with pytest.raises(UnavailableError, match="shutting down"):
                await engine.submit([([5], PARAMS)])
            pairs = await read(stream)
            assert pairs[-1][1].finish_reason == "length"
            await asyncio.wait_for(closing, 10)

    asyncio.run(scenario())


def test_shutdown_gives_the_rest_an_error(vocabulary: Vocabulary) -> None:
    async def scenario() -> None:
        async with running(vocabulary, slowly) as engine:
            streams = [await engine.submit([([5], ENDLESS)]) for _ in range(6)]
            await engine.shutdown(drain_seconds=0.1)
            ends = await asyncio.wait_for(asyncio.gather(*map(read, streams)), 10)
            assert {pairs[-1][1].error for pairs in ends} == {"The server is shutting down."}
            assert not any(thread.name == "atomc-engine" and thread.is_alive() for thread in threading.enumerate())
            engine.engine.caches.check_idle()

    asyncio.run(scenario())


def test_a_hurried_shutdown_does_not_wait(vocabulary: Vocabulary) -> None:
    async def scenario() -> None:
        async with running(vocabulary, slowly) as engine:
            stream = await engine.submit([([5], ENDLESS)])
            await asyncio.wait_for(engine.shutdown(drain_seconds=1000, hurry=lambda: True), 10)
            assert (await read(stream))[-1][1].finish_reason == "error"

    asyncio.run(scenario())


def test_a_stream_whose_loop_is_gone_does_not_stop_the_engine(vocabulary: Vocabulary) -> None:
    executor = FakeExecutor(FakeServing(), before_step=slowly)
    engine = AsyncEngine(Engine(executor, vocabulary=vocabulary))

    async def leave() -> None:
        await engine.submit([([5], SamplingParams(max_tokens=50, ignore_eos=True))])

    async def scenario() -> None:
        assert (await read(await engine.submit([([5], PARAMS)])))[-1][1].finish_reason == "length"
        await engine.shutdown(drain_seconds=10)

    asyncio.run(leave())
    asyncio.run(scenario())
    assert engine.status == "stopping"
