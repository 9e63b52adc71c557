"""`Watchdog`: signs of life of all members of a run, through a store and never through a collective.

Contract:
    A member that is silent longer than `silent_ms`, or that others wait for longer than `late_ms`, becomes the run's
    one fault: the first that is written stands, and all members read the same. A member whose main thread does not
    come back within `grace_ms` of a fault is ended here: a blocked collective cannot be interrupted from outside.

Terms:
    member     a rank, or the front end (`FRONT`)
    beat       what a member last said: how often, its step, its stage in it
    silence    counted in this watchdog's own looks, so that a machine that sleeps accuses nobody when it wakes
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec
from torch.distributed import Store  # type: ignore[attr-defined]

from atomc.runtime.errors import RankError

FRONT: Final = -1
LOADING, AGREE, RUN, DONE = range(4)
STAGES: Final = ("loading", "agreeing on it", "running it", "done")
_NOBODY: Final = b"-"
_FAULT: Final = "fault"


class Beat(msgspec.Struct, array_like=True, frozen=True):
    """`at` counts collectives within the stage, where an executor reports them."""

    count: int = 0
    step: int = 0
    stage: int = LOADING
    at: int = 0

    @property
    def progress(self) -> tuple[int, int, int]:
        return self.step, self.stage, self.at


class Fault(msgspec.Struct, array_like=True, frozen=True):
    """The one reason a run ends. `why` continues "rank 2 was lost in step 57 (running it): "."""

    member: int
    step: int
    stage: int
    why: str
    seen_by: int

    def error(self, size: int) -> RankError:
        """The error that every member raises; `size` is the number of ranks."""
        where = "while loading" if self.stage == LOADING else f"in step {self.step} ({STAGES[self.stage]})"
        text = f"{name_of(self.member, size)} was lost {where}: {self.why}"
        if self.seen_by != self.member:
            text += f" (seen by {name_of(self.seen_by)})"
        return RankError(f"{text[0].upper()}{text[1:]}.", rank=self.member, step=self.step)


def name_of(member: int, size: int | None = None) -> str:
    """A member's name in a message."""
    if member == FRONT:
        return "the front end"
    return f"rank {member}" if size is None else f"rank {member} of {size}"


@dataclass(frozen=True)
class Bounds:
    """Milliseconds. `join`: until all members have begun; `silent`, `late`, `grace`: see `Watchdog`."""

    join_ms: int = 120_000
    silent_ms: int = 4_000
    late_ms: int = 30_000
    grace_ms: int = 1_500

    @property
    def interval(self) -> float:
        """Seconds between two looks."""
        return min(0.1, self.silent_ms / 20_000)


@dataclass
class _Seen:
    beat: Beat | None = None
    silent: float = 0.0  # seconds without a new beat


