"""Kill or stop a rank of a serving run at a random step, many times: does anybody hang, is any answer wrong?

    python benchmarks/kill_ranks.py ARTIFACT --points 200 --nproc 2 3 4

Each point starts `atomc serve --nproc N`, sends requests of uneven lengths, half of them streamed, waits for a random
number of events, and sends SIGKILL or SIGSTOP to a random rank. Then every client must have an answer: the whole right
text, or an error 503 (in a stream: the right beginning, then an error) that names the rank and a step. The server must
end with a code other than 0, its port must be closed, and no process may be left. Times are seconds from the signal.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

SILENT_MS = 2000
BOUND_SECONDS = 10.0
PROMPTS = (
    "def fibonacci(n):",
    "import os\n",
    "class Stack:\n    def push(self",
    "The quick brown fox",
    "x = [1, 2,",
    "#",
)
LENGTHS = (40, 12, 120, 25, 90, 60)


@dataclass
class Answer:
    """What one client got. `after`: seconds from the signal to the end of its answer."""

    status: int = 0
    text: str = ""
    error: str = ""
    whole: bool = False
    ended: float = 0.0


@dataclass
class Point:
    """One kill and what came of it; no problems: all was as it must be."""

    nproc: int
    rank: int
    signal: str
    events: int
    error: str = ""
    client_seconds: float = 0.0
    end_seconds: float = 0.0
    answered: int = 0
    problems: list[str] = field(default_factory=list)


class Run:
    """A server with ranks, in processes of its own."""

    def __init__(self, artifact: Path, nproc: int, *extra: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        command = [
            sys.executable, "-m", "atomc.cli", "serve", str(artifact), "--nproc", str(nproc), "--port", str(self.port),
            "--max-requests", "4", "--memory", "64M", "--log-level", "warning", *extra,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self._wait_until_ready()
        self.ranks = ranks_of(self.process.pid) if nproc > 1 else {}

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + 90
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        self.process.kill()
        raise RuntimeError(f"the server did not start: {self.process.communicate()[0]}")

    def model(self) -> str:
        """The name it serves."""
        name: str = httpx.get(f"{self.url}/v1/models", timeout=10).json()["data"][0]["id"]
        return name


def ranks_of(parent: int) -> dict[int, int]:
    """Process ids of a server's ranks, by rank."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    found = {}
    for pid in map(int, children):
        words = dict(each.split("=", 1) for each in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in each)
        if "RANK" in words:
            found[int(words["RANK"])] = pid
    return found


