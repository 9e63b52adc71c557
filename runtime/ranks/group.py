"""`Ranks`: one rank's view of its run: where it is, the run's store, its groups, and the agreement on each step.

Contract:
    Nothing here waits without a bound: `agree` returns what every rank reported, or raises `RankError` as soon as the
    watchdog has found whom it waits for. Reports travel by a gloo group of their own, whatever the model runs on: what
    becomes of the model's groups, NCCL on GPUs, does not touch them.
"""

from __future__ import annotations

import math
import os
import platform
import queue
import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    ProcessGroupGloo,
    ReduceOp,
    Store,
    TCPStore,
    Work,
)

from atomc.errors import AtomcError
from atomc.ops.batch import Batch
from atomc.parallel.layout import Layout
from atomc.runtime.batch import pack_batch, shapes_of, unpack_batch
from atomc.runtime.collectives import Groups
from atomc.runtime.errors import ServingError
from atomc.runtime.protocols import Serving
from atomc.runtime.ranks.beats import AGREE, FRONT, JOINING, LOADING, Bounds
from atomc.runtime.ranks.decide import Report
from atomc.runtime.ranks.watchdog import Watchdog

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
    """Connections to the store of one run: for beats and looks, for accusations, for what a main thread may wait for.

    `hosted`: a launcher hosts it.
    """

    beats: Store
    faults: Store
    main: Store
    port: int
    hosted: bool

    @classmethod
    def open(
        cls,
        host: str,
        port: int,
        attempt: str,
        bounds: Bounds,
        *,
        host_it: bool = False,
        hosted: bool = False,
        awaited: bool = False,
    ) -> Stores:
        """Connects, or hosts the store itself, at this address alone; port 0 takes a free one.

        `awaited`: who hosts it may begin later than this process. Else it is there, or it is lost.

        Raises:
            ServingError: nobody answers there, or the port is taken.
        """
        wait, listener = timedelta(milliseconds=bounds.join_ms if awaited else bounds.silent_ms), None
        try:
            if host_it:
                bound = socket.create_server((host, port))
                port, listener = bound.getsockname()[1], bound.detach()
            base, *more = _within(
                wait,
                lambda: _connections(
                    TCPStore(host, port, None, host_it, wait, wait_for_workers=False, master_listen_fd=listener)
                ),
            )
            base.set_timeout(timedelta(milliseconds=bounds.join_ms))
            each = [PrefixStore(f"atomc/{attempt}", store) for store in more]
        except (RuntimeError, OSError) as error:
            verb = "be opened at" if host_it else "be reached at"
            raise ServingError(f"The store of the run cannot {verb} {host}:{port}: {_first(error)}.") from error
        return cls(each[0], each[1], PrefixStore(f"atomc/{attempt}", base), port, hosted)


def _connections(base: TCPStore) -> list[TCPStore]:
    return [base, base.clone(), base.clone()]  # type: ignore[attr-defined]


