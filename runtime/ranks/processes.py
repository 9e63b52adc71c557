"""`Processes`: the ranks of one machine, as processes of this one: started, watched, and ended whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

_LOOK_SECONDS: Final = 0.05


def how_it_ended(code: int) -> str:
    """What the exit code of a process says."""
    return (
        f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with code {code}"
    )


def environment_of(rank: int, size: int, host: str, port: int, base: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would give a rank; the cores are shared out unless the user has said otherwise."""
    threads = base.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    own = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": host,
        "MASTER_PORT": port, "OMP_NUM_THREADS": threads,
    }  # fmt: skip
    return {**base, **{name: str(value) for name, value in own.items()}}


class Processes:
    """`python -m atomc.runtime ARGUMENTS` for each rank. `lost` is called, from a thread, for the first that ends."""

    def __init__(
        self, arguments: Sequence[str], size: int, host: str, port: int, lost: Callable[[int, str], None]
    ) -> None:
        command = [sys.executable, "-m", "atomc.runtime", *arguments]
        self._lost, self._ending = lost, threading.Event()
        # In sessions of their own: Ctrl-C reaches the front end alone, which then ends them in good order.
        self.all = [
            subprocess.Popen(
                command, env=environment_of(rank, size, host, port, os.environ), stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            for rank in range(size)
        ]  # fmt: skip
        threading.Thread(target=self._watch, name="atomc-processes", daemon=True).start()

    def _watch(self) -> None:
        while not self._ending.wait(_LOOK_SECONDS):
            for rank, process in enumerate(self.all):
                if process.poll():
                    self._lost(rank, how_it_ended(process.returncode))
                    return

    def end(self, wait_seconds: float) -> None:
        """Wait for all to end by themselves, then kill what is left."""
        self._ending.set()
        until = time.monotonic() + wait_seconds
        for process in self.all:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
