"""Ranks in step, as threads of one process over strict fakes: equal answers, idle ranks, failures, the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from atomc.ops.batch import Batch
from atomc.runtime.detokenize import Vocabulary
from atomc.runtime.engine import Engine
from atomc.runtime.errors import RankError
from atomc.runtime.ranks.beats import AGREE, FRONT, Bounds
from atomc.runtime.ranks.decide import Report
from atomc.runtime.ranks.group import Place, Ranks, Stores
from atomc.runtime.ranks.lockstep import Lockstep
from atomc.runtime.ranks.watchdog import Watchdog
from atomc.runtime.ranks.wire import Add, Channel, Done, Outputs, Stop, decode_for_front, encode
from atomc.runtime.request import SamplingParams
from tests.support.fake_executor import FakeExecutor, FakeServing, alone

PARAMS = SamplingParams(temperature=0.8, seed=11, ignore_eos=True, max_tokens=12)


class Table:
    """Where the reports of all threads meet."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.reports: list[Report] = [Report(0, 0)] * size
        self.log: list[list[Report]] = []


class ThreadRanks(Ranks):
    """`agree` by a barrier in place of gloo; everything else is as it is."""

    def __init__(self, rank: int, size: int, store: HashStore, table: Table) -> None:
        place = Place(rank, size, rank, size, "nowhere", 0, "0", hosted=True)
        super().__init__(place, Stores(store, store, store, 0, hosted=False), Bounds(), end_process=False)
        self.table = table

    def agree(self, report: Report) -> list[Report]:
        self.watchdog.announce(report.step, AGREE)
        self.watchdog.check()
        self.table.reports[self.rank] = report
        try:
            self.table.barrier.wait(10)
            reports = list(self.table.reports)
            self.table.barrier.wait(10)
        except threading.BrokenBarrierError:
            self.watchdog.wait(5)
            raise
        if self.rank == 0:
            self.table.log.append(reports)
        return reports


class ShardedFake(FakeExecutor):
    """Every rank runs every step: counts them, and keeps what each was told."""

    told: list[tuple[tuple[int, ...], int, bool]]

    def begin(self, tokens: Sequence[int], bucket: int, prefill: bool) -> None:
        self.told = [*getattr(self, "told", []), (tuple(tokens), bucket, prefill)]

    def step(self, batch: Batch) -> torch.Tensor:
        if not batch.window_table.any():  # padding: the strict fake would look for its pages
            self.steps += 1
            return torch.zeros((1, self.serving.vocab_size))
        return super().step(batch)


class Run:
    """Ranks in threads; what each sent, and how each ended."""

    def __init__(self, executors: list[FakeExecutor], vocabulary: Vocabulary) -> None:
        size, store = len(executors), HashStore()
        self.table, self.executors = Table(size), executors
        self.ends: list[BaseException | None] = [None] * size
        self.front = Watchdog(FRONT, size, store, store, Bounds(), end_process=False)
        self.pipes = []
        self.loops = []
        for rank, executor in enumerate(executors):
            ours, theirs = Pipe()
            self.pipes.append(ours)
            ranks = ThreadRanks(rank, size, store, self.table)
            loop = Lockstep(Engine(executor, vocabulary=vocabulary), ranks, Channel(theirs))
            self.loops.append(loop)
        self.threads = [threading.Thread(target=self._work, args=(rank,)) for rank in range(size)]

    def _work(self, rank: int) -> None:
        ranks = self.loops[rank].ranks
        ranks.begin()
        try:
            self.loops[rank].run()
        except RankError as error:
            self.ends[rank] = error
            self.table.barrier.abort()
        ranks.close()

    def add(self, rank: int, name: str, tokens: list[int], params: SamplingParams = PARAMS) -> None:
        limit = len(tokens) + (params.max_tokens or 0)
        self.pipes[rank].send_bytes(encode(Add(name, tokens, params, limit, [])))

    def start(self) -> None:
        self.front.start()
        for thread in self.threads:
            thread.start()

    def tokens(self, rank: int, count: int) -> dict[str, list[int]]:
        """The tokens of this rank's next requests that end."""
        found: dict[str, list[int]] = {}
        ended = 0
        while ended < count:
            assert self.pipes[rank].poll(10), "no outputs"
            message = decode_for_front(self.pipes[rank].recv_bytes())
            if isinstance(message, Outputs):
                for output in message.outputs:
                    assert output.error is None, output.error
                    found.setdefault(output.request_id, []).extend(output.token_ids)
                    ended += output.finish_reason is not None
        return found

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send_bytes(encode(Stop("over")))
        self.join()

    def join(self) -> None:
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive(), "a rank hangs"
        self.front.stop()


