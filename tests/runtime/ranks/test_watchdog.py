"""Signs of life: who is silent, late or never there is named, by all members alike, and nobody else is."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from atomc.runtime.errors import RankError
from atomc.runtime.ranks.beats import AGREE, FIRST, FRONT, LOADING, RUN, STORE, Beat, Bounds, Fault
from atomc.runtime.ranks.watchdog import Watchdog

# Wide enough that a busy machine accuses nobody.
BOUNDS = Bounds(join_ms=2000, load_ms=4000, silent_ms=1000, first_ms=3000, late_ms=1200)


class Member(Watchdog):
    """`stop_here` does what SIGSTOP does to it: no beats, no looks, no judgement."""

    held = False

    def stop_here(self) -> None:
        self.held = True
        self._store = self._faults = Stuck()  # type: ignore[assignment]

    def _judge(self, passed: float) -> None:
        if not self.held:
            super()._judge(passed)


class Stuck:
    """A store whose host answers nobody, from `blocked` on: what a stopped host or a cut network looks like."""

    def __init__(self, inner: Store | None = None, blocked: bool = True) -> None:
        self.inner, self.blocked = inner, blocked

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            while self.blocked:
                time.sleep(0.01)
            return getattr(self.inner, name)(*arguments)

        return call


@contextmanager
def members(size: int, bounds: Bounds = BOUNDS, absent: tuple[int, ...] = ()) -> Iterator[dict[int, Member]]:
    """Watchdogs of all members of a run, in one process."""
    store = HashStore()
    made = {
        each: Member(each, size, store, store, bounds, end_process=False)
        for each in (FRONT, *range(size))
        if each not in absent
    }
    for each in made.values():
        each.start()
    try:
        yield made
    finally:
        for each in made.values():
            each._keeper.join(0) if each.held else each.stop()


def until(condition: Callable[[], bool], seconds: float = 8) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def error_of(member: Watchdog) -> RankError:
    until(lambda: member.fault is not None)
    with pytest.raises(RankError) as caught:
        member.check()
    return caught.value


def message_of(each: dict[int, Member], *others: int) -> str:
    """The message that all of these members have in the end."""
    (message,) = {error_of(each[other]).message for other in others}
    return message


def test_members_that_live_accuse_nobody() -> None:
    with members(3) as each:
        for step in range(80):
            for rank in range(3):
                each[rank].announce(step, AGREE)
            time.sleep(0.02)
        for member in each.values():
            member.check()


def test_a_silent_rank_is_named_with_its_step() -> None:
    with members(3) as each:
        for rank in range(3):
            each[rank].announce(7, RUN if rank == 1 else AGREE)
        time.sleep(0.2)
        each[1].stop_here()
        message = message_of(each, FRONT, 0, 2)
        assert (
            message
            == "Rank 1 of 3 was lost in step 7 (running it): no sign of life for 1,000 ms (seen by the front end)."
        )


def test_a_silent_front_end_is_named_by_each_rank() -> None:
    with members(2) as each:
        each[0].announce(4, AGREE)
        each[1].announce(4, AGREE)
        time.sleep(0.2)
        each[FRONT].stop_here()
        for rank in (0, 1):
            assert error_of(each[rank]).message.startswith("The front end was lost in step 4")


def test_a_rank_that_lives_but_does_not_come_on_is_late() -> None:
    with members(3) as each:
        for rank, step in ((0, 9), (1, 8), (2, 9)):
            each[rank].announce(step, RUN if rank == 1 else AGREE)
        message = message_of(each, FRONT, 0, 1, 2)
        assert message.startswith(
            "Rank 1 of 3 was lost in step 8 (running it): it has not come on for 1,200 ms; the others wait"
        )


def test_collectives_within_a_step_tell_who_is_behind() -> None:
    with members(3) as each:
        for rank in range(3):
            each[rank].announce(9, RUN)
            each[rank].place(11 if rank == 2 else 12)
        message = message_of(each, FRONT, 0, 1, 2)
        assert message.startswith("Rank 2 of 3 was lost in step 9 (running it, at collective 11): it has not come on")


def test_ranks_that_stand_at_one_place_are_all_named() -> None:
    with members(4) as each:
        for rank in range(4):
            each[rank].announce(9, RUN)
            each[rank].place(5 if rank == 0 else 4)
        error = error_of(each[FRONT])
        assert error.message.startswith(
            "Ranks 1, 2 and 3 of 4 do not come on in step 9 (running it, at collective 4): they have not come on"
        )
        assert error.ranks == (1, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "where", "bound"), [(LOADING, "while loading", 4.0), (FIRST, "in step 0 (running", 3.0)]
)
def test_loading_and_a_first_step_may_take_longer(stage: int, where: str, bound: float) -> None:
    with members(2) as each:
        began = time.monotonic()
        each[0].announce(1, AGREE)
        each[1].announce(0, stage)
        error = error_of(each[FRONT])
        assert error.message.startswith(f"Rank 1 of 2 was lost {where}")
        assert time.monotonic() - began > bound


def test_a_rank_that_never_joins() -> None:
    with members(3, absent=(2,)) as each:
        message = message_of(each, FRONT, 0, 1)
        assert message.startswith("Rank 2 of 3 was lost while joining: it did not join within 2,000 ms")


def test_a_front_end_that_never_comes() -> None:
    with members(1, absent=(FRONT,)) as each:
        assert "front end was lost while joining: it did not join" in error_of(each[0]).message


def test_a_rank_that_stands_still_while_joining() -> None:
    with members(2) as each:
        each[1].announce(0, LOADING)
        assert error_of(each[FRONT]).message.startswith("Rank 0 of 2 was lost while joining: it has not come on")


def test_the_first_accusation_stands() -> None:
    with members(3) as each:
        each[0].accuse([2], "its process ended")
        each[1].accuse([0], "its connection failed")
        message = message_of(each, FRONT, 0, 1, 2)
        assert "Rank 2" in message
        assert "its process ended (seen by rank 0)" in message


def test_a_rank_that_has_ended_well_is_not_silent() -> None:
    with members(2) as each:
        each[1].announce(3, AGREE)
        each[1].stop()
        each[0].stop()
        time.sleep(1.6)
        each[FRONT].check()


def test_a_machine_that_slept_accuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """All clocks jump by minutes; the others' beats are as old as one's own look."""
    jump = 0.0
    real = time.monotonic
    with members(2) as each:
        monkeypatch.setattr("atomc.runtime.ranks.watchdog.time.monotonic", lambda: real() + jump)
        time.sleep(0.2)
        jump = 300.0
        time.sleep(0.5)
        for member in each.values():
            member.check()


@pytest.mark.parametrize("hosted", [False, True])
def test_a_store_that_answers_nobody_is_a_fault_and_no_wait(hosted: bool) -> None:
    """Neither announcing nor accusing nor stopping waits for it, and the watchdog finds out by its own clock."""
    store = Stuck(HashStore(), blocked=False)
    rank = Watchdog(0, 1, store, store, BOUNDS, hosted=hosted, end_process=False)  # type: ignore[arg-type]
    rank.start()
    rank.announce(5, RUN)
    time.sleep(0.2)
    store.blocked = True
    began = time.monotonic()
    for step in range(1000):
        rank.announce(5 + step, RUN)
    assert time.monotonic() - began < 0.5
    error = error_of(rank)
    assert time.monotonic() - began < 3
    assert error.ranks == (STORE if hosted else FRONT,)
    name = "The launcher's store" if hosted else "The front end"
    assert error.message.startswith(f"{name} was lost in step 1004 (running it): its store gave no answer for 1,000 ms")
    began = time.monotonic()
    rank.accuse([0], "too late")
    rank.stop()
    assert time.monotonic() - began < 3
    store.blocked = False


def test_an_accusation_does_not_wait_for_the_store() -> None:
    store = Stuck()
    rank = Watchdog(0, 1, store, store, BOUNDS, end_process=False)  # type: ignore[arg-type]
    began = time.monotonic()
    rank.accuse([0], "ValueError: a defect")
    assert time.monotonic() - began < 2
    assert "ValueError: a defect" in error_of(rank).message
    store.blocked = False


class LostStore:
    """A store whose host goes away, or that holds what nobody of ours has written."""

    def __init__(self) -> None:
        self.inner, self.lost, self.strange = HashStore(), False, False

    def __getattr__(self, name: str) -> object:
        if self.lost:
            raise RuntimeError("Connection reset by peer")
        if self.strange and name == "multi_get":
            return lambda keys: [b"{}" for _ in keys]
        return getattr(self.inner, name)


def test_without_its_store_a_rank_ends() -> None:
    store = LostStore()
    rank = Watchdog(0, 2, store, store, BOUNDS, end_process=False)  # type: ignore[arg-type]
    rank.start()
    rank.announce(5, RUN)
    store.lost = True
    error = error_of(rank)
    assert error.message.startswith("The front end was lost in step 5 (running it): its store failed (Connection reset")
    rank.stop()


def test_what_nobody_of_ours_wrote_is_a_fault() -> None:
    store = LostStore()
    store.strange = True
    rank = Watchdog(0, 2, store, store, BOUNDS, end_process=False)  # type: ignore[arg-type]
    rank.start()
    assert "its watchdog failed (ValidationError" in error_of(rank).message
    rank.stop()


def test_what_an_error_says() -> None:
    fault = Fault([0], Beat(3, 57, RUN, 2), "RuntimeError: no memory", 0)
    assert (
        fault.error(4).message
        == "Rank 0 of 4 was lost in step 57 (running it, at collective 2): RuntimeError: no memory."
    )
    assert fault.error(4).step == 57
    seen = Fault(fault.members, fault.beat, fault.why, 2).error(4).message
    assert seen.endswith("no memory (seen by rank 2).")


HOLDS_THE_INTERPRETER = """
import ctypes, time
from torch.distributed import HashStore
from atomc.runtime.ranks.beats import Bounds
from atomc.runtime.ranks.watchdog import Watchdog
store = HashStore()
Watchdog(0, 1, store, store, Bounds(silent_ms=1000, grace_ms=500)).start()
time.sleep(0.5)
print("now", flush=True)
ctypes.PyDLL(None).sleep(60)
"""


@pytest.mark.slow
def test_a_process_that_never_leaves_a_call_ends() -> None:
    """As a launch does that waits for room behind a collective: no thread of Python runs any more."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_INTERPRETER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        began = time.monotonic()
        try:
            assert process.wait(10) == 1
        finally:
            process.kill()
        assert time.monotonic() - began < 6
        assert process.stderr is not None
        assert "Timeout (0:00:01.5" in process.stderr.read()
