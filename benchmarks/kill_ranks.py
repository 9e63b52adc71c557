"""Kill or stop ranks of a serving run, or its front end, many times: does anybody hang, is any answer wrong?

    python benchmarks/kill_ranks.py ARTIFACT --points 200 --nproc 2 3 4 --json benchmarks/results/kill_ranks.json

Each point starts `atomc serve --nproc N` and, once it serves, sends requests of uneven lengths, half of them streamed.
SIGKILL or SIGSTOP goes to one rank, two ranks or the front end: a random time after the start of the server (while
processes begin, join, load, run), after a random number of streamed events, or while the server drains after SIGTERM.
Then every client must have an answer: the whole right text, or an error 503 (in a stream: the right beginning, then an
error) that names the rank and where it was. The server must end with a code other than 0, its port must be closed, and
no process may be left, all within 10 seconds. Clients of a front end that is killed lose their connection; its ranks
must end all the same, also while it is stopped. Times are seconds from the signal.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import random
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

SILENT_MS: Final = 3000
BOUND_SECONDS: Final = 10.0
LINGER_SECONDS: Final = 1.0  # that a server whose run has failed still answers, from when it knows
MARK: Final = "KILL_RANKS_POINT"
PROMPTS = (
    "def fibonacci(n):",
    "import os\n",
    "class Stack:\n    def push(self",
    "The quick brown fox",
    "x = [1, 2,",
    "#",
)
LENGTHS = (60, 12, 120, 25, 90, 60)  # those at even places are streamed
EVENTS: Final = 250
FRONT: Final = -1
_NAMED: Final = re.compile(
    r"(?:[Rr]anks? (?P<ranks>[\d, and]+) of \d+|The front end) (?:was lost|do not come on) "
    r"(?:while (?P<early>joining|loading)|in step \d+ \((?P<stage>\w+))"
)


@dataclass
class Answer:
    """What one client got. `sent`, `ended`: of the clock."""

    status: int = 0
    text: str = ""
    error: str = ""
    whole: bool = False
    sent: float = 0.0
    ended: float = 0.0


@dataclass
class Point:
    """One kill and what came of it; no problems: all was as it must be.

    Attributes:
        targets: ranks, or FRONT. after: "seconds" since the start, "events" of streams, or "drain": seconds after a
            SIGTERM that follows some events. at: that number. parallel: the layout; none: the whole model on each rank.
        stage: where the error says the rank was. mended: problems of earlier tries, see --retry.
    """

    nproc: int
    targets: list[int]
    signal: str
    after: str
    at: float
    parallel: str = ""
    stage: str = ""
    error: str = ""
    client_seconds: float = 0.0
    end_seconds: float = 0.0
    answered: int = 0
    problems: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)


class Run:
    """A server with ranks, in processes of its own, which all carry a mark in their environment."""

    def __init__(self, artifact: Path, nproc: int, *extra: str) -> None:
        self.nproc, self.mark = nproc, secrets.token_hex(8)
        command = [
            sys.executable, "-m", "atomc.cli", "serve", str(artifact), "--nproc", str(nproc), "--port", "0",
            "--max-requests", "4", "--memory", "64M", "--log-level", "warning", *extra,
        ]  # fmt: skip
        self.began = time.monotonic()
        self.process = start_marked(command, self.mark)
        self.lines: list[str] = []
        self.url, self.ready_seconds = "", 0.0
        self._greeted = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line)
            if found := re.search(r"(http://\S+)/v1/completions ", line):
                self.url, self.ready_seconds = found[1], time.monotonic() - self.began
                self._greeted.set()
        self._greeted.set()

    def wait_until_ready(self, seconds: float = 120.0) -> bool:
        """Whether it serves; False when it ended before, or the time is over."""
        self._greeted.wait(seconds)
        return bool(self.url)

    def model(self) -> str:
        """The name it serves."""
        name: str = httpx.get(f"{self.url}/v1/models", timeout=10).json()["data"][0]["id"]
        return name

    @property
    def said(self) -> str:
        """All that its processes have printed."""
        return "".join(self.lines)

    @property
    def ranks(self) -> dict[int, int]:
        """Process ids of its ranks that there are, by rank."""
        return {rank: pid for pid, rank in marked(self.mark).items() if rank is not None}

    def left(self) -> list[int]:
        """Its processes that have not ended."""
        self.process.poll()
        return list(marked(self.mark))

    def kill(self) -> None:
        """End whatever is left of it."""
        for pid in self.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        self._reader.join(10)


def start_marked(command: Sequence[str], mark: str) -> subprocess.Popen[str]:
    """The command, with a mark that its children inherit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: mark}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def marked(mark: str) -> dict[int, int | None]:
    """Living processes with this mark, and the rank that each is, if it is one."""
    found: dict[int, int | None] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):
            each = dict(e.split("=", 1) for e in (folder / "environ").read_text().split("\0") if "=" in e)
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if each.get(MARK) == mark and state not in "ZX":
                front = "front" in (folder / "cmdline").read_text().split("\0")
                found[int(folder.name)] = int(each["RANK"]) if "RANK" in each and not front else None
    return found


