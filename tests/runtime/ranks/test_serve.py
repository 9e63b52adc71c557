"""Runs of several processes over gloo: equal answers, lost ranks, ends in good order. Each rank is a process: a few."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from atomc.runtime.capacity import open_executor
from atomc.runtime.llm import LLM
from atomc.runtime.request import SamplingParams
from benchmarks.kill_ranks import Point, Run, ask, references, try_point
from tests.support.cli import Cli

pytestmark = pytest.mark.slow

PROMPTS = [[5, *range(10, 10 + 9 * each)] for each in range(10)]


@pytest.fixture(scope="module")
def right(artifact: Path) -> list[str]:
    return references(artifact)


@pytest.fixture
def run(artifact: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    """A server of as many ranks as the parameter says."""
    running = Run(artifact, request.param)
    yield running
    running.process.terminate()
    try:
        running.process.wait(20)
    finally:
        running.process.kill()


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
    said = run.process.communicate(timeout=20)[0]
    assert run.process.returncode == 0, said
    assert "error" not in said, said


@pytest.mark.parametrize(
    ("rank", "how", "events"), [(1, "SIGKILL", 0), (0, "SIGKILL", 37), (1, "SIGSTOP", 11), (0, "SIGSTOP", 60)]
)
def test_a_rank_that_is_lost(artifact: Path, right: list[str], rank: int, how: str, events: int) -> None:
    point = Point(2, rank, how, events)
    try_point(artifact, right, point)
    assert not point.problems, point


@pytest.mark.parametrize("run", [2], indirect=True)
def test_ranks_end_when_the_front_end_is_killed(run: Run) -> None:
    run.process.kill()
    run.process.wait(10)
    until = time.monotonic() + 10
    while left := [pid for pid in run.ranks.values() if Path(f"/proc/{pid}").exists() and not is_zombie(pid)]:
        assert time.monotonic() < until, f"{left} are left"
        time.sleep(0.1)


def is_zombie(pid: int) -> bool:
    """Ended, and not yet waited for by whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("run", [2], indirect=True)
def test_a_rank_told_to_end_ends_the_run_in_good_order(run: Run) -> None:
    """SIGTERM to one rank: answers end, then all processes, and nothing is an error."""
    model, events = run.model(), queue.SimpleQueue[int]()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, run.url, model, 2, True, events)
        events.get(timeout=30)
        os.kill(run.ranks[1], signal.SIGTERM)
        assert asked.result(30).whole
    said = run.process.communicate(timeout=20)[0]
    assert run.process.returncode == 0, said


def test_torchrun(artifact: Path, right: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
        "atomc.runtime", str(artifact), "--port", str(port), "--memory-bytes", "64000000", "--log-level", "warning",
    ]  # fmt: skip
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(run, url)
        model: str = httpx.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"]
        assert ask(url, model, 0, False, queue.SimpleQueue()).text == right[0]
        run.terminate()
        said = run.communicate(timeout=30)[0]
        assert "lost" not in said, said
    finally:
        run.kill()


def wait_until_ready(process: subprocess.Popen[str], url: str) -> None:
    until = time.monotonic() + 60
    while True:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "it did not start"
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)


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


def test_a_rank_outside_of_a_run(artifact: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    ran = subprocess.run(
        [sys.executable, "-m", "atomc.runtime", str(artifact)], env=clean, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 1
    assert "RANK is not set: start ranks with torchrun, or with `atomc serve --nproc`." in ran.stderr
