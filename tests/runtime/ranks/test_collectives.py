"""Ranks in processes of their own whose steps hold collectives over gloo: equal answers, and who is lost is named."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from atomc.artifact.store import read_manifest
from atomc.parallel.layout import parse_layout
from atomc.runtime.detokenize import Vocabulary
from atomc.runtime.errors import RankError
from atomc.runtime.options import RunOptions
from atomc.runtime.protocols import Serving
from atomc.runtime.ranks.front import RankedFront
from atomc.runtime.ranks.group import Stores
from atomc.runtime.ranks.lines import Lines
from atomc.runtime.ranks.processes import KEY, environment_of
from atomc.runtime.ranks.serve import bounds_of
from atomc.runtime.request import SamplingParams
from tests.support.fake_executor import FakeServing, alone
from tests.support.rank_process import Act

pytestmark = pytest.mark.slow

PARAMS = SamplingParams(temperature=0.8, seed=11, ignore_eos=True, max_tokens=20)
PROMPTS = [[5 + each, 9, *range(20, 20 + 9 * each)] for each in range(5)]


class Fakes:
    """A front end in this process, and its ranks in theirs."""

    def __init__(self, act: Act, parallel: str) -> None:
        options = RunOptions(parallel, silent_ms=2000, late_ms=2000)
        self.layout = parse_layout(parallel)
        size, here, key = self.layout.ranks, "127.0.0.1", "k" * 64
        stores = Stores.open(here, 0, "0", bounds_of(options), host_it=True)
        serving: Serving = read_manifest(Path(act.artifact)).serving if act.artifact else FakeServing()
        self.front = RankedFront(serving, Path(act.tokenizer), size, stores, bounds_of(options), tp=self.layout.tp)
        self.lines = Lines(here, size, key)
        self.lines.open(stores)
        self.front.watchdog.start()
        command = [sys.executable, "-m", "tests.support.rank_process", *map(_text, (options, act))]
        self.ranks = [
            subprocess.Popen(
                command, env={**environment_of(rank, size, here, stores.port, os.environ), KEY: key},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(size)
        ]  # fmt: skip

    async def ask(self, prompts: list[list[int]]) -> tuple[list[list[int]], set[str]]:
        """Tokens and errors, once every request has ended."""
        self.front.gather(self.lines)
        stream = await self.front.submit([(prompt, PARAMS) for prompt in prompts])
        found: list[list[int]] = [[] for _ in prompts]
        errors = set()
        async for index, output in stream:
            found[index] += output.token_ids
            if output.error:
                errors.add(output.error)
        await self.front.shutdown()
        return found, errors

    def run(self, prompts: list[list[int]] = PROMPTS) -> tuple[list[list[int]], set[str]]:
        return asyncio.run(asyncio.wait_for(self.ask(prompts), 60))

    def end(self) -> list[str]:
        """What each rank printed, once all have ended by themselves."""
        return [rank.communicate(timeout=10)[0] for rank in self.ranks]


def _text(of: RunOptions | Act) -> str:
    return msgspec.json.encode(of).decode()


@pytest.fixture
def fakes(tokenizer_path: Path, tmp_path: Path) -> Iterator[Callable[..., Fakes]]:
    made: list[Fakes] = []

    def make(parallel: str, **act: object) -> Fakes:
        given = Act(str(tokenizer_path), str(tmp_path / "step"), **act)  # type: ignore[arg-type]
        made.append(Fakes(given, parallel))
        return made[-1]

    yield make
    for each in made:
        each.lines.close()
        for rank in each.ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.parametrize("parallel", ["dp=2", "dp=3", "tp=2", "dp=2,tp=2"])
def test_answers_are_those_of_one_rank(fakes: Callable[..., Fakes], vocabulary: Vocabulary, parallel: str) -> None:
    """The executor itself proves that all ranks run the same steps, and a tp group the same batches."""
    run = fakes(parallel)
    found, errors = run.run()
    assert not errors
    assert found == [alone(vocabulary, prompt, PARAMS) for prompt in PROMPTS]
    assert run.end() == [""] * run.layout.ranks
    assert [rank.returncode for rank in run.ranks] == [0] * run.layout.ranks


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def steps_told(tmp_path: Path) -> dict[int, int]:
    return {int(file.suffix[1:]): int(file.read_text()) for file in tmp_path.glob("step.*")}


@pytest.mark.parametrize(
    ("parallel", "ranks", "what", "inside", "at", "why"),
    [
        ("dp=2", (1,), "sleep", False, 1, "it has not come on for 2,000 ms; the others wait"),
        ("dp=2", (0,), "sleep", False, 3, "it has not come on for 2,000 ms; the others wait"),
        ("dp=3", (1,), "sleep", False, 3, "it has not come on for 2,000 ms; the others wait"),
        ("dp=2", (1,), "SIGSTOP", True, 2, "no sign of life for 2,000 ms"),
        ("dp=3", (2,), "SIGSTOP", False, 2, "no sign of life for 2,000 ms"),
        ("dp=2", (0,), "SIGKILL", True, 2, "its process ended"),
        ("dp=3", (1,), "SIGKILL", True, 4, "its process ended"),
        ("dp=2,tp=2", (3,), "SIGKILL", True, 2, "its process ended"),
        ("dp=2,tp=2", (1,), "sleep", False, 3, "it has not come on for 2,000 ms; the others wait"),
        ("dp=3", (1,), "raise", False, 3, "ValueError: a defect of this rank"),
    ],
)
def test_a_rank_that_is_lost_is_named(
    fakes: Callable[..., Fakes],
    tmp_path: Path,
    parallel: str,
    ranks: tuple[int, ...],
    what: str,
    inside: bool,
    at: int,
    why: str,
) -> None:
    lose_one(fakes(parallel, ranks=ranks, what=what, within=inside, at=at), tmp_path, ranks, what, inside, at, why)


@pytest.mark.parametrize(
    ("parallel", "rank", "what", "inside", "at", "why"),
    [
        ("dp=2,moe=ep", 1, "SIGKILL", True, 5, "its process ended"),
        ("dp=2,moe=ep", 0, "SIGSTOP", True, 2, "no sign of life for 2,000 ms"),
        ("dp=2,moe=tp,tbo=all", 1, "SIGKILL", False, 3, "its process ended"),
        ("tp=2", 1, "sleep", False, 4, "it has not come on for 2,000 ms; the others wait"),
    ],
)
def test_a_rank_of_a_layout_that_is_lost_is_named(
    fakes: Callable[..., Fakes],
    artifact: Path,
    tmp_path: Path,
    parallel: str,
    rank: int,
    what: str,
    inside: bool,
    at: int,
    why: str,
) -> None:
    """Within collectives of a compiled model, whose every one is announced."""
    run = fakes(parallel, artifact=str(artifact), ranks=(rank,), what=what, within=inside, at=at)
    lose_one(run, tmp_path, (rank,), what, inside, at, why)
    (capacity,) = {line.ready.capacity for line in run.front.lines}
    assert "4 blocks" in capacity, "pools are not sized by the least memory of any rank"


def lose_one(run: Fakes, tmp_path: Path, ranks: tuple[int, ...], what: str, inside: bool, at: int, why: str) -> None:
    _, errors = run.run()
    (message,) = errors
    (rank,) = ranks
    (step,) = steps_told(tmp_path).values()
    # A step is told at once, a place with the next beat: only who sleeps has surely told it.
    place = f", at collective {at if inside else at - 1}" if what == "sleep" else r"(, at collective \d)?"
    place = place if at > 1 or inside else ""
    pattern = (
        rf"Rank {rank} of {run.layout.ranks} was lost in step {step} \(running it{place}\): {why}( \(seen by .*)?\."
    )
    assert re.fullmatch(pattern, message), (pattern, message)
    with within(6):
        said = run.end()
    assert all(process.returncode for process in run.ranks)
    assert what == "raise" or not any("Traceback" in text for text in said)
    assert isinstance(run.front.error, RankError)
    assert run.front.error.ranks == ranks


def test_ranks_that_all_stand_at_one_collective(fakes: Callable[..., Fakes], tmp_path: Path) -> None:
    """Nobody is accused of what all do: a transport that hangs, say."""
    run = fakes("dp=3", ranks=(0, 1, 2), what="sleep", within=True, at=2)
    _, errors = run.run()
    (step,) = set(steps_told(tmp_path).values())
    where = f"in step {step} (running it, at collective 2)"
    assert errors == {
        f"Ranks 0, 1 and 2 of 3 do not come on {where}: they have not come on for 2,000 ms (seen by the front end)."
    }
    with within(6):
        run.end()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("differ", r"while joining: it has another fake, the others have a fake"),
        ("raise", r"while loading: ValueError: a defect of this rank"),
        ("SIGSTOP", r"while loading: no sign of life for 2,000 ms \(seen by the front end\)"),
    ],
)
def test_a_rank_that_is_lost_before_it_serves(fakes: Callable[..., Fakes], what: str, said: str) -> None:
    run = fakes("dp=2", ranks=(1,), what=what, step=0)
    with pytest.raises(RankError, match=rf"Rank 1 of 2 was lost {said}\."):
        run.front.gather(run.lines)
    if what == "SIGSTOP":  # whoever started it ends it
        run.ranks[1].kill()
    with within(6):
        run.end()
    assert all(process.returncode for process in run.ranks)
