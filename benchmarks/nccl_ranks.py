"""Two ranks on two GPUs over NCCL, watched: one is killed or stopped in an all-gather; does the other end, and say why?

    python benchmarks/nccl_ranks.py

Each case starts a front end's watchdog here and a process for each rank, which joins as a serving rank does (NCCL for
the model's collectives, a gloo group of its own for the agreement of each step) and takes steps of four all-gathers,
checked. In step 50 rank 1 is lost: killed or stopped within an all-gather that rank 0 has not reached, or killed on its
way to one that rank 0 waits in. Passed: the other process has ended within ten seconds, and rank and step are named.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is not installed

import torch
import torch.distributed._functional_collectives

from atomc.runtime.errors import RankError
from atomc.runtime.ranks.beats import FRONT, RUN, Bounds
from atomc.runtime.ranks.decide import Report
from atomc.runtime.ranks.group import Place, Ranks, Stores
from atomc.runtime.ranks.processes import end_with_parent, environment_of, how_it_ended
from atomc.runtime.ranks.watchdog import Watchdog

RANKS: Final = 2
LOST_STEP: Final = 50
COLLECTIVES: Final = 4
ROWS: Final = 1 << 20
BOUNDS: Final = Bounds()
# what happens to rank 1, and whether it has begun the collective
CASES: Final = (("SIGKILL", True), ("SIGKILL", False), ("SIGSTOP", True))


def rank_main(how: str, within: bool) -> None:
    """A rank: steps until one is lost."""
    end_with_parent(5)
    place = Place.of(os.environ)
    torch.cuda.set_device(place.local_rank)
    device = torch.device("cuda", place.local_rank)
    ranks = Ranks(place, Stores.open(place.host, place.port, place.attempt, BOUNDS), BOUNDS)
    ranks.begin()
    threading.Thread(target=_say_fault, args=(ranks,), daemon=True).start()
    began = time.monotonic()
    ranks.join(same="a test", device=device, collectives=True)
    print(
        f"  rank {place.rank}: joined in {time.monotonic() - began:.1f} s, dp over {ranks.group('dp').name()}",
        flush=True,
    )
    mine = torch.full((ROWS,), float(place.rank), device=device)
    others, name = mine, ranks.group("dp").group_name
    all_gather = torch.ops._c10d_functional.all_gather_into_tensor
    wait_tensor = torch.ops._c10d_functional.wait_tensor
    expected = torch.arange(RANKS, device=device, dtype=torch.float32).repeat_interleave(ROWS)
    agreeing = 0.0
    try:
        for step in range(LOST_STEP + 1):
            began = time.monotonic()
            ranks.agree(Report(step, 0, 1, 1, 1, 1, 1))
            agreeing += time.monotonic() - began if step else 0
            ranks.watchdog.announce(step, RUN)
            if step == LOST_STEP and place.rank == 0:
                print(f"  rank 0: agreed {1e6 * agreeing / LOST_STEP:.0f} us a step", flush=True)
            for at in range(1, COLLECTIVES + 1):
                if (step, at) == (LOST_STEP, 2):
                    _lose(place.rank, how, within)
                ranks.announce(at)
                others = wait_tensor(all_gather(mine, RANKS, name))
                torch.cuda.synchronize()
            assert torch.equal(others, expected), "the all-gather is wrong"
    except RankError:
        print(f"  rank {place.rank} raises it", flush=True)
    except Exception as error:  # noqa: BLE001  whatever it is, the watchdog knows whose it is
        print(f"  rank {place.rank} meets {type(error).__name__}", flush=True)
        with suppress(RankError):
            ranks.failed(error)
    os._exit(1)


def _lose(rank: int, how: str, within: bool) -> None:
    if rank == 1:
        if within:
            threading.Timer(0.5, os.kill, (os.getpid(), getattr(signal, how))).start()
        else:
            time.sleep(0.5)
            os.kill(os.getpid(), getattr(signal, how))
    elif within:
        time.sleep(1.0)


def _say_fault(ranks: Ranks) -> None:
    while ranks.watchdog.fault is None:
        time.sleep(0.05)
    print(f"  rank {ranks.rank} knows: {ranks.watchdog.fault.error(RANKS).message}", flush=True)


def try_case(how: str, within: bool) -> bool:
    """Whether it came out as it must."""
    where = "within an all-gather" if within else "before an all-gather that the other waits in"
    print(f"{how} of rank 1 {where}:", flush=True)
    stores = Stores.open("127.0.0.1", 0, "0", BOUNDS, host_it=True)
    found: list[float] = []
    front = Watchdog(
        FRONT, RANKS, stores.beats, stores.faults, BOUNDS, on_fault=lambda _: found.append(time.monotonic()),
        end_process=False,
    )  # fmt: skip
    front.start()
    command = [sys.executable, __file__, "--rank", how, *(["--within"] if within else [])]
    ranks = [
        subprocess.Popen(
            command, env=environment_of(rank, RANKS, "127.0.0.1", stores.port, os.environ), stdin=subprocess.PIPE
        )
        for rank in range(RANKS)
    ]
    until, ended = time.monotonic() + 40, 0.0
    while time.monotonic() < until and not ended:
        time.sleep(0.02)
        if (code := ranks[1].poll()) is not None:
            front.accuse([1], how_it_ended(code))
        if ranks[0].poll() is not None:
            ended = time.monotonic()
    for process in ranks:
        process.kill()
        process.wait()
    if front.fault is None or not ended:
        print(f"  FAILED: fault {front.fault}, rank 0 {'ended' if ended else 'hangs'}", flush=True)
        return False
    error = front.fault.error(RANKS)
    silence = BOUNDS.silent_ms / 1000 if how == "SIGSTOP" else 0
    seconds = ended - found[0] + silence
    passed = error.ranks == (1,) and error.step == LOST_STEP and seconds < 10
    print(f"  front end: {error.message}")
    print(f"  rank 0 ended with code {ranks[0].returncode}, {seconds:.2f} s after the loss at most: ", end="")
    print("passed" if passed else "FAILED", flush=True)
    front.stop()
    return passed


def main() -> int:
    """Prints what it saw; 1 when a case failed, 2 when there are no two GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--within", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_main(options.rank, options.within)
    if torch.cuda.device_count() < RANKS:
        print(f"{torch.cuda.device_count()} GPUs are here; {RANKS} are needed.")
        return 2
    print(f"{RANKS} x {torch.cuda.get_device_name(0)}, torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}")
    passed = [try_case(how, within) for how, within in CASES]
    print(f"{sum(passed)} of {len(passed)} cases passed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