def _within(wait: timedelta, connect: Callable[[], list[TCPStore]]) -> list[TCPStore]:
    """The stores, or `TimeoutError`: a host that takes the connection and says nothing has no bound of torch's."""
    found: queue.SimpleQueue[list[TCPStore] | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            found.put(connect())
        except Exception as error:  # noqa: BLE001  raised below
            found.put(error)

    threading.Thread(target=work, name="atomc-store", daemon=True).start()
    try:
        stores = found.get(timeout=wait.total_seconds())
    except queue.Empty:
        raise TimeoutError(f"no answer within {wait.total_seconds():.0f} s") from None
    if isinstance(stores, Exception):
        raise stores
    return stores


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def machine() -> str:
    """What a process id means something on: this boot of this kernel, and the namespace of its ids."""
    parts = [platform.node()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


class Ranks:
    """A rank and its peers (`protocols.Peers`). `begin`, `join`, then `agree` before every step, `close` at the end.

    `layout`: how all of them share one model; without it each has the whole. Each `tp` neighbours run the same batch:
    that of the first of them, the leader.
    """

    def __init__(
        self, place: Place, stores: Stores, bounds: Bounds, *, layout: Layout | None = None, end_process: bool = True
    ) -> None:
        if layout is not None and layout.ranks != place.size:
            raise ServingError(f"{layout} is for {layout.ranks} ranks, and {place.size} are started.")
        self.place, self.layout = place, layout
        self.rank, self.size, self.tp = place.rank, place.size, 1 if layout is None else layout.tp
        self._stores, self._bounds = stores, bounds
        self.watchdog = Watchdog(
            place.rank, place.size, stores.beats, stores.faults, bounds, hosted=stores.hosted, end_process=end_process
        )
        self._mine = torch.zeros(len(Report._fields), dtype=torch.int64)
        self._all = [torch.zeros_like(self._mine) for _ in range(place.size)]
        self._gloo: Any = None
        self._batches: Any = None
        self._groups: Groups | None = None

    def begin(self) -> None:
        """Begin to beat, and to be watched: before anything that takes time."""
        self.watchdog.start()

    def join(self, *, same: str, device: torch.device | None = None) -> None:
        """Form the process groups. `same`: what all ranks must have in common, or it would not be one run.

        The model's collectives, where there are some, are on `device`, a GPU (by NCCL), or the CPU.

        Raises:
            RankError: a rank was lost, or has something else.
        """
        self.watchdog.announce(0, JOINING)
        first = self._stores.main.compare_set("same", "", same).decode()
        if first != same:
            self.watchdog.accuse([self.rank], f"it has {same}, the others have {first}")
        self.watchdog.check()
        try:
            self._gloo = self._private("agree", self.rank, self.size)
            if self.tp > 1:
                self._batches = self._private(f"batches/{self.rank // self.tp}", self.rank % self.tp, self.tp)
            if self.layout is not None:
                self._groups = self._form_groups(self.layout, device)
        except Exception as error:  # noqa: BLE001  whatever it is, a peer that is lost may be its cause
            self._lost(error)
        self.watchdog.announce(0, LOADING)

    def _private(self, name: str, rank: int, size: int) -> Any:
        """A gloo group that nobody else knows; torch's own types know few of its methods."""
        store = PrefixStore(f"groups/{name}", self._stores.main)
        group = ProcessGroupGloo(store, rank, size, timedelta(milliseconds=self._bounds.join_ms))
        group._set_default_timeout(_FOREVER)
        return group

    def _form_groups(self, layout: Layout, device: torch.device | None) -> Groups:
        """The groups of the model. Until all have loaded, one may wait for another as long as that may take."""
        bounds = self._bounds
        # A rank that is lost is the watchdog's business: NCCL's own would end the process and say nothing of it.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        wait = timedelta(milliseconds=2 * max(bounds.join_ms, bounds.load_ms, bounds.first_ms, bounds.late_ms))
        dist.init_process_group(
            "gloo" if device is None else "cpu:gloo,cuda:nccl", store=PrefixStore("groups/model", self._stores.main),
            rank=self.rank, world_size=self.size, timeout=wait, device_id=device,
        )  # fmt: skip
        return Groups(layout.mesh, announce=self.watchdog.place, timeout=wait)

    # -- for an executor: see `Peers` ----------------------------------------------------------------------------------

    @property
    def groups(self) -> Groups:
        """There are some once ranks of a layout have joined."""
        assert self._groups is not None, "these ranks share no model, or have not joined"
        return self._groups

    def least(self, value: int) -> int:
        """Raises `RankError` when a rank is lost meanwhile."""
        found = torch.tensor([value], dtype=torch.int64)
        self._finish(lambda group: group.allreduce([found], op=ReduceOp.MIN))
        return int(found)

    # -- for its loop --------------------------------------------------------------------------------------------------

    def agree(self, report: Report) -> list[Report]:
        """Every rank's report of this step, in order of ranks.

        Raises:
            RankError: a rank was lost, or reports another step.
        """
        self.watchdog.announce(report.step, AGREE)
        self._mine.copy_(torch.tensor(report))
        self._finish(lambda group: group.allgather([self._all], [self._mine]))
        reports = [Report(*each.tolist()) for each in self._all]
        for rank, other in enumerate(reports):
            if other.step != reports[0].step:
                self.watchdog.accuse([rank], f"it is at step {other.step}, rank 0 at step {reports[0].step}")
        self.watchdog.check()
        return reports

    def share(self, batch: Batch | None, leader: Report, serving: Serving) -> Batch:
        """The leader's batch, on all ranks of its tp group; `leader`: its report. Raises `RankError`."""
        shapes = shapes_of(serving, *leader[2:])
        packed = torch.empty(sum(map(math.prod, shapes)), dtype=torch.int32) if batch is None else pack_batch(batch)
        self._finish(lambda group: group.broadcast(packed, 0), self._batches)
        return batch or unpack_batch(packed, shapes)

    def _finish(self, start: Callable[[Any], Work], group: Any = None) -> None:
        """A collective of ours: to its end, or to the first fault."""
        self.watchdog.check()
        try:
            work = start(group or self._gloo)
            while not self._over(work):
                self.watchdog.check()
        except (RuntimeError, OSError) as error:
            self._lost(error)
        self.watchdog.check()

    @staticmethod
    def _over(work: Work) -> bool:
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
        why = "a connection between it and another rank failed, and which of them closed it is not known"
        self.watchdog.accuse([self.rank], f"{why} ({_first(error)})")
        self.watchdog.check()

    def failed(self, error: Exception) -> None:
        """Raises `RankError`: this rank cannot go on, and the others depend on it. A lost rank may be the cause."""
        self.watchdog.check()
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            self._lost(error)
        kind = ""
        if not isinstance(error, AtomcError):
            kind = f"{type(error).__name__}: "
            traceback.print_exception(error)
        self.watchdog.accuse([self.rank], f"{kind}{str(error).rstrip('.')}")
        self.watchdog.check()

    def front_address(self) -> tuple[str, int, str] | None:
        """Host, port and key of the front end; None until it has told them."""
        if not self._stores.main.check(["front"]):
            return None
        host, port, key = self._stores.main.get("front").decode().split()
        return host, int(port), key

    def front_is_gone(self, error: Exception) -> None:
        """The line to the front end is cut; raises `RankError`."""
        self.watchdog.wait(5 * self._bounds.interval)  # a fault it may have told in the store before
        self.watchdog.accuse([FRONT], f"its connection was closed ({_first(error)})")
        self.watchdog.check()

    def close(self) -> None:
        """The end in good order, on all ranks after the same step."""
        self.watchdog.stop()