def ask(url: str, model: str, index: int, stream: bool, events: queue.SimpleQueue[int]) -> Answer:
    """One request, greedy; reports each event of a stream."""
    body = {
        "model": model, "prompt": PROMPTS[index], "max_tokens": LENGTHS[index], "temperature": 0, "ignore_eos": True,
        "stream": stream,
    }  # fmt: skip
    answer = Answer(sent=time.monotonic())
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


def _read_whole(body: dict[str, Any], answer: Answer) -> None:
    if "error" in body:
        answer.error = body["error"]["message"]
    else:
        answer.text, answer.whole = body["choices"][0]["text"], True


class Clients:
    """All requests at once, each in a thread."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.answers: list[Answer] = []
        self._threads: list[threading.Thread] = []

    def start(self, run: Run, model: str) -> None:
        self.answers = [Answer() for _ in PROMPTS]

        def one(index: int) -> None:
            self.answers[index] = ask(run.url, model, index, index % 2 == 0, self.events)

        self._threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(len(PROMPTS))]
        for thread in self._threads:
            thread.start()

    def start_when_ready(self, run: Run) -> None:
        """In a thread: for signals that come at a time of their own."""

        def begin() -> None:
            with suppress(httpx.TransportError, KeyError):  # it can be lost before it has said its name
                if run.wait_until_ready():
                    self.start(run, run.model())

        threading.Thread(target=begin, daemon=True).start()

    def join(self, seconds: float) -> bool:
        """Whether all have their answers."""
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def references(artifact: Path) -> list[str]:
    """The right texts: a server of one rank, and one request after the other."""
    run = Run(artifact, 1)
    if not run.wait_until_ready():
        raise RuntimeError(f"the server did not start: {run.said}")
    model = run.model()
    texts = [ask(run.url, model, index, False, queue.SimpleQueue()).text for index in range(len(PROMPTS))]
    run.process.terminate()
    run.process.wait(30)
    return texts


def try_point(artifact: Path, right: Sequence[str], point: Point) -> float:
    """Fills the point in; returns the seconds that the server took to start, 0 if it did not."""
    layout = ["--parallel", point.parallel] if point.parallel else []
    run, clients = Run(artifact, point.nproc, "--silent-ms", str(SILENT_MS), *layout), Clients()
    try:
        began = _signal_it(point, run, clients)
        _await_end(point, run, clients, began)
        if not clients.join(BOUND_SECONDS):
            point.problems.append("a client hangs")
    finally:
        run.kill()
    _judge(point, run, right, clients.answers, began)
    return run.ready_seconds


def _signal_it(point: Point, run: Run, clients: Clients) -> float:
    """Wait for the moment, and signal; returns the clock then."""
    if point.after == "seconds":
        clients.start_when_ready(run)
        time.sleep(max(0.0, run.began + point.at - time.monotonic()))
    else:
        if not run.wait_until_ready():
            raise RuntimeError(f"the server did not start: {run.said}")
        clients.start(run, run.model())
        for _ in range(int(point.at) if point.after == "events" else random.randrange(1, EVENTS)):
            clients.events.get(timeout=60)
        if point.after == "drain":
            run.process.terminate()
            time.sleep(point.at)
        time.sleep(random.random() * 0.02)  # anywhere in a step
    pids = [_pid_of(run, target) for target in point.targets]
    began = time.monotonic()
    for pid in filter(None, pids):
        with suppress(ProcessLookupError):
            os.kill(pid, getattr(signal, point.signal))
    return began


def _pid_of(run: Run, target: int) -> int | None:
    """Once it, or of a front end the first rank, is there; None when its run has ended before."""
    while (0 if target == FRONT else target) not in (ranks := run.ranks):
        if run.process.poll() is not None or not run.left():
            return None
        time.sleep(0.005)
    return run.process.pid if target == FRONT else ranks[target]


def _await_end(point: Point, run: Run, clients: Clients, began: float) -> None:
    """Until no process is left but a front end that is stopped; that goes on then, and has to end as well."""
    stopped = run.process.pid if point.signal == "SIGSTOP" and FRONT in point.targets else None
    for _ in range(2):
        while set(run.left()) - {stopped}:
            if time.monotonic() - began > BOUND_SECONDS:
                point.problems.append(f"{len(run.left())} processes are left after {BOUND_SECONDS:.0f} s")
                return
            time.sleep(0.02)
        point.end_seconds = max(point.end_seconds, time.monotonic() - began)
        if stopped is None:
            return
        os.kill(stopped, signal.SIGCONT)
        began, stopped = time.monotonic(), None


def _judge(point: Point, run: Run, right: Sequence[str], answers: list[Answer], began: float) -> None:
    point.answered = sum(answer.whole for answer in answers)
    point.client_seconds = max([0.0, *(answer.ended - began for answer in answers)])
    code = run.process.returncode
    if found := _named(point, run.said):
        point.stage = found["early"] or found["stage"]
        point.error = run.said[found.start() :].splitlines()[0]
    elif code == 0:
        point.stage = "after the end"
    for index, answer in enumerate(answers):
        _judge_answer(point, index, answer, right[index], began, code)
    if code == 0:
        if point.after == "events" or (point.after == "seconds" and point.targets != [FRONT]):
            point.problems.append("the server ended with 0")
    elif not found and FRONT not in point.targets:
        point.problems.append(f"the server says {run.said[-300:]!r}")
    if FRONT not in point.targets and point.client_seconds > BOUND_SECONDS:
        point.problems.append(f"a client waited {point.client_seconds:.1f} s")


def _named(point: Point, said: str) -> re.Match[str] | None:
    """Where the right one is named: a target, or, of a front end that went on after its ranks had ended, any rank."""
    for found in _NAMED.finditer(said):
        ranks = {int(rank) for rank in re.findall(r"\d+", found["ranks"] or "")} or {FRONT}
        if FRONT in point.targets or ranks <= set(point.targets):
            return found
    return None


def _judge_answer(point: Point, index: int, answer: Answer, right: str, began: float, code: int | None) -> None:
    if not right.startswith(answer.text) or (answer.whole and answer.text != right):
        point.problems.append(f"request {index}: wrong text {answer.text!r}")
    if answer.whole or (FRONT in point.targets and "Error" in answer.error):
        return
    lost = began + LINGER_SECONDS + (SILENT_MS / 1000 if point.signal == "SIGSTOP" else 0)
    if "ConnectError" in answer.error and answer.sent > lost:  # the port was closed already
        return
    if point.after == "drain" and "shutting down" in answer.error and answer.status in (200, 503):
        return
    if not _named(point, answer.error):
        point.problems.append(f"request {index}: status {answer.status}, error {answer.error!r}, server {code}")
    elif index % 2 and answer.status != 503:
        point.problems.append(f"request {index}: status {answer.status}")


def draw(ranks: int | str) -> Point:
    """A random point of so many ranks, or of a layout; seconds since the start are a share of it until `try_points`."""
    parallel = ranks if isinstance(ranks, str) else ""
    nproc = math.prod(map(int, re.findall(r"(?:dp|tp)=(\d+)", parallel))) if isinstance(ranks, str) else ranks
    kind = random.random()
    targets = [FRONT] if kind < 0.15 else random.sample(range(nproc), 2 if kind > 0.85 else 1)
    after = random.choices(("seconds", "events", "drain"), (50, 40, 10))[0]
    at: float = random.randrange(1, EVENTS + 1)
    if after == "seconds":
        at = random.uniform(0, 1.2)
    elif after == "drain":
        at = random.uniform(0, 0.5)
    return Point(nproc, targets, random.choice(("SIGKILL", "SIGSTOP")), after, round(at, 3), parallel)


def summary(points: Sequence[Point]) -> dict[str, Any]:
    """Counts and the longest times."""

    def counts(keys: Sequence[str]) -> dict[str, int]:
        return dict(sorted(Counter(keys).items()))

    fronts, ranks = ([p for p in points if (FRONT in p.targets) == front] for front in (True, False))
    return {
        "points": len(points),
        "with_a_problem": sum(bool(point.problems) for point in points),
        "mended": sum(bool(point.mended) for point in points),
        "signals": counts([point.signal for point in points]),
        "targets": counts(["front end" for _ in fronts] + [f"{len(p.targets)} of {p.nproc} ranks" for p in ranks]),
        "stages": counts([point.stage or "not told" for point in points]),
        "longest_client_seconds": {
            "ranks": max([p.client_seconds for p in ranks], default=0.0),
            "front end": max([p.client_seconds for p in fronts], default=0.0),
        },
        "longest_end_seconds": {
            how: max([p.end_seconds for p in points if p.signal == how], default=0.0) for how in ("SIGKILL", "SIGSTOP")
        },
    }


def main() -> int:
    """Prints each point and a summary; 1 when any point has a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--nproc", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--parallel", nargs="+", default=[], help="layouts to run in place of whole models")
    parser.add_argument("--retry", type=int, default=0, help="try points of --json with a problem so often again")
    parser.add_argument("--jobs", type=int, default=1, help="servers at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the points and the summary here")
    options = parser.parse_args()
    random.seed(options.seed)
    right = references(options.artifact)
    if options.retry:
        return _retry(options.artifact, right, options.json, options.retry)
    points = [draw(random.choice(options.parallel or options.nproc)) for _ in range(options.points)]
    done: list[Point] = []
    for point in try_points(options.artifact, right, points, options.jobs):
        done.append(point)
        who = "front end" if FRONT in point.targets else f"rank {point.targets} of {point.parallel or point.nproc}"
        print(
            f"{len(done):3} {point.signal} {who} after {point.at} {point.after}: clients {point.client_seconds:.2f} s, "
            f"all ended {point.end_seconds:.2f} s, {point.answered} whole, {point.stage or 'not told'}; "
            f"{'; '.join(point.problems) or point.error}",
            flush=True,
        )
        if options.json:
            _write(options.json, done)
    print(json.dumps(found := summary(done), indent=2))
    return 1 if found["with_a_problem"] else 0


