"""The batch of one step, number by number."""

from __future__ import annotations

import time

import torch

from atomc.runtime.batch import build_batch
from atomc.runtime.caches import Caches
from atomc.runtime.request import Request, SamplingParams
from atomc.runtime.scheduler import Scheduler
from tests.support.fake_executor import FakeServing


def request(name: str, tokens: list[int]) -> Request:
    return Request(name, tokens, len(tokens), SamplingParams(), 100, frozenset(), 0.0)


def test_a_mixed_batch() -> None:
    caches = Caches(FakeServing(), 64, 64, 4)
    scheduler = Scheduler(caches, max_batch_tokens=8, max_requests=4)
    first = request("a", [11, 12, 13])
    scheduler.add(first)
    scheduler.advance(scheduler.schedule())
    first.tokens.append(14)
    scheduler.add(request("b", list(range(20, 30))))
    batch = build_batch(scheduler.schedule(), caches, csa_ratio=2, hca_ratio=4)
    assert batch.ids.tolist() == [14, *range(20, 27)]
    assert batch.positions.tolist() == [3, *range(7)]
    assert batch.requests.tolist() == [0] + [1] * 7
    assert batch.query_start.tolist() == [0, 1, 8]
    assert batch.slots.tolist() == [first.slot, 1]
    assert batch.csa_ends.tolist() == [0, 2, 4, 6]
    assert batch.hca_ends.tolist() == [0, 4]
    assert batch.logit_rows.tolist() == [0]
    assert batch.window_table[0, 0].item() == first.pages[0]
    assert batch.block_table[0].tolist() == [first.blocks[0]] + [0] * 31
    assert {tensor.dtype for tensor in batch} == {torch.int32}


def test_nothing_completes() -> None:
    """Ends are padded with -1, and the one logit row a batch must have is its last token."""
    caches = Caches(FakeServing(), 64, 64, 4)
    scheduler = Scheduler(caches, max_batch_tokens=3, max_requests=4)
    scheduler.add(request("a", list(range(2, 12))))
    batch = build_batch(scheduler.schedule(), caches, csa_ratio=0, hca_ratio=4)
    assert batch.csa_ends.tolist() == [-1]
    assert batch.hca_ends.tolist() == [-1]
    assert batch.logit_rows.tolist() == [2]


def test_the_batch_is_a_snapshot() -> None:
    """What the next step changes in the tables must not change a batch that may still be in use."""
    caches = Caches(FakeServing(), 64, 64, 4)
    scheduler = Scheduler(caches, max_batch_tokens=8, max_requests=4)
    only = request("a", [5, 6, 7])
    scheduler.add(only)
    batch = build_batch(scheduler.schedule(), caches, csa_ratio=2, hca_ratio=4)
    tables = batch.window_table.clone(), batch.block_table.clone()
    scheduler.remove(only)
    assert torch.equal(batch.window_table, tables[0])
    assert torch.equal(batch.block_table, tables[1])


def test_a_decode_step_of_eight_is_cheap() -> None:
    """V4-Flash's sizes at a context of 128 Ki; the limit is loose, a loop over tokens or pages would break it."""
    serving = FakeServing(
        window=128, window_page=16, block_tokens=256, csa_ratio=4, hca_ratio=128, max_context=131072,
        max_batch_tokens=2048, max_requests=8,
    )  # fmt: skip
    caches = Caches(serving, 4100, 2000, 8)
    scheduler = Scheduler(caches, max_batch_tokens=2048, max_requests=8)
    for index in range(8):
        scheduler.add(Request(str(index), [3] * 200, 200, SamplingParams(), 60000, frozenset(), 0.0))
    seconds = []
    for _ in range(60):
        start = time.perf_counter()
        chunks = scheduler.schedule()
        build_batch(chunks, caches, csa_ratio=4, hca_ratio=128)
        done = [chunk.request for chunk in chunks if chunk.completes]
        scheduler.advance(chunks)
        seconds.append(time.perf_counter() - start)
        for each in done:
            each.tokens.append(3)
    assert sorted(seconds)[len(seconds) // 2] < 0.001
