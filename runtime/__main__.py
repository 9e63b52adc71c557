"""`torchrun --nproc-per-node N -m atomc.runtime ARTIFACT`: a rank of a run; rank 0 starts the front end beside it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from atomc.errors import AtomcError


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, as `atomc serve` has them."""
    parser = argparse.ArgumentParser(prog="python -m atomc.runtime", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--host", default="127.0.0.1", help="address of the HTTP server")
    parser.add_argument("--port", type=int, default=8000, help="port of the HTTP server; 0 takes any that is free")
    parser.add_argument("--name", action="append", default=[], help="name clients call the model by; may be repeated")
    parser.add_argument("--max-requests", type=int, help="requests that run together, on each rank")
    parser.add_argument("--memory-bytes", type=int, help="memory for the caches of each rank")
    parser.add_argument("--num-blocks", type=int, help="blocks of compressed rows, on each rank")
    parser.add_argument("--num-window-pages", type=int, help="pages of the sliding window, on each rank")
    parser.add_argument("--max-waiting", type=int, default=1024, help="requests that may wait, of all ranks")
    parser.add_argument("--drain-seconds", type=float, default=30.0, help="how long answers may take to end at the end")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--join-ms", type=int, default=120_000, help="until all ranks are there")
    parser.add_argument("--silent-ms", type=int, default=4_000, help="without a sign of life, a rank is lost")
    parser.add_argument("--late-ms", type=int, default=30_000, help="standing still in a step, a rank is lost")
    parser.add_argument("--hold-ms", type=int, default=0, help="longest wait of a prompt for prompts of other ranks")
    parser.add_argument("--role", choices=("all", "rank", "front"), default="all", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code of the front end; a rank ends here."""
    options = parse(arguments)
    failure: AtomcError | None = None
    try:
        (_front if options.role == "front" else _rank)(options, arguments)
    except AtomcError as error:
        failure = error
        print(f"error: {error.message}", file=sys.stderr, flush=True)  # noqa: T201
    if options.role != "front":
        from atomc.runtime.ranks.serve import end_rank

        end_rank(failure)
    return 0 if failure is None else failure.exit_code


def _rank(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    import os

    from atomc.runtime.ranks.group import Place
    from atomc.runtime.ranks.serve import CacheSizes, run_rank

    place = Place.of(os.environ)
    front = _start_front(arguments) if options.role == "all" and place.rank == 0 else None
    sizes = CacheSizes(options.max_requests, options.memory_bytes, options.num_blocks, options.num_window_pages)
    try:
        run_rank(options.artifact, place, _bounds(options), sizes, hold_ms=options.hold_ms, alive=_aliveness_of(front))
    finally:
        if front is not None:
            _end_front(front)


def _bounds(options: argparse.Namespace):  # type: ignore[no-untyped-def]  # noqa: ANN202
    from atomc.runtime.ranks.watchdog import Bounds

    return Bounds(join_ms=options.join_ms, silent_ms=options.silent_ms, late_ms=options.late_ms)


def _front(options: argparse.Namespace, _arguments: Sequence[str]) -> None:
    import os

    from atomc.runtime.ranks.group import Place, Stores
    from atomc.runtime.ranks.serve import RankedServer
    from atomc.runtime.server.run import listen

    place, bounds = Place.of(os.environ), _bounds(options)
    with listen(options.host, options.port) as listener:
        stores = Stores.open(place.host, place.port, place.attempt, bounds, host_it=not place.hosted)
        server = RankedServer(options.artifact, place.size, place.host, stores, bounds, max_waiting=options.max_waiting)
        server.gather()
        print(f"{place.size} ranks serve at {options.host}:{listener.getsockname()[1]}", flush=True)  # noqa: T201
        server.serve(listener, names=options.name, drain_seconds=options.drain_seconds, log_level=options.log_level)


def _start_front(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """In a session of its own, so that it outlives a launcher's signal to its rank and can tell its clients why."""
    command = [sys.executable, "-m", "atomc.runtime", *arguments, "--role", "front"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _aliveness_of(front: subprocess.Popen[bytes] | None) -> Callable[[], None]:
    def check() -> None:
        from atomc.runtime.errors import ServingError

        if front is not None and front.poll() is not None:
            raise ServingError(f"The front end ended with code {front.returncode} before it served.")

    return check


def _end_front(front: subprocess.Popen[bytes], wait_seconds: float = 10.0) -> None:
    """It ends by itself when the run does: it has to tell its clients first."""
    try:
        front.wait(wait_seconds)
    except subprocess.TimeoutExpired:
        front.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
