"""Signs of life: who is silent, late or never there is named, by all members alike, and nobody else is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from atomc.runtime.errors import RankError
from atomc.runtime.ranks.watchdog import AGREE, FRONT, RUN, Bounds, Watchdog

BOUNDS = Bounds(join_ms=1000, silent_ms=300, late_ms=600)


@contextmanager
def members(size: int, bounds: Bounds = BOUNDS, absent: tuple[int, ...] = ()) -> Iterator[dict[int, Watchdog]]:
    """Watchdogs of all members of a run, in one process."""
    store = HashStore()
    made = {
        each: Watchdog(each, size, store, store, bounds, end_process=False)
        for each in (FRONT, *range(size))
        if each not in absent
    }
    for each in made.values():
        each.start()
    try:
        yield made
    finally:
        for each in made.values():
            each.stop()


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def errors_of(each: dict[int, Watchdog], *others: int) -> set[str]:
    """The messages of these members, once all have one."""
    until(lambda: all(each[other].fault is not None for other in others))
    found = set()
    for other in others:
        with pytest.raises(RankError) as caught:
            each[other].check()
        found.add(caught.value.message)
    return found


def silence(member: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SIGSTOP does: no beats, no looks."""
    monkeypatch.setattr(member, "_say", lambda: None)
    monkeypatch.setattr(member, "_look", lambda passed: None)


def test_members_that_live_accuse_nobody() -> None:
    with members(3) as each:
        for step in range(40):
            for rank in range(3):
                each[rank].announce(step, AGREE)
            time.sleep(0.02)
        for member in each.values():
            member.check()


def test_a_silent_rank_is_named_with_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with members(3) as each:
        for rank in range(3):
            each[rank].announce(7, RUN if rank == 1 else AGREE)
        time.sleep(0.1)
        silence(each[1], monkeypatch)
        (message,) = errors_of(each, FRONT, 0, 2)
        assert message.startswith("Rank 1 of 3 was lost in step 7 (running it): no sign of life for 300 ms (seen by ")


def test_a_silent_front_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with members(2) as each:
        each[0].announce(4, AGREE)
        time.sleep(0.1)
        silence(each[FRONT], monkeypatch)
        (message,) = errors_of(each, 0, 1)
        assert message.startswith("The front end was lost")


def test_a_rank_that_lives_but_does_not_come_on_is_late() -> None:
    with members(3) as each:
        for rank, step in ((0, 9), (1, 8), (2, 9)):
            each[rank].announce(step, RUN if rank == 1 else AGREE)
        (message,) = errors_of(each, FRONT, 0, 1, 2)
        assert message.startswith("Rank 1 of 3 was lost in step 8 (running it): it has not come on for 600 ms")


def test_collectives_within_a_step_tell_who_is_behind() -> None:
    with members(3) as each:
        for rank, at in ((0, 12), (1, 12), (2, 11)):
            each[rank].announce(9, RUN, at)
        (message,) = errors_of(each, FRONT, 0, 1, 2)
        assert message.startswith("Rank 2 of 3 was lost in step 9")


def test_a_rank_that_never_joins() -> None:
    with members(3, absent=(2,)) as each:
        (message,) = errors_of(each, FRONT, 0, 1)
        assert message.startswith("Rank 2 of 3 was lost while loading: it did not join within 1,000 ms")


def test_the_first_accusation_stands() -> None:
    with members(3) as each:
        each[0].accuse(2, "its process ended")
        each[1].accuse(0, "its connection failed")
        (message,) = errors_of(each, FRONT, 0, 1, 2)
        assert "Rank 2" in message
        assert "its process ended (seen by rank 0)" in message


def test_a_rank_that_has_ended_well_is_not_silent() -> None:
    with members(2) as each:
        each[1].announce(3, AGREE)
        each[1].stop()
        time.sleep(0.6)
        each[0].check()
        each[FRONT].check()


def test_a_machine_that_slept_accuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """All clocks jump by minutes; the others' beats are as old as one's own look."""
    jump = 0.0
    real = time.monotonic
    with members(2) as each:
        monkeypatch.setattr("atomc.runtime.ranks.watchdog.time.monotonic", lambda: real() + jump)
        time.sleep(0.1)
        jump = 300.0
        time.sleep(0.3)
        each[0].check()
        each[1].check()


class LostStore:
    """A store whose host goes away."""

    def __init__(self) -> None:
        self.inner, self.lost = HashStore(), False

    def __getattr__(self, name: str) -> object:
        if self.lost:
            raise RuntimeError("Connection reset by peer")
        return getattr(self.inner, name)


def test_without_its_store_a_rank_ends() -> None:
    store = LostStore()
    rank = Watchdog(0, 2, store, store, BOUNDS, end_process=False)  # type: ignore[arg-type]
    rank.start()
    rank.announce(5, RUN)
    store.lost = True
    until(lambda: rank.fault is not None)
    with pytest.raises(RankError, match=r"front end was lost in step 5 .*its store is gone \(Connection reset"):
        rank.check()
    rank.stop()


def test_the_store_holds_what_a_member_said_last() -> None:
    store: Store = HashStore()
    rank = Watchdog(0, 1, store, store, BOUNDS, end_process=False)
    rank.start()
    for step in range(2000):
        rank.announce(step, AGREE)
        found = rank.latest(0)
        assert found is not None
        assert found.step == step
    rank.stop()
