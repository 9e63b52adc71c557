"""`Processes`: the ranks of one machine, as processes of this one: started, watched, and ended whatever happens."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

_LOOK_SECONDS: Final = 0.05
# The variable that a run's key is in.
KEY: Final = "ATOMC_RUN_KEY"


def how_it_ended(code: int) -> str:
    """What the exit code of a process says."""
    return (
        f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with code {code}"
    )


def environment_of(rank: int, size: int, host: str, port: int, base: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would give a rank; the cores are shared out unless the user has said otherwise.

    Ranks of one machine need no other interface than its own: gloo would listen on what its name resolves to.
    """
    alone = {"GLOO_SOCKET_IFNAME": "lo"} if host == "127.0.0.1" and Path("/sys/class/net/lo").exists() else {}
    threads = base.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    own = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": host,
        "MASTER_PORT": port, "OMP_NUM_THREADS": threads,
    }  # fmt: skip
    return {**base, **alone, **{name: str(value) for name, value in own.items()}}


def _is_stopped(pid: int) -> bool:
    """Whether a child has got SIGSTOP, or a debugger holds it."""
    try:
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def end_with_parent(seconds: float, silent_ms: int | None = None) -> None:
    """End this process `seconds` after its standard input does: whoever started it holds the other end, and is gone.

    `silent_ms`: who started it writes there all the time, and is lost as well when it stops for that long, and then
    `seconds` more. Only the last way out: the watchdog sees the same sooner, once it runs, and can say who was lost.
    But it cannot before torch is imported.
    """

    def wait() -> None:
        patience = None if silent_ms is None else silent_ms / 1000
        while select.select([0], [], [], patience)[0] and os.read(0, 1024):
            pass
        time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=wait, name="atomc-parent", daemon=True).start()


class Processes:
    """`python -m atomc.runtime ARGUMENTS` for each rank, from `start` to `end`.

    `lost` is called, from a thread, for the first that ends. `key`: what proves that a rank is one of this run.
    """

    def __init__(self, arguments: Sequence[str], size: int, host: str, port: int, key: str) -> None:
        self._command = [sys.executable, "-m", "atomc.runtime", *arguments]
        self._environments = [
            {**environment_of(rank, size, host, port, os.environ), KEY: key} for rank in range(size)
        ]  # fmt: skip
        self._ending = threading.Event()
        self.all: list[subprocess.Popen[bytes]] = []

    def start(self, lost: Callable[[int, str], None], silent_ms: int) -> None:
        """A process that is stopped for `silent_ms` is lost as well: it may be before the watchdog knows it."""
        for environment in self._environments:
            # In sessions of their own: Ctrl-C reaches the front end alone, which then ends them in good order.
            process = subprocess.Popen(
                self._command, env=environment, stdin=subprocess.PIPE, start_new_session=True, bufsize=0
            )
            assert process.stdin is not None
            os.set_blocking(process.stdin.fileno(), False)
            self.all.append(process)
        threading.Thread(target=self._watch, args=(lost, silent_ms), name="atomc-processes", daemon=True).start()

    def _watch(self, lost: Callable[[int, str], None], silent_ms: int) -> None:
        stopped, last = [0.0] * len(self.all), time.monotonic()
        while not self._ending.wait(_LOOK_SECONDS):
            now = time.monotonic()
            passed, last = min(now - last, 5 * _LOOK_SECONDS), now
            for rank, process in enumerate(self.all):
                if process.stdin is not None:
                    with suppress(OSError):  # see `end_with_parent`
                        process.stdin.write(b".")
                if process.poll():
                    lost(rank, how_it_ended(process.returncode))
                    return
                stopped[rank] = stopped[rank] + passed if _is_stopped(process.pid) else 0.0
                if stopped[rank] * 1000 > silent_ms:
                    lost(rank, f"its process is stopped since {silent_ms:,} ms")
                    return

    def end(self, wait_seconds: float) -> None:
        """Wait for all to end by themselves, then kill what is left, at once where the wait is interrupted."""
        self._ending.set()
        until = time.monotonic() + wait_seconds
        try:
            for process in self.all:
                if _is_stopped(process.pid):
                    process.kill()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
        finally:
            for process in self.all:
                process.kill()
            for process in self.all:
                process.communicate()