def _retry(artifact: Path, right: Sequence[str], path: Path, times: int) -> int:
    """Each point with a problem, at the same moment; the last try stands, or the first one with a problem again."""
    result = json.loads(path.read_text())
    points = [Point(**each) for each in result["points"]]
    for number, point in enumerate(points):
        if not point.problems:
            continue
        for _ in range(times):
            again = Point(point.nproc, point.targets, point.signal, point.after, point.at, point.parallel)
            again.mended = point.mended + point.problems
            try_point(artifact, right, again)
            print(again, flush=True)
            points[number] = again
            if again.problems:
                break
    result["points"], result["summary"] = [asdict(point) for point in points], summary(points)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["summary"]["with_a_problem"] else 0


def try_points(artifact: Path, right: Sequence[str], points: Sequence[Point], jobs: int) -> Iterator[Point]:
    """Each as it is done, `jobs` of them at a time."""
    starts: dict[int, float] = {}

    def work(point: Point) -> Point:
        if point.after == "seconds":
            point.at = round(point.at * starts.get(point.nproc, 4.0), 3)
        try:
            if seconds := try_point(artifact, right, point):
                starts[point.nproc] = seconds
        except Exception as error:  # noqa: BLE001  a point of its own, and no end of all
            point.problems.append(f"{type(error).__name__}: {error}")
        return point

    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(work, point) for point in points]):
            yield done.result()


def _write(path: Path, points: Sequence[Point]) -> None:
    from machine import machine

    command = f"python benchmarks/kill_ranks.py {shlex.join(sys.argv[1:])}"
    result = {
        "command": command, "machine": machine(), "summary": summary(points),
        "points": [asdict(point) for point in points],
    }  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
