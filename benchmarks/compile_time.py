"""Wall time and peak memory of compiling the released sizes without weights, on this machine.

    python benchmarks/compile_time.py [--models deepseek-v4-flash deepseek-v4-pro] [--dtypes float32 bfloat16]
                                      [--repeat 2] [--out benchmarks/results/compile_time.json]

Each compile runs in a process of its own, imports included; the fastest of `--repeat` counts. Peak memory is the
process's largest resident set. Pro has more layers than Flash, but not more kinds of layers: its time must be near.
The two are compared by processor time (user and system, all threads), which a busy machine stretches less. A limit
that is missed ends the run with 1, and the stored figures stay.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import machine
from staged import compile_staged

LIMIT_SECONDS, LIMIT_BYTES, LIMIT_RATIO = 60.0, 4 << 30, 1.2


def compile_once(model: str, dtype: str, output: Path) -> dict[str, Any]:
    """One compile in this process: seconds of each stage, and what came out."""
    result, stages = compile_staged(model, "cpu", output, dtype)
    assert result.program is not None
    return {
        "stages": stages,
        "regions": len(result.regions),
        "calls": len(result.program.calls),
        "steps": sum(len(r.steps) for r in result.regions.values()),
        "bytes": result.bytes,
        "hash": result.hash,
        "cpu_seconds": time.process_time(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure(model: str, dtype: str, repeat: int) -> dict[str, Any]:
    """The fastest of `repeat` compiles, each in its own process."""
    runs = []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--one", model, dtype, str(Path(folder) / "a.atom")]
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(done.stderr)
        runs.append({"model": model, "dtype": dtype, "seconds": seconds, **json.loads(done.stdout)})
    return min(runs, key=lambda run: run["seconds"])


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What the limits say: time, memory, Pro against Flash."""
    found = []
    for row in rows:
        name = f"{row['model']} {row['dtype']}"
        checks: tuple[tuple[str, Callable[[], bool]], ...] = (
            (f"{name}: under {LIMIT_SECONDS:.0f} s", lambda row=row: row["seconds"] < LIMIT_SECONDS),
            (f"{name}: under {LIMIT_BYTES >> 30} GiB", lambda row=row: row["peak_bytes"] < LIMIT_BYTES),
        )
        found += [f"{'met' if holds() else 'MISSED'}  {text}" for text, holds in checks]
    seconds = {(row["model"], row["dtype"]): row["cpu_seconds"] for row in rows}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        flash, pro = seconds.get(("deepseek-v4-flash", dtype)), seconds.get(("deepseek-v4-pro", dtype))
        if flash and pro:
            word = "met" if pro <= LIMIT_RATIO * flash else "MISSED"
            found.append(
                f"{word}  {dtype}: Pro takes {pro / flash:.2f}x of Flash's processor time, at most {LIMIT_RATIO}x"
            )
    return found


def main() -> int:
    """Measure, print the table and the verdicts, write the JSON; 1 if a limit is missed, and nothing is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deepseek-v4-flash", "deepseek-v4-pro"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compile_time.json")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "DTYPE", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        model, dtype, output = options.one
        print(json.dumps(compile_once(model, dtype, Path(output))))
        return 0
    rows = [measure(model, dtype, options.repeat) for dtype in options.dtypes for model in options.models]
    print(f"{'model':20} {'dtype':9} {'seconds':>8} {'cpu s':>7} {'peak GiB':>9} {'regions':>8} {'calls':>6}  stages")
    for row in rows:
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["stages"].items())
        figures = f"{row['seconds']:8.1f} {row['cpu_seconds']:7.1f} {row['peak_bytes'] / 2**30:9.2f}"
        print(f"{row['model']:20} {row['dtype']:9} {figures} {row['regions']:8} {row['calls']:6}  {stages}")
    said = verdicts(rows)
    print(*said, sep="\n")
    if any(line.startswith("MISSED") for line in said):
        return 1
    command = "python benchmarks/compile_time.py " + " ".join(sys.argv[1:])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"command": command.strip(), "machine": machine(), "rows": rows}, indent=2) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