def ask(url: str, model: str, index: int, stream: bool, events: queue.SimpleQueue[int]) -> Answer:
    """One request, greedy; reports each event of a stream."""
    body = {
        "model": model, "prompt": PROMPTS[index], "max_tokens": LENGTHS[index], "temperature": 0, "ignore_eos": True,
        "stream": stream,
    }  # fmt: skip
    answer = Answer()
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            answer.status = response.status_code
            if stream and response.status_code == 200:
                _read_events(response, answer, events)
            else:
                _read_whole(json.loads(response.read()), answer)
    except (httpx.TransportError, json.JSONDecodeError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.ended = time.monotonic()
    return answer


def _read_events(response: httpx.Response, answer: Answer, events: queue.SimpleQueue[int]) -> None:
    for line in response.iter_lines():
        data = line.removeprefix("data: ")
        if not data or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            answer.error = event["error"]["message"]
        else:
            answer.text += event["choices"][0]["text"]
            answer.whole = event["choices"][0]["finish_reason"] is not None
        events.put(1)


def _read_whole(body: dict, answer: Answer) -> None:  # type: ignore[type-arg]
    if "error" in body:
        answer.error = body["error"]["message"]
    else:
        answer.text, answer.whole = body["choices"][0]["text"], True


def ask_all(run: Run, model: str) -> tuple[list[threading.Thread], list[Answer], queue.SimpleQueue[int]]:
    """All requests at once, each in a thread."""
    events: queue.SimpleQueue[int] = queue.SimpleQueue()
    answers = [Answer() for _ in PROMPTS]

    def one(index: int) -> None:
        answers[index] = ask(run.url, model, index, index % 2 == 0, events)

    threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    return threads, answers, events


def references(artifact: Path) -> list[str]:
    """The right texts: a server of one rank, and one request after the other."""
    run = Run(artifact, 1)
    model = run.model()
    texts = [ask(run.url, model, index, False, queue.SimpleQueue()).text for index in range(len(PROMPTS))]
    run.process.terminate()
    run.process.wait(30)
    return texts


def try_point(artifact: Path, right: Sequence[str], point: Point) -> None:
    """Fills the point in."""
    run = Run(artifact, point.nproc, "--silent-ms", str(SILENT_MS))
    model = run.model()
    threads, answers, events = ask_all(run, model)
    for _ in range(point.events):
        events.get(timeout=30)
    time.sleep(random.random() * 0.02)  # anywhere in a step
    began = time.monotonic()
    os.kill(run.ranks[point.rank], getattr(signal, point.signal))
    for thread in threads:
        thread.join(max(0.0, began + 3 * BOUND_SECONDS - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        point.problems.append("a client hangs")
    try:
        said = run.process.communicate(timeout=3 * BOUND_SECONDS)[0]
        point.end_seconds = time.monotonic() - began
    except subprocess.TimeoutExpired:
        run.process.kill()
        said = ""
        point.problems.append("the server hangs")
    _judge(point, run, said, right, answers, began)


def _judge(point: Point, run: Run, said: str, right: Sequence[str], answers: list[Answer], began: float) -> None:
    named = re.compile(rf"[Rr]ank {point.rank} of {point.nproc} was lost in step \d+")
    point.client_seconds = max(answer.ended for answer in answers) - began
    point.answered = sum(answer.whole for answer in answers)
    for index, answer in enumerate(answers):
        if "ConnectError" in answer.error:  # it came when the port was closed already
            continue
        if not right[index].startswith(answer.text) or (answer.whole and answer.text != right[index]):
            point.problems.append(f"request {index}: wrong text {answer.text!r}")
        if not answer.whole and not named.search(answer.error):
            point.problems.append(f"request {index}: status {answer.status}, error {answer.error!r}")
        if not answer.whole and index % 2 and answer.status != 503:
            point.problems.append(f"request {index}: status {answer.status}")
    if found := named.search(said):
        point.error = said[found.start() :].splitlines()[0]
    else:
        point.problems.append(f"the server says {said[-300:]!r}")
    if run.process.returncode in (0, None):
        point.problems.append(f"the server ended with {run.process.returncode}")
    if point.end_seconds > BOUND_SECONDS or point.client_seconds > BOUND_SECONDS:
        point.problems.append(f"took {point.client_seconds:.1f} s, {point.end_seconds:.1f} s")
    _look_for_leftovers(point, run)


def _look_for_leftovers(point: Point, run: Run) -> None:
    time.sleep(0.2)
    for rank, pid in run.ranks.items():
        if Path(f"/proc/{pid}").exists():
            point.problems.append(f"the process of rank {rank} is left")
            os.kill(pid, signal.SIGKILL)
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", run.port)) == 0:
            point.problems.append("the port is open")


def main() -> int:
    """Prints each point and a summary; 1 when any point has a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--nproc", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    right = references(options.artifact)
    points = []
    for number in range(options.points):
        nproc = random.choice(options.nproc)
        how = random.choice(("SIGKILL", "SIGSTOP"))
        point = Point(nproc, random.randrange(nproc), how, random.choice((0, random.randrange(150))))
        points.append(point)
        try_point(options.artifact, right, point)
        print(
            f"{number:3} {how} rank {point.rank} of {nproc} after {point.events:3} events: clients "
            f"{point.client_seconds:.2f} s, all ended {point.end_seconds:.2f} s, {point.answered} whole; "
            f"{'; '.join(point.problems) or point.error}",
            flush=True,
        )
    bad = [point for point in points if point.problems]
    for how in ("SIGKILL", "SIGSTOP"):
        some = [point for point in points if point.signal == how]
        if some:
            print(
                f"{how}: {len(some)} points, longest {max(p.client_seconds for p in some):.2f} s to the last client's "
                f"answer, {max(p.end_seconds for p in some):.2f} s to the end of all processes"
            )
    print(f"{len(points)} points, {len(bad)} with a problem")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
