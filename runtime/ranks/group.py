"""`Ranks`: one rank's view of its run: where it is, the run's store, and the agreement on each step.

Contract:
    Nothing here waits without a bound: `agree` returns what every rank reported, or raises `RankError` as soon as the
    watchdog has found whom it waits for. Reports travel by gloo on the CPU, whatever the model runs on; a model on GPUs
    has NCCL beside it in the same process group.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from atomc.runtime.errors import RankError, ServingError
from atomc.runtime.ranks.decide import Report
from atomc.runtime.ranks.watchdog import AGREE, FRONT, Bounds, Watchdog

_POLL: Final = timedelta(milliseconds=50)
# Collectives are bounded by the watchdog, which knows whom they wait for; gloo itself only knows that it waits.
_FOREVER: Final = timedelta(days=1)


@dataclass(frozen=True)
class Place:
    """Where a process is in its run, as torchrun says it in the environment.

    `hosted`: the launcher hosts the store; else the front end does, at `port`.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    attempt: str
    hosted: bool

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """Raises `ServingError` naming the variable that is missing or wrong."""
        rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        if size < 1 or rank >= size:
            raise ServingError(f"RANK is {rank} and WORLD_SIZE {size}; ranks are 0 to WORLD_SIZE - 1.")
        if "MASTER_ADDR" not in environment:
            raise ServingError(_UNSET.format(name="MASTER_ADDR"))
        if not 0 < _number(environment, "MASTER_PORT") < 65536:
            raise ServingError(f"MASTER_PORT is {environment['MASTER_PORT']}; it must be a port, 1 to 65535.")
        return cls(
            rank, size, _number(environment, "LOCAL_RANK"), _number(environment, "LOCAL_WORLD_SIZE"),
            environment["MASTER_ADDR"], _number(environment, "MASTER_PORT"),
            environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
            environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )  # fmt: skip


_UNSET = "{name} is not set: start ranks with torchrun, or with `atomc serve --nproc`."


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None:
        raise ServingError(_UNSET.format(name=name))
    if not text.isdigit():
        raise ServingError(f"{name} is {text!r}; it must be a number.")
    return int(text)


@dataclass(frozen=True)
class Stores:
    """Connections to the store of one run: for a member's own words, for its looks at others, for process groups."""

    words: Store
    looks: Store
    groups: Store
    port: int

    @classmethod
    def open(cls, host: str, port: int, attempt: str, bounds: Bounds, *, host_it: bool = False) -> Stores:
        """Connects, or hosts the store itself; port 0 takes a free one.

        Raises:
            ServingError: nobody answers there, or the port is taken.
        """
        wait = timedelta(milliseconds=bounds.join_ms)
        try:
            base = TCPStore(host, port, None, host_it, wait, wait_for_workers=False)
            each = [PrefixStore(f"atomc/{attempt}", base.clone()) for _ in range(2)]  # type: ignore[attr-defined]
        except (RuntimeError, OSError) as error:
            verb = "be opened at" if host_it else "be reached at"
            raise ServingError(f"The store of the run cannot {verb} {host}:{port}: {_first(error)}.") from error
        return cls(PrefixStore(f"atomc/{attempt}", base), each[0], PrefixStore("groups", each[1]), base.port)


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def machine() -> str:
    """What a process id means something on: this boot of this kernel, and the namespace of its ids."""
    parts = [platform.node()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


class Ranks:
    """A rank and its peers. `join` first, `agree` before every step, `close` at the end."""

    def __init__(self, place: Place, stores: Stores, bounds: Bounds, *, end_process: bool = True) -> None:
        self.rank, self.size = place.rank, place.size
        self._stores, self._bounds = stores, bounds
        self.watchdog = Watchdog(
            place.rank, place.size, stores.words, stores.looks, bounds, on_fault=self._abort, end_process=end_process
        )
        self._mine = torch.zeros(len(Report._fields), dtype=torch.int64)
        self._all = [torch.zeros_like(self._mine) for _ in range(place.size)]
        self._on_gpu = False

    def begin(self) -> None:
        """Begin to beat, and to be watched: before anything that takes time."""
        self.watchdog.start()

    def join(self, *, on_gpu: bool, same: str) -> None:
        """Form the process group. `same`: what all ranks must have in common, or it would not be one run.

        Raises:
            RankError: a rank was lost, or has something else.
        """
        self._on_gpu = on_gpu
        self._agree_on(same)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        try:
            dist.init_process_group(
                backend, store=self._stores.groups, rank=self.rank, world_size=self.size, timeout=_FOREVER
            )
        except (RuntimeError, OSError) as error:
            self._lost(error)

    def _agree_on(self, same: str) -> None:
        """A rank that has something else than the first one to come is at fault."""
        first = self._stores.looks.compare_set("same", "", same).decode()
        if first != same:
            self.watchdog.accuse(self.rank, f"it has {same}, the others have {first}")
        self.watchdog.check()

    def agree(self, report: Report) -> list[Report]:
        """Every rank's report of this step, in order of ranks.

        Raises:
            RankError: a rank was lost, or reports another step.
        """
        self.watchdog.announce(report.step, AGREE)
        self._mine.copy_(torch.tensor(report))
        try:
            work = dist.all_gather(self._all, self._mine, async_op=True)
            assert work is not None
            while not self._over(work):
                self.watchdog.check()
        except (RuntimeError, OSError) as error:
            self._lost(error)
        self.watchdog.check()
        reports = [Report(*each.tolist()) for each in self._all]
        for rank, other in enumerate(reports):
            if other.step != reports[0].step:
                self.watchdog.accuse(rank, f"it is at step {other.step}, rank 0 at step {reports[0].step}")
        self.watchdog.check()
        return reports

    @staticmethod
    def _over(work: dist.Work) -> bool:
        """Whether it has ended; raises `RuntimeError` when it has failed. A wait that runs out leaves it as it is."""
        try:
            work.wait(_POLL)
        except RuntimeError:
            if not work.is_completed():
                return False
            work.wait(_POLL)  # it ended: well, between the two, or with an error that it raises again
        return True

    def _lost(self, error: Exception) -> None:
        """A collective has failed. Who is to blame shows at once if a process has died, else by its silence."""
        self.watchdog.wait((self._bounds.silent_ms + self._bounds.grace_ms) / 1000)
        self.watchdog.accuse(self.rank, f"its connection to the other ranks failed ({_first(error)})")
        self.watchdog.check()

    def front_address(self) -> tuple[str, int, bytes] | None:
        """Host, port and key of the front end; None until it has told them."""
        try:
            if not self._stores.looks.check(["front"]):
                return None
            host, port, key = self._stores.looks.get("front").decode().split()
        except (RuntimeError, OSError) as error:
            self.front_is_gone(error)
            raise
        return host, int(port), bytes.fromhex(key)

    def front_is_gone(self, error: Exception) -> None:
        """The line to the front end is cut; raises `RankError`."""
        self.watchdog.wait(2 * self._bounds.interval)  # a fault it may have told in the store before
        self.watchdog.accuse(FRONT, f"its connection was closed ({_first(error)})")
        self.watchdog.check()

    def _abort(self, error: RankError) -> None:
        """Free a GPU from a collective that will never end; gloo has no such call."""
        if self._on_gpu:
            threading.Thread(target=dist.distributed_c10d._abort_process_group, daemon=True).start()

    def close(self) -> None:
        """The end in good order, on all ranks after the same step."""
        self.watchdog.stop()
