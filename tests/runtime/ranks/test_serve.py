"""Runs of several processes over gloo: equal answers, lost ranks, ends in good order. Each rank is a process: a few."""

from __future__ import annotations

import os
import queue
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from atomc.parallel.layout import parse_layout
from atomc.runtime.capacity import open_executor
from atomc.runtime.llm import LLM
from atomc.runtime.request import SamplingParams
from benchmarks.kill_ranks import FRONT, Point, Run, ask, marked, references, start_marked, try_point
from tests.support.artifact import LAYOUTS
from tests.support.cli import Cli

pytestmark = pytest.mark.slow

PROMPTS = [[5, *range(10, 10 + 9 * each)] for each in range(10)]


@pytest.fixture(scope="module")
def right(artifact: Path) -> list[str]:
    return references(artifact)


@contextmanager
def served(artifact: Path, layout: str) -> Iterator[Run]:
    """A server of a layout's ranks; it ends in good order."""
    run = Run(artifact, parse_layout(layout).ranks, "--parallel", layout)
    try:
        assert run.wait_until_ready(), run.said
        yield run
        run.process.terminate()
        assert run.process.wait(20) == 0, run.said
        assert "error" not in run.said, run.said
        assert not run.left()
    finally:
        run.kill()


@pytest.fixture
def run(artifact: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    """A server of as many ranks as the parameter says."""
    running = Run(artifact, request.param)
    assert running.wait_until_ready(), running.said
    yield running
    running.kill()


def params(index: int) -> SamplingParams:
    return SamplingParams(temperature=index % 3 * 0.5, seed=index, ignore_eos=True, max_tokens=8 + 5 * index)


@pytest.mark.parametrize("run", [2, 4], indirect=True)
def test_every_answer_is_that_of_one_rank(artifact: Path, run: Run) -> None:
    """Uneven prompts and answers, greedy and sampled, all at once; then one alone, while the other ranks idle."""
    executor, _ = open_executor(artifact, num_blocks=40, num_window_pages=40)
    llm = LLM(executor)
    expected = [llm.generate([prompt], params(index))[0].text for index, prompt in enumerate(PROMPTS)]
    model = run.model()

    def post(index: int) -> str:
        asked = params(index)
        body = {
            "model": model, "prompt": PROMPTS[index], "max_tokens": asked.max_tokens, "seed": asked.seed,
            "temperature": asked.temperature, "ignore_eos": True,
        }  # fmt: skip
        answer = httpx.post(f"{run.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(post, range(len(PROMPTS)))) == expected
    assert post(7) == expected[7]
    metrics = httpx.get(f"{run.url}/metrics", timeout=10).text
    ranks = {int(rank) for rank in re.findall(r'atomc_rank_step{rank="(\d+)"}', metrics)}
    assert ranks == set(run.ranks), "a rank got no request"
    run.process.terminate()
    assert run.process.wait(20) == 0, run.said
    assert "error" not in run.said, run.said
    assert not run.left()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_a_layout_give_the_texts_of_one(artifact: Path, right: list[str], layout: str) -> None:
    """One request while the other ranks idle, then uneven ones on all of them."""
    with served(artifact, layout) as run:
        model = run.model()

        def text(index: int) -> str:
            return ask(run.url, model, index, index % 2 == 0, queue.SimpleQueue()).text

        assert text(2) == right[2]
        with ThreadPoolExecutor(len(right)) as pool:
            assert list(pool.map(text, range(len(right)))) == right
        metrics = httpx.get(f"{run.url}/metrics", timeout=10).text
        ranks = {int(rank) for rank in re.findall(r'atomc_rank_step{rank="(\d+)"}', metrics)}
        along = parse_layout(layout).tp
        assert ranks == set(range(0, len(run.ranks), along)), "a rank that leads got no request"


@pytest.mark.parametrize(
    "point",
    [
        Point(2, [1], "SIGKILL", "events", 1),
        Point(2, [0], "SIGSTOP", "events", 60),
        Point(3, [0, 2], "SIGKILL", "events", 37),
        Point(2, [1], "SIGSTOP", "seconds", 0.1),
        Point(2, [FRONT], "SIGSTOP", "events", 20),
        Point(2, [FRONT], "SIGSTOP", "seconds", 0.0),
        Point(2, [0], "SIGKILL", "drain", 0.1),
        Point(2, [1], "SIGKILL", "events", 40, "dp=2,moe=ep"),
        Point(2, [0], "SIGSTOP", "events", 10, "dp=2,moe=tp,tbo=all"),
    ],
    ids=str,
)
def test_what_is_lost_ends_the_run_in_time(artifact: Path, right: list[str], point: Point) -> None:
    """Ranks and front end, killed and stopped; also before they have met, and while answers end."""
    try_point(artifact, right, point)
    assert not point.problems, point


def until_gone(mark: str, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while left := marked(mark):
        assert time.monotonic() < until, f"{left} are left"
        time.sleep(0.1)


@pytest.mark.parametrize("early", [False, True])
def test_ranks_end_when_the_front_end_is_killed(artifact: Path, early: bool) -> None:
    """Also while they are still importing what they need to watch it."""
    run = Run(artifact, 2)
    try:
        while not run.ranks:
            time.sleep(0.01)
        assert early or run.wait_until_ready()
        run.process.kill()
        run.process.wait(10)
        until_gone(run.mark)
    finally:
        run.kill()


@pytest.mark.parametrize("run", [2], indirect=True)
def test_a_rank_told_to_end_ends_the_run_in_good_order(run: Run) -> None:
    """SIGTERM to one rank: answers end, then all processes, and nothing is an error."""
    model, events = run.model(), queue.SimpleQueue[int]()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, run.url, model, 2, True, events)
        events.get(timeout=30)
        os.kill(run.ranks[1], signal.SIGTERM)
        assert asked.result(30).whole
    assert run.process.wait(20) == 0, run.said


@contextmanager
def torchrun(artifact: Path, *extra: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Two ranks under torchrun: the process, its mark, and the server's address."""
    mark = secrets.token_hex(8)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
        "atomc.runtime", str(artifact), "--port", "0", "--memory-bytes", "64000000", "--log-level", "warning", *extra,
    ]  # fmt: skip
    run = start_marked(command, mark)
    try:
        for line in run.stdout or ():
            if found := re.search(r"2 ranks serve at (\S+)", line):
                yield run, mark, f"http://{found[1]}"
                return
        raise AssertionError("it did not start")
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("layout", ["", "dp=2,moe=ep"])
def test_torchrun(artifact: Path, right: list[str], layout: str) -> None:
    with torchrun(artifact, *(["--parallel", layout] if layout else [])) as (run, mark, url):
        model: str = httpx.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"]
        assert ask(url, model, 0, False, queue.SimpleQueue()).text == right[0]
        run.terminate()
        said = run.communicate(timeout=30)[0]
        assert "lost" not in said, said
        until_gone(mark)
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)


def test_a_rank_that_is_lost_under_torchrun(artifact: Path) -> None:
    """Rank 0, whose launcher ends its neighbour: the front end is a process of its own, and outlives both to say so."""
    with torchrun(artifact) as (run, mark, url):
        model: str = httpx.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"]
        events = queue.SimpleQueue[int]()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, url, model, 2, True, events)
            events.get(timeout=30)
            ranks = {rank: pid for pid, rank in marked(mark).items() if rank is not None}
            os.kill(ranks[0], signal.SIGKILL)
            answer = asked.result(30)
        assert re.search(r"Rank 0 of 2 was lost in step \d+", answer.error), answer
        said = run.communicate(timeout=30)[0]
        assert run.returncode != 0
        assert re.search(r"error: Rank 0 of 2 was lost in step \d+", said), said
        until_gone(mark)