@contextmanager
def run_of(
    vocabulary: Vocabulary,
    size: int,
    kind: type[FakeExecutor] = FakeExecutor,
    before: Callable[[int, int], None] = lambda rank, step: None,
    **facts: Any,
) -> Iterator[Run]:
    executors = [
        kind(FakeServing(**facts), before_step=lambda step, rank=rank: before(rank, step))  # type: ignore[misc]
        for rank in range(size)
    ]
    yield Run(executors, vocabulary)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", [FakeExecutor, ShardedFake])
def test_uneven_loads_give_the_answers_of_one_rank(vocabulary: Vocabulary, size: int, kind: type[FakeExecutor]) -> None:
    """Rank r has r requests more than rank 0, which has none: it idles from the first step to the last."""
    prompts = {(rank, each): [5 + rank, 9, *range(20, 20 + 7 * each)] for rank in range(size) for each in range(rank)}
    with run_of(vocabulary, size, kind) as run:
        for (rank, each), prompt in prompts.items():
            run.add(rank, f"{rank}-{each}", prompt)
        run.start()
        for rank in range(size):
            found = run.tokens(rank, rank)
            assert found == {f"{rank}-{each}": alone(vocabulary, prompts[rank, each], PARAMS) for each in range(rank)}
        run.stop()
        assert run.ends == [None] * size
        for pipe in run.pipes:
            assert isinstance(decode_for_front(pipe.recv_bytes()), Done)


def test_idle_ranks_run_padding_where_steps_hold_collectives(vocabulary: Vocabulary) -> None:
    with run_of(vocabulary, 3, ShardedFake) as run:
        run.add(1, "only", [5, 6, 7])
        run.start()
        run.tokens(1, 1)
        run.stop()
        first, *others = [executor.told for executor in run.executors if isinstance(executor, ShardedFake)]
        assert others == [first, first], "ranks were told different things"
        assert first[0] == ((0, 3, 0), 3, True)
        assert first[1:] == [((0, 1, 0), 1, False)] * 11
        assert [executor.steps for executor in run.executors] == [12, 12, 12]


def test_without_collectives_idle_ranks_run_nothing(vocabulary: Vocabulary) -> None:
    with run_of(vocabulary, 2) as run:
        run.add(1, "only", [5, 6, 7])
        run.start()
        run.tokens(1, 1)
        run.stop()
        assert [executor.steps for executor in run.executors] == [0, 12]


def test_a_rank_whose_step_fails_ends_all_and_is_named(vocabulary: Vocabulary) -> None:
    def before(rank: int, step: int) -> None:
        if rank == 1 and step == 4:
            raise RuntimeError("the device is gone")

    with run_of(vocabulary, 3, before=before) as run:
        for rank in range(3):
            run.add(rank, f"r{rank}", [5, 6, 7])
        run.start()
        run.join()
        text = "Rank 1 of 3 was lost in step 3 (running it): RuntimeError: the device is gone"
        assert all(isinstance(end, RankError) for end in run.ends)
        assert all(str(end).startswith(text) for end in run.ends), run.ends
        assert {end.step for end in run.ends if isinstance(end, RankError)} == {3}


def test_a_front_end_that_is_gone_ends_all(vocabulary: Vocabulary) -> None:
    with run_of(vocabulary, 2) as run:
        run.start()
        for pipe in run.pipes:
            pipe.close()
        run.join()
        assert all("front end was lost" in str(end) for end in run.ends), run.ends