class Watchdog:
    """Beats for `member` and watches all others, in a thread of its own, from `start` to `stop`.

    `on_fault` is called once, from that thread. `store`: keys of this run alone; two connections, because a look must
    not hold up the main thread's announcements.
    """

    def __init__(
        self,
        member: int,
        size: int,
        store: Store,
        looks: Store,
        bounds: Bounds,
        *,
        on_fault: Callable[[RankError], None] = lambda error: None,
        end_process: bool = True,
    ) -> None:
        self.member, self.size, self.bounds = member, size, bounds
        self.fault: Fault | None = None
        self._store, self._looks = store, looks
        self._on_fault, self._end_process = on_fault, end_process
        self._beat = Beat()
        self._lock = threading.Lock()
        self._others = {other: _Seen() for other in (FRONT, *range(size)) if other != member}
        self._since_progress, self._last_progress = 0.0, self._beat.progress
        self._age = 0.0
        self._stopped = threading.Event()
        self._faulted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="atomc-watchdog", daemon=True)

    def start(self) -> None:
        for key in (_FAULT, *(_key(other) for other in (FRONT, *range(self.size)))):
            self._store.compare_set(key, "", _NOBODY.decode())
        self._say()
        self._thread.start()

    def stop(self) -> None:
        """Say that this member ends in good order, and watch no more."""
        self._stopped.set()
        with contextlib.suppress(RuntimeError):  # the store may be gone already: so may those who would read it
            self.announce(self._beat.step, DONE)
        self._thread.join()

    def announce(self, step: int, stage: int, at: int = 0) -> None:
        """Say where this member is. Costs microseconds: nobody's answer is waited for."""
        with self._lock:
            self._send(step, stage, at)

    def _send(self, step: int, stage: int, at: int) -> None:
        self._beat = Beat(self._beat.count + 1, step, stage, at)
        self._store.set(_key(self.member), _text(self._beat))

    def check(self) -> None:
        """Raises `RankError` when the run has a fault."""
        if self.fault is not None:
            raise self.fault.error(self.size)

    def wait(self, seconds: float) -> None:
        """Wait for a fault that is sure to be found, and raise it; returns when there is none after all."""
        self._faulted.wait(seconds)
        self.check()

    def accuse(self, member: int, why: str, beat: Beat | None = None) -> None:
        """Report a member as the run's fault, unless there is one already; any thread may."""
        beat = beat or (self._beat if member == self.member else self._others[member].beat) or Beat()
        fault = Fault(member, beat.step, beat.stage, why, self.member)
        try:
            stands = self._looks.compare_set(_FAULT, _NOBODY.decode(), _text(fault))
            fault = _fault(stands) or fault
        except (RuntimeError, OSError):  # without the store every member is on its own
            pass
        self._take(fault)

    def latest(self, member: int) -> Beat | None:
        """What the store holds of a member, now."""
        try:
            return _decode(self._looks.get(_key(member)))
        except (RuntimeError, OSError):
            return self._others[member].beat

    # -- below: the watchdog's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self.bounds.interval) and self.fault is None:
            now = time.monotonic()
            # A gap in our own time is no silence of others.
            passed, last = min(now - last, 2 * self.bounds.interval), now
            try:
                self._say()
                self._look(passed)
            except (RuntimeError, OSError) as error:
                if not self._stopped.is_set():
                    what = str(error).splitlines()[0]
                    self._take(
                        Fault(FRONT, self._beat.step, self._beat.stage, f"its store is gone ({what})", self.member)
                    )
        if self.fault is not None and self._end_process and not self._stopped.wait(self.bounds.grace_ms / 1000):
            self._end(self.fault)

    def _say(self) -> None:
        with self._lock:  # or an announcement between the two could be undone
            self._send(*self._beat.progress)

    def _look(self, passed: float) -> None:
        fault, *beats = self._looks.multi_get([_FAULT, *map(_key, self._others)])
        if (found := _fault(fault)) is not None:
            self._take(found)
            return
        self._age += passed
        for (other, seen), data in zip(self._others.items(), beats, strict=True):
            self._judge_silence(other, seen, _decode(data), passed)
        self._judge_progress(passed)

    def _judge_silence(self, other: int, seen: _Seen, beat: Beat | None, passed: float) -> None:
        if beat is None:
            if self._age * 1000 > self.bounds.join_ms:
                self.accuse(other, f"it did not join within {self.bounds.join_ms:,} ms")
            return
        silent = seen.beat is not None and seen.beat.count == beat.count and beat.stage != DONE
        seen.silent = seen.silent + passed if silent else 0.0
        seen.beat = beat
        if seen.silent * 1000 > self.bounds.silent_ms:
            self.accuse(other, f"no sign of life for {self.bounds.silent_ms:,} ms")

    def _judge_progress(self, passed: float) -> None:
        """If this rank stands still too long, the rank that is furthest behind is what it waits for."""
        mine = self._beat
        if self.member == FRONT or mine.stage not in (AGREE, RUN) or mine.progress != self._last_progress:
            self._last_progress, self._since_progress = mine.progress, 0.0
            return
        self._since_progress += passed
        if self._since_progress * 1000 <= self.bounds.late_ms:
            return
        beats = {rank: seen.beat for rank, seen in self._others.items() if rank != FRONT and seen.beat is not None}
        beats[self.member] = mine
        slowest = min(sorted(beats), key=lambda rank: beats[rank].progress)
        waits = "" if beats[slowest].progress == mine.progress else f", and others wait in step {mine.step}"
        self.accuse(slowest, f"it has not come on for {self.bounds.late_ms:,} ms{waits}", beats[slowest])

    def _take(self, fault: Fault) -> None:
        with self._lock:
            if self.fault is not None:
                return
            self.fault = fault
        self._faulted.set()
        self._on_fault(fault.error(self.size))

    def _end(self, fault: Fault) -> None:
        print(f"error: {fault.error(self.size).message}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(RankError.exit_code)


def _key(member: int) -> str:
    return f"beat/{member}"


def _decode(data: bytes) -> Beat | None:
    return None if data == _NOBODY else msgspec.json.decode(data, type=Beat)


def _text(word: Beat | Fault) -> str:
    return msgspec.json.encode(word).decode()


def _fault(data: bytes) -> Fault | None:
    return None if data in (_NOBODY, b"") else msgspec.json.decode(data, type=Fault)
