"""A rank in a process of its own, over an executor whose steps do hold collectives; `python -m` it with an `Act`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
import torch
import torch.distributed as dist

from atomc.ops.batch import Batch
from atomc.runtime.batch import pack_batch
from atomc.runtime.errors import RankError
from atomc.runtime.options import RunOptions
from atomc.runtime.ranks.group import Place, Ranks
from atomc.runtime.ranks.processes import KEY, end_with_parent
from atomc.runtime.ranks.serve import run_rank
from tests.support.fake_executor import FakeExecutor, FakeServing

COLLECTIVES: Final = 4  # of a step


class Act(msgspec.Struct, frozen=True):
    """What `ranks` do to themselves in their `step`-th step, and where: before collective `at`, or within it.

    Step 0 is while they load; "differ" is to have something else than the others when they meet.
    Within it means that it has begun and cannot end: the other ranks come half a second later. `told`: a file that
    each of them writes its number of the step to.
    """

    tokenizer: str
    told: str = ""
    ranks: tuple[int, ...] = ()
    what: Literal["nothing", "differ", "sleep", "raise", "SIGSTOP", "SIGKILL"] = "nothing"
    within: bool = False
    step: int = 5
    at: int = 3


class CollectiveFake(FakeExecutor):
    """The strict fake, with collectives around it that prove that all ranks run the same step.

    1 all-reduce of tokens over all, 2 all-gather of ranks over all, 3 all-gather of the batch over tp, 4 all-reduce
    over dp.
    """

    def __init__(self, ranks: Ranks, act: Act) -> None:
        super().__init__(FakeServing(), tokenizer_path=Path(act.tokenizer))
        self.ranks, self.act = ranks, act
        self.tokens: tuple[int, ...] = ()
        self.runs = 0

    def begin(self, tokens: Sequence[int], bucket: int, prefill: bool) -> None:
        assert bucket == max(tokens)
        assert prefill or all(count <= self.serving.max_requests for count in tokens)
        self.tokens = tuple(tokens)

    def step(self, batch: Batch) -> torch.Tensor:
        self.runs += 1
        padding = not batch.window_table.any()
        own = torch.tensor([0 if padding else len(batch.ids)])
        mine = self.tokens[self.ranks.rank]
        assert int(own) == mine, f"it runs {int(own)} tokens and was told {mine}"
        self._reach(1)
        total = own.clone()
        dist.all_reduce(total)
        assert int(total) == sum(self.tokens)
        self._reach(2)
        members = [torch.zeros(1, dtype=torch.int64) for _ in range(self.ranks.size)]
        dist.all_gather(members, torch.tensor([self.ranks.rank]))
        assert [int(each) for each in members] == list(range(self.ranks.size))
        self._reach(3)
        packed = pack_batch(batch)
        others = [torch.zeros_like(packed) for _ in range(self.ranks.tp)]
        dist.all_gather(others, packed, group=self.ranks.group("tp"))
        assert all(torch.equal(each, packed) for each in others), "a tp group runs different batches"
        self._reach(4)
        total = own.clone()
        dist.all_reduce(total, group=self.ranks.group("dp"))
        assert int(total) == sum(self.tokens[:: self.ranks.tp])
        if padding:  # the strict fake would look for its pages
            return torch.zeros((1, self.serving.vocab_size))
        return super().step(batch)

    def _reach(self, at: int) -> None:
        """Announce a collective; act, if it is time to."""
        act, chosen = self.act, self.ranks.rank in self.act.ranks
        now = self.runs == act.step and at == act.at and act.what != "nothing"
        if now and chosen and not act.within:
            self.act_now()
        if now and not chosen and act.within:
            time.sleep(0.5)
        self.ranks.announce(at)
        if now and chosen and act.within:
            if act.what == "sleep":
                self.act_now()
            else:
                threading.Timer(0.2, self.act_now).start()

    def act_now(self) -> None:
        """What this rank was started to do."""
        Path(f"{self.act.told}.{self.ranks.rank}").write_text(str(self.ranks.watchdog._beat.step))
        if self.act.what == "raise":
            raise ValueError("a defect of this rank")
        if self.act.what == "sleep":
            time.sleep(600)
        os.kill(os.getpid(), getattr(signal, self.act.what))


class FakeSource:
    """Where `run_rank` has its executor from."""

    def __init__(self, act: Act) -> None:
        self.act, self.rank = act, int(os.environ["RANK"])

    def same(self) -> str:
        differs = self.act.what == "differ" and self.rank in self.act.ranks
        if differs:
            time.sleep(1)  # the first one to come is what all others are held against
        return "another fake" if differs else "a fake"

    def device(self, _place: Place) -> None:
        return None

    def load(self, ranks: Ranks) -> tuple[CollectiveFake, str]:
        assert ranks.least(10 + ranks.rank) == 10
        executor = CollectiveFake(ranks, self.act)
        if self.act.step == 0 and ranks.rank in self.act.ranks:
            executor.act_now()
        return executor, "fake"


def main() -> None:
    end_with_parent(5)
    options, act = (
        msgspec.json.decode(text, type=kind) for text, kind in zip(sys.argv[1:], (RunOptions, Act), strict=True)
    )
    assert isinstance(options, RunOptions)
    assert isinstance(act, Act)
    code = 0
    try:
        run_rank(FakeSource(act), Place.of(os.environ), options, os.environ[KEY])
    except RankError as error:
        code = error.exit_code
        sys.stdout.write(error.message)
        sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
