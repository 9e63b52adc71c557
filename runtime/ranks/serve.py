"""`serve_ranks`: the front end of a run behind HTTP; `run_rank`: one rank of it, from loading to the end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from atomc.artifact.store import artifact_hash, read_manifest
from atomc.errors import AtomcError
from atomc.runtime.capacity import DEFAULT_SHARE, Capacity, free_memory, open_executor
from atomc.runtime.engine import Engine
from atomc.runtime.errors import RankError, ServingError
from atomc.runtime.executor import Executor
from atomc.runtime.ranks.decide import HoldPolicy
from atomc.runtime.ranks.front import Lines, RankedFront
from atomc.runtime.ranks.group import Place, Ranks, Stores, machine
from atomc.runtime.ranks.lockstep import Lockstep
from atomc.runtime.ranks.watchdog import Bounds
from atomc.runtime.ranks.wire import Channel, Ready
from atomc.runtime.server.run import Server, make_server


@dataclass(frozen=True)
class CacheSizes:
    """Of each rank; as `open_executor` takes them."""

    max_requests: int | None = None
    memory_bytes: int | None = None
    num_blocks: int | None = None
    num_window_pages: int | None = None


class RankedServer:
    """A front end that gathers its ranks, then serves. `front` can be told of lost processes from the start."""

    def __init__(
        self, artifact: Path, size: int, host: str, stores: Stores, bounds: Bounds, *, max_waiting: int = 1024
    ) -> None:
        self._server: Server | None = None
        self._ended = False
        serving = read_manifest(artifact).serving
        self.front = RankedFront(
            serving, artifact / "tokenizer.json", size, stores, bounds, max_waiting=max_waiting, on_end=self._end
        )
        self._lines = Lines(host, size)
        self._lines.tell(stores)
        self.front.watchdog.start()

    def _end(self) -> None:
        self._ended = True
        if self._server is not None:
            self._server.should_exit = True

    def lost(self, rank: int, why: str) -> None:
        """The process of a rank has ended; any thread may say so."""
        self.front.watchdog.accuse(rank, why, self.front.watchdog.latest(rank))

    def gather(self) -> None:
        """Wait for all ranks. Raises `RankError` when one is lost before it is there."""
        self.front.gather(self._lines)

    def serve(
        self,
        listener: socket.socket,
        *,
        names: Sequence[str] = (),
        drain_seconds: float = 30.0,
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


def run_rank(
    artifact: Path,
    place: Place,
    bounds: Bounds,
    caches: CacheSizes,
    *,
    hold_ms: int = 0,
    alive: Callable[[], None] = lambda: None,
) -> None:
    """Load, join the others, and step with them until the front end says stop.

    `alive` is called while waiting for the front end, and may raise.

    Raises:
        AtomcError: the artifact cannot be run here. RankError: a rank or the front end was lost.
    """
    ranks = Ranks(place, Stores.open(place.host, place.port, place.attempt, bounds), bounds)
    ranks.begin()
    try:
        executor, capacity = _load(artifact, place, caches)
    except AtomcError as error:
        ranks.watchdog.accuse(place.rank, error.message.rstrip("."))
        raise
    same = f"artifact {artifact_hash(artifact)}, hold of {hold_ms} ms"
    ranks.join(on_gpu=executor.gpu is not None, same=same)
    engine = Engine(executor)
    channel = _call(ranks, alive, bounds)
    channel.send(
        Ready(
            place.rank,
            os.getpid(),
            machine(),
            engine.caches.token_capacity,
            engine.scheduler.max_running,
            str(capacity),
        )
    )
    policy = HoldPolicy(bound_ms=hold_ms, max_batch_tokens=executor.serving.max_batch_tokens)
    loop = Lockstep(engine, ranks, channel, policy)
    _leave_on_signal(loop)
    loop.run()
    ranks.close()


def _load(artifact: Path, place: Place, caches: CacheSizes) -> tuple[Executor, Capacity]:
    """Ranks of one machine share its memory, unless each has a device."""
    memory = caches.memory_bytes
    if read_manifest(artifact).arch:
        if place.local_rank >= torch.cuda.device_count():
            raise ServingError(
                f"Rank {place.rank} is number {place.local_rank} on its machine, which has {torch.cuda.device_count()} "
                "GPUs. Start as many ranks as there are GPUs."
            )
        torch.cuda.set_device(place.local_rank)
    elif memory is None:
        memory = int(free_memory() * DEFAULT_SHARE / place.local_size)
    return open_executor(
        artifact, max_requests=caches.max_requests, memory_bytes=memory, num_blocks=caches.num_blocks,
        num_window_pages=caches.num_window_pages,
    )  # fmt: skip


def _call(ranks: Ranks, alive: Callable[[], None], bounds: Bounds) -> Channel:
    """The line to the front end, once it has told where it is."""
    until = time.monotonic() + bounds.join_ms / 1000
    while (address := ranks.front_address()) is None:
        ranks.watchdog.check()
        alive()
        if time.monotonic() > until:
            raise ServingError(f"There is no front end after {bounds.join_ms:,} ms.")
        time.sleep(bounds.interval)
    try:
        return Channel.connect(*address)
    except (OSError, EOFError) as error:
        ranks.front_is_gone(error)
        raise


def _leave_on_signal(loop: Lockstep) -> None:
    """The first signal asks the whole run to end in good order; the second ends this process."""

    def leave(number: int, _frame: object) -> None:
        loop.leave = True
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


def end_rank(error: AtomcError | None) -> None:
    """End this process at once: threads of a broken process group would wait for ever at a normal exit."""
    os._exit(0 if error is None else RankError.exit_code)
