"""`RankedServer`: the front end of a run behind HTTP; `run_rank`: one rank of it, from its start to its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Protocol

import torch

from atomc.artifact.store import artifact_hash, read_manifest
from atomc.runtime.capacity import DEFAULT_SHARE, free_memory, open_executor
from atomc.runtime.engine import Engine
from atomc.runtime.errors import RankError, ServingError
from atomc.runtime.options import RunOptions
from atomc.runtime.protocols import Executor
from atomc.runtime.ranks.beats import Bounds
from atomc.runtime.ranks.front import RankedFront
from atomc.runtime.ranks.group import Place, Ranks, Stores, machine
from atomc.runtime.ranks.layout import check_layout, layout_of
from atomc.runtime.ranks.lines import Lines
from atomc.runtime.ranks.lockstep import Lockstep
from atomc.runtime.ranks.wire import Channel, Ready
from atomc.runtime.server.run import Server, make_server


def bounds_of(options: RunOptions) -> Bounds:
    """How long anybody may take."""
    return Bounds(options.join_ms, options.load_ms, options.silent_ms, options.first_ms, options.late_ms)


class RankedServer:
    """A front end that gathers its ranks, then serves. `front` can be told of lost processes from the start.

    `key`: what the ranks were handed to prove themselves; None: they find it in the store.
    """

    def __init__(
        self,
        artifact: Path,
        size: int,
        host: str,
        stores: Stores,
        options: RunOptions,
        *,
        key: str | None = None,
        max_waiting: int = 1024,
    ) -> None:
        self._server: Server | None = None
        self._ended = False
        manifest, layout = read_manifest(artifact), layout_of(options.parallel)
        check_layout(artifact, options.parallel, size, manifest.target)
        tp = 1 if layout is None else layout.tp
        self.front = RankedFront(
            manifest.serving, artifact / "tokenizer.json", size, stores, bounds_of(options), tp=tp,
            max_waiting=max_waiting, on_end=self._end,
        )  # fmt: skip
        self._lines = Lines(host, size, key)
        self._lines.open(stores)
        self.front.watchdog.start()

    def _end(self) -> None:
        self._ended = True
        if self._server is not None:
            self._server.should_exit = True

    def lost(self, rank: int, why: str) -> None:
        """The process of a rank has ended; any thread may say so."""
        self.front.watchdog.accuse([rank], why)

    def gather(self) -> None:
        """Wait for all ranks. Raises `RankError` when one is lost before it is there."""
        self.front.gather(self._lines)

    def serve(
        self,
        listener: socket.socket,
        *,
        names: Sequence[str] = (),
        drain_seconds: float = 20.0,
        log_level: str = "info",
    ) -> None:
        """Serve until a signal. Raises `RankError` when a rank was lost: all clients have their errors then."""
        self._server = make_server(self.front, names=names, drain_seconds=drain_seconds, log_level=log_level)
        self._server.should_exit = self._ended
        try:
            asyncio.run(self._server.serve(sockets=[listener]))
        finally:
            if self.front.error is not None:
                raise self.front.error


class Source(Protocol):
    """What a rank runs: asked in this order, the last once the ranks have met."""

    def same(self) -> str:
        """What all ranks must have in common."""
        ...

    def device(self, place: Place) -> torch.device | None:
        """This rank's GPU, which is the current one from now on; None on the CPU."""
        ...

    def load(self, ranks: Ranks) -> tuple[Executor, str]:
        """The executor, and a line about its capacity."""
        ...


class ArtifactSource:
    """An artifact, in the layout that the options say, for runs of `size` ranks.

    Raises:
        LayoutError, NoLayoutError, ServingError: see `check_layout`.
    """

    def __init__(self, artifact: Path, options: RunOptions, size: int) -> None:
        check_layout(artifact, options.parallel, size)
        self.artifact, self.options = artifact, options

    def same(self) -> str:
        layout = layout_of(self.options.parallel)
        return f"artifact {artifact_hash(self.artifact)}{'' if layout is None else f', --parallel {layout}'}"

    def device(self, place: Place) -> torch.device | None:
        """Raises `ServingError` when there are fewer GPUs than ranks."""
        if not read_manifest(self.artifact).arch:
            return None
        if place.local_rank >= torch.cuda.device_count():
            raise ServingError(
                f"Rank {place.rank} is number {place.local_rank} on its machine, which has "
                f"{torch.cuda.device_count()} GPUs. Start as many ranks as there are GPUs."
            )
        torch.cuda.set_device(place.local_rank)
        return torch.device("cuda", place.local_rank)

    def load(self, ranks: Ranks) -> tuple[Executor, str]:
        options, memory = self.options, self.options.memory_bytes
        if memory is None and not read_manifest(self.artifact).arch:  # the ranks of one machine share its memory
            memory = int(free_memory() * DEFAULT_SHARE / ranks.place.local_size)
        executor, capacity = open_executor(
            self.artifact, max_requests=options.max_requests, memory_bytes=memory, num_blocks=options.num_blocks,
            num_window_pages=options.num_window_pages, peers=ranks,
        )  # fmt: skip
        return executor, str(capacity)


def run_rank(
    source: Source, place: Place, options: RunOptions, key: str | None = None, alive: Callable[[], None] = lambda: None
) -> None:
    """Join the others, load, and step with them until the front end says stop.

    `key`: of a run whose front end has started its ranks. `alive` is called while waiting for the front end, and may
    raise.

    Raises:
        RankError: a rank or the front end was lost; this one, whatever went wrong here.
        ServingError: there is no such run.
    """
    bounds, layout = bounds_of(options), layout_of(options.parallel)
    awaited = key is None and not place.hosted
    stores = Stores.open(place.host, place.port, place.attempt, bounds, hosted=place.hosted, awaited=awaited)
    ranks = Ranks(place, stores, bounds, layout=layout)
    ranks.begin()
    try:
        ranks.join(same=source.same(), device=source.device(place))
        executor, capacity = source.load(ranks)
        engine = Engine(executor)
        channel = _call(ranks, alive, bounds, key)
        limits = engine.caches.token_capacity, engine.scheduler.max_running
        channel.send(Ready(place.rank, os.getpid(), machine(), *limits, capacity))
        loop = Lockstep(engine, ranks, channel)
        _leave_on_signal(loop)
        loop.run()
    except RankError:
        raise
    except Exception as error:  # whatever it is, the others must not wait for this rank
        ranks.failed(error)
        raise
    ranks.close()


def _call(ranks: Ranks, alive: Callable[[], None], bounds: Bounds, key: str | None) -> Channel:
    """The line to the front end, once it has told where it is."""
    until = time.monotonic() + bounds.join_ms / 1000
    while (address := ranks.front_address()) is None:
        ranks.watchdog.check()
        alive()
        if time.monotonic() > until:
            raise ServingError(f"There is no front end after {bounds.join_ms:,} ms.")
        time.sleep(bounds.interval)
    host, port, told = address
    try:
        return Channel.connect(host, port, (key or told).encode())
    except (OSError, EOFError, AuthenticationError) as error:
        ranks.front_is_gone(error)
        raise


def _leave_on_signal(loop: Lockstep) -> None:
    """The first signal asks the whole run to end in good order; the second ends this process."""

    def leave(number: int, _frame: object) -> None:
        loop.leave = True
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
