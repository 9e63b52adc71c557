"""`torchrun --nproc-per-node N -m atomc.runtime ARTIFACT`: a rank of a run; rank 0 starts the front end beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Final, NoReturn

from atomc.errors import AtomcError
from atomc.runtime.options import Given

# How long a process outlives the one that started it: a rank to see why by its watchdog, a front end to tell clients.
_OUTLIVES_SECONDS: Final = {"rank": 2.0, "front": 15.0}


def main(arguments: list[str]) -> NoReturn:
    """Ends the process at once: threads of a broken process group would wait for ever at a normal exit."""
    given = Given.parse(arguments, "python -m atomc.runtime", __doc__ or "")
    if given.role in _OUTLIVES_SECONDS:
        from atomc.runtime.ranks.processes import end_with_parent

        end_with_parent(_OUTLIVES_SECONDS[given.role], given.run.silent_ms if given.role == "rank" else None)
    code = 0
    try:
        if given.role == "front":
            _front(given)
        else:
            _rank(given, arguments)
    except AtomcError as error:
        code = error.exit_code
        if given.role == "front" or _is_told_here(error):
            print(f"error: {error.message}", file=sys.stderr, flush=True)  # noqa: T201
    except Exception:  # noqa: BLE001  a rank must end at once, whatever it was
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_told_here(error: AtomcError) -> bool:
    from atomc.runtime.errors import RankError
    from atomc.runtime.ranks.watchdog import told_here

    return not isinstance(error, RankError) or told_here(error)


def _rank(given: Given, arguments: list[str]) -> None:
    from atomc.runtime.ranks.group import Place
    from atomc.runtime.ranks.processes import KEY
    from atomc.runtime.ranks.serve import ArtifactSource, run_rank

    place = Place.of(os.environ)
    front = _start_front(arguments) if given.role == "all" and place.rank == 0 else None
    try:
        source = ArtifactSource(given.artifact, given.run)
        run_rank(source, place, given.run, os.environ.get(KEY), _aliveness_of(front))
    finally:
        if front is not None:
            _end_front(front)


def _front(given: Given) -> None:
    from atomc.runtime.ranks.group import Place, Stores
    from atomc.runtime.ranks.serve import RankedServer, bounds_of
    from atomc.runtime.server.run import listen

    place, http = Place.of(os.environ), given.http
    with listen(http.host, http.port) as listener:
        hosts = not place.hosted
        stores = Stores.open(
            place.host, place.port, place.attempt, bounds_of(given.run), host_it=hosts, hosted=place.hosted
        )
        server = RankedServer(
            given.artifact, place.size, place.host, stores, given.run, max_waiting=http.max_waiting
        )  # fmt: skip
        server.gather()
        print(f"{place.size} ranks serve at {http.host}:{listener.getsockname()[1]}", flush=True)  # noqa: T201
        server.serve(listener, names=http.name, drain_seconds=http.drain_seconds, log_level=http.log_level)


def _start_front(arguments: list[str]) -> subprocess.Popen[bytes]:
    """In a session of its own, so that it outlives a launcher's signal to its rank and can tell its clients why."""
    command = [sys.executable, "-m", "atomc.runtime", *arguments, "--role", "front"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


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
    main(sys.argv[1:])