def test_what_cannot_start(artifact: Path, tmp_path: Path, cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = cli("serve", artifact, "--nproc", "2", "--port", str(port))
        assert ran.code == 2
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in ran.err
    ran = cli("serve", artifact, "--nproc", "0")
    assert ran.code == 2
    assert "--nproc" in ran.err
    ran = cli("serve", tmp_path / "none.atom", "--nproc", "2", "--port", "0")
    assert ran.code == 1
    ran = cli("serve", artifact, "--nproc", "2", "--port", "0", "--max-requests", "1000")
    assert ran.code == 1
    assert "was lost while loading: 1000 requests are asked for" in ran.err
    ran = cli("serve", artifact, "--nproc", "3", "--port", "0", "--parallel", "dp=2,moe=ep")
    assert ran.code == 1
    assert "--parallel dp=2,moe=ep is for 2 ranks, and 3 are started." in ran.err
    ran = cli("serve", artifact, "--port", "0", "--parallel", "dp=3,moe=tp")
    assert ran.code == 1
    assert "is not compiled for dp=3,moe=tp; it has dp=1, dp=2,moe=tp, dp=2,moe=ep, " in ran.err


def test_a_rank_outside_of_a_run(artifact: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    ran = subprocess.run(
        [sys.executable, "-m", "atomc.runtime", str(artifact)], env=clean, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 1
    assert "RANK is not set: start ranks with torchrun, or with `atomc serve --nproc`." in ran.stderr
