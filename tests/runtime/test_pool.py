"""Pools and caches: one owner for every piece, promises kept, leaks found."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomc.runtime.caches import Caches
from atomc.runtime.errors import ServingError
from atomc.runtime.pool import BlockPool
from atomc.runtime.request import Request, SamplingParams
from tests.support.fake_executor import FakeServing


def request(tokens: int, limit: int) -> Request:
    return Request("r", [3] * tokens, tokens, SamplingParams(), limit, frozenset(), 0.0)


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 9), st.integers(0, 1))
def test_a_pool_never_gives_a_number_twice(moves: list[bool], count: int, reserved: int) -> None:
    pool = BlockPool("test", count, reserved=reserved)
    held: list[int] = []
    for take in moves:
        if take and pool.free:
            number = pool.take()
            assert number not in held
            assert reserved <= number < count
            held.append(number)
        elif not take and held:
            pool.give([held.pop(0)])
        assert pool.used == len(held)
        assert pool.free + pool.used == pool.capacity == count - reserved
    pool.give(held)
    pool.check_idle()


def test_misuse_of_a_pool_is_an_assertion() -> None:
    pool = BlockPool("block", 2)
    block = pool.take()
    with pytest.raises(AssertionError, match="empty"):
        pool.take()
    with pytest.raises(AssertionError, match="leaks"):
        pool.check_idle()
    pool.give([block])
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.give([block])
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.give([0])


def test_a_decoding_request_holds_its_window_and_no_more() -> None:
    serving = FakeServing(window=8, window_page=4)
    caches = Caches(serving, 64, 64, 4)
    one = request(1, 200)
    caches.admit(one)
    for position in range(199):
        assert caches.room(one) >= 1
        assert caches.reserve(one, 1)
        one.computed += 1
        caches.retire(one)
        assert len(one.pages) <= 3  # ceil(7 / 4) + 1
        assert len(one.blocks) == position // 8 + 1
    caches.release(one)
    caches.check_idle()


def test_promised_pages_are_not_lent() -> None:
    """A long prompt may use pages nobody was promised, and not one of the others'."""
    serving = FakeServing(window=8, window_page=4, max_batch_tokens=64, max_context=256)
    caches = Caches(serving, 64, 1 + 3 + 3 + 2, 4)
    first, second = request(1, 100), request(60, 100)
    caches.admit(first)
    caches.admit(second)
    assert caches.room(second) == (3 + 2) * 4
    assert caches.reserve(second, 20)
    assert caches.room(first) == 3 * 4
    assert caches.reserve(first, 1)
    second.computed += 20
    caches.retire(second)
    assert len(second.pages) == 2
    assert not caches.fits(request(1, 100), spare_blocks=0)
    assert caches.fits(request(1, 8), spare_blocks=0)  # short requests are promised less


@pytest.mark.parametrize(
    ("changes", "blocks", "pages", "slots", "says"),
    [
        ({"window_table_width": 3}, 64, 64, 4, "Recompile"),
        ({"block_table_width": 3}, 64, 64, 4, "Recompile"),
        ({}, 1, 64, 4, "0 blocks"),
        ({}, 64, 3, 4, "need"),
        ({}, 64, 64, 0, "0 slots"),
    ],
)
def test_caches_that_can_serve_nobody_are_refused(
    changes: dict[str, int], blocks: int, pages: int, slots: int, says: str
) -> None:
    with pytest.raises(ServingError, match=says):
        Caches(FakeServing().but(**changes), blocks, pages, slots)
