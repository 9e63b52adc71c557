"""`Watchdog`: signs of life of all members of a run, through a store and never through a collective.

Contract:
    The front end judges the ranks: one that is silent longer than `silent_ms`, or stands still longer than its stage
    allows while nobody is behind it, becomes the run's one fault: the first that is written stands, and all members
    read the same. A rank judges the front end and the store alone.
    Only the keeper, a thread of its own, waits for the store. Everything is judged by the clock here and by what the
    keeper last brought, so a store that does not answer is a fault like any other, and never a wait.
    A member whose main thread does not come back within `grace_ms` of a fault is ended here: a blocked collective
    cannot be interrupted from outside. One in which no thread of Python comes to run at all, because a call that waits
    for a collective holds the interpreter, is ended by `faulthandler`, which needs none.

Terms:
    silence    counted in this watchdog's own looks, so that a machine that sleeps accuses nobody when it wakes
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from torch.distributed import Store  # type: ignore[attr-defined]

from atomc.runtime.errors import RankError
from atomc.runtime.ranks.beats import (
    DONE,
    FRONT,
    NOBODY,
    STORE,
    Beat,
    Bounds,
    Fault,
    beat_in,
    fault_in,
    key_of,
    text_of,
)

_FAULT: Final = "fault"
# How long an accusation waits for the store to say whether another one stands.
_TELL_SECONDS: Final = 0.5


@dataclass
class _Seen:
    """What is known of another member; seconds since it said something, since it came on."""

    beat: Beat | None = None
    silent: float = 0.0
    still: float = 0.0


class Watchdog:
    """Beats for `member` and watches others, in threads of its own, from `start` to `stop`.

    `on_fault` is called once, from one of them. `store`, `faults`: two connections to the store of this run alone;
    `hosted`: a launcher hosts it, not the front end.
    """

    def __init__(
        self,
        member: int,
        size: int,
        store: Store,
        faults: Store,
        bounds: Bounds,
        *,
        hosted: bool = False,
        on_fault: Callable[[RankError], None] = lambda error: None,
        end_process: bool = True,
    ) -> None:
        self.member, self.size, self.bounds = member, size, bounds
        self.fault: Fault | None = None
        self._store, self._faults = store, faults
        self._host = STORE if hosted else FRONT
        self._on_fault, self._end_process = on_fault, end_process
        self._beat = Beat()
        self._others = {other: _Seen() for other in (range(size) if member == FRONT else (FRONT,))}
        self._looked: list[bytes] | None = None  # what the keeper last brought, until it is judged
        self._broken: Exception | None = None
        self._age = self._unanswered = 0.0
        self._lock = threading.Lock()
        self._wake, self._stopped, self._faulted = threading.Event(), threading.Event(), threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="atomc-keeper", daemon=True)
        self._thread = threading.Thread(target=self._run, name="atomc-watchdog", daemon=True)

    def start(self) -> None:
        self._keeper.start()
        self._thread.start()

    def stop(self) -> None:
        """Say that this member ends in good order, and watch no more."""
        self._beat = Beat(0, self._beat.step, DONE)
        self._stopped.set()
        self._wake.set()
        self._keeper.join(1.0)  # without its store it cannot say so, and need not: who would read it is gone too
        self._thread.join(1.0)
        if self._end_process:
            faulthandler.cancel_dump_traceback_later()

    def announce(self, step: int, stage: int) -> None:
        """Say where this member is; costs a microsecond."""
        before, self._beat = self._beat, Beat(0, step, stage, 0)
        if before.progress[:2] != (step, stage):
            self._wake.set()

    def place(self, at: int) -> None:
        """Say at which collective of the stage; it is told with the next beat."""
        self._beat = Beat(0, self._beat.step, self._beat.stage, at)

    def check(self) -> None:
        """Raises `RankError` when the run has a fault."""
        if self.fault is not None:
            raise self.fault.error(self.size)

    def wait(self, seconds: float) -> None:
        """Wait for a fault that is sure to be found, and raise it; returns when there is none after all."""
        self._faulted.wait(seconds)
        self.check()

    def accuse(self, members: Sequence[int], why: str) -> None:
        """Report the run's fault, unless there is one already; any thread may. Waits for the store half a second."""
        if self.fault is not None:
            return
        answer: list[Fault] = []
        told = threading.Event()

        def tell() -> None:
            try:
                self._faults.compare_set(_FAULT, "", NOBODY.decode())
                stands = self._faults.compare_set(_FAULT, NOBODY.decode(), text_of(self._accusation(members, why)))
                answer.extend(filter(None, [fault_in(stands)]))
            except Exception:  # noqa: BLE001  without the store every member is on its own
                pass
            told.set()

        threading.Thread(target=tell, name="atomc-accuse", daemon=True).start()
        told.wait(_TELL_SECONDS)
        self._take(answer[0] if answer else self._accusation(members, why, fresh=False))

    def _accusation(self, members: Sequence[int], why: str, *, fresh: bool = True) -> Fault:
        """With the place where the first of them was: here, where it last said, or where this member is itself."""
        beat: Beat | None = self._beat
        if members[0] in self._others and members[0] != FRONT:
            beat = beat_in(self._faults.get(key_of(members[0]))) if fresh else self._others[members[0]].beat
        return Fault(list(members), beat or Beat(), why, self.member)

    # -- below: the keeper's thread ------------------------------------------------------------------------------------

    def _keep(self) -> None:
        keys = [_FAULT, *map(key_of, self._others)]
        count, next_look = 0, 0.0
        try:
            for key in keys:
                self._store.compare_set(key, "", NOBODY.decode())
            while not self._faulted.is_set():
                self._wake.clear()
                last, beat, count = self._stopped.is_set(), self._beat, count + 1
                if self._end_process and not last:
                    faulthandler.dump_traceback_later((self.bounds.silent_ms + self.bounds.grace_ms) / 1000, exit=True)
                self._store.set(key_of(self.member), text_of(Beat(count, *beat.progress)))
                if last:
                    return
                if (now := time.monotonic()) >= next_look:
                    self._looked, next_look = self._store.multi_get(keys), now + self.bounds.interval
                self._wake.wait(self.bounds.interval)
        except Exception as error:  # noqa: BLE001  whatever it is, the watchdog must hear of it
            self._broken = error

    # -- below: the watchdog's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self.bounds.interval) and self.fault is None:
            now = time.monotonic()
            # A gap in our own time is no silence of others.
            passed, last = min(now - last, 2 * self.bounds.interval), now
            try:
                self._judge(passed)
            except Exception as error:  # noqa: BLE001  a watchdog that ends watches nobody
                self.accuse([self.member], f"its watchdog failed ({type(error).__name__}: {error})")
        if self.fault is not None and self._end_process and not self._stopped.wait(self.bounds.grace_ms / 1000):
            self._end(self.fault)

    def _judge(self, passed: float) -> None:
        self._age += passed
        if self._broken is not None:
            what = (str(self._broken).splitlines() or [type(self._broken).__name__])[0]
            self._take(Fault([self._host], self._beat, f"its store failed ({what})", self.member))
            return
        looked, self._looked = self._looked, None
        if looked is None:
            self._unanswered += passed
            if self._unanswered * 1000 > self.bounds.silent_ms:
                why = f"its store gave no answer for {self.bounds.silent_ms:,} ms"
                self._take(Fault([self._host], self._beat, why, self.member))
            return
        # Looks that take long are no silence of others either.
        passed, self._unanswered = passed + min(self._unanswered, 2 * self.bounds.interval), 0.0
        if (fault := fault_in(looked[0])) is not None:
            self._take(fault)
            return
        for (other, seen), data in zip(self._others.items(), looked[1:], strict=True):
            if not self._judge_life(other, seen, beat_in(data), passed):
                return
        if self.member == FRONT:
            self._judge_progress()

    def _judge_life(self, other: int, seen: _Seen, beat: Beat | None, passed: float) -> bool:
        """Whether nothing is to be said against it."""
        if beat is None:
            if self._age * 1000 <= self.bounds.join_ms:
                return True
            self.accuse([other], f"it did not join within {self.bounds.join_ms:,} ms")
            return False
        before, seen.beat = seen.beat or Beat(), beat
        seen.silent = seen.silent + passed if before.count == beat.count and beat.stage != DONE else 0.0
        seen.still = seen.still + passed if before.progress == beat.progress else 0.0
        if seen.silent * 1000 > self.bounds.silent_ms:
            self.accuse([other], f"no sign of life for {self.bounds.silent_ms:,} ms")
        return self.fault is None

    def _judge_progress(self) -> None:
        """The ranks that are furthest behind are those that others, or they themselves, wait for."""
        beats = {rank: seen.beat for rank, seen in self._others.items() if seen.beat is not None}
        if not beats:
            return
        least = min(beat.progress for beat in beats.values())
        behind = [rank for rank, beat in beats.items() if beat.progress == least]
        bound, still = self.bounds.of(least[1]), min(self._others[rank].still for rank in behind)
        if least[1] == DONE or still * 1000 <= bound:
            return
        others = "" if len(behind) == len(beats) else "; the others wait"
        it = "it has" if len(behind) == 1 else "they have"
        self.accuse(behind, f"{it} not come on for {bound:,} ms{others}")

    def _take(self, fault: Fault) -> None:
        with self._lock:
            if self.fault is not None:
                return
            self.fault = fault
        self._faulted.set()
        self._wake.set()
        self._on_fault(fault.error(self.size))

    def _end(self, fault: Fault) -> None:
        error = fault.error(self.size)
        if told_here(error):
            print(f"error: {error.message}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(RankError.exit_code)


def told_here(error: RankError) -> bool:
    """Whether a rank has to say it itself: what it is, the front end says, unless that is lost."""
    return error.ranks[0] in (FRONT, STORE)
