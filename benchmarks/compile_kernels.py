"""Wall time, processor time and peak memory of compiling the released sizes for a GPU, kernels and all, without one.

    python benchmarks/compile_kernels.py [--models deepseek-v4-flash deepseek-v4-pro] [--target mi355x]
                                         [--out benchmarks/results/compile_kernels.json]

Each model is compiled without weights twice, each time in a process of its own, imports included: cold, with an empty
folder of compiled kernels, and warm, with what the cold compile left there. Processor time is user and system, of all
processes. Peak memory is the largest sum of the resident sets of the process and all below it, read from /proc ten
times a second: what processes share is counted in each. Limits are of wall time, which other work stretches: the load
is printed and kept beside it. Every code object is held to `atomc.codegen.assertions`. A limit that is missed, or an
assertion that does not hold, ends the run with 1, and the stored figures stay.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine
from staged import compile_staged

LIMIT_SECONDS, LIMIT_BYTES = {"cold": 300.0, "warm": 30.0}, 6 << 30
PAGE = os.sysconf("SC_PAGE_SIZE")


def compile_once(model: str, target: str, output: Path) -> dict[str, Any]:
    """One compile in this process: seconds of each stage, and what is known of the kernels."""
    result, stages = compile_staged(model, target, output, "bfloat16")
    facts = result.kernels
    return {
        "stages": stages,
        "kernels": len(facts),
        "products": sum(bool(f.matrix) for f in facts.values()),
        "matrix_instructions": sum(sum(f.matrix.values()) for f in facts.values()),
        "wide_products": sum(bool(f.matrix and f.wide_loads) for f in facts.values()),
        "shared_bytes": max(f.shared for f in facts.values()),
        "spilled": sorted({f"{f.name}: {f.spills} bytes" for f in facts.values() if f.spills}),
        "scalar_spilled": sum(f.scalar_spills > 0 for f in facts.values()),
        "scalar_spills": max(f.scalar_spills for f in facts.values()),
        "faults": [f"{facts[key].name} {key}: {'; '.join(found)}" for key, found in result.faults.items()],
        "hash": result.hash,
    }


def resident(root: int) -> tuple[int, int]:
    """Bytes of the resident sets of a process and of all below it, and how many processes they are."""
    parents: dict[int, list[tuple[int, int]]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            parents.setdefault(int(fields[1]), []).append((int(entry), int(fields[21]) * PAGE))
    size, count, below = 0, 0, [root]
    own = {pid: rss for children in parents.values() for pid, rss in children}
    while below:
        pid = below.pop()
        size, count = size + own.get(pid, 0), count + (pid in own)
        below += [child for child, _ in parents.get(pid, [])]
    return size, count


def run(model: str, target: str, cache: Path) -> dict[str, Any]:
    """One compile in a process of its own."""
    load, peak, most = os.getloadavg()[0], 0, 0
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        command = [sys.executable, __file__, "--one", model, target, str(Path(folder) / "a.atom")]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, "XDG_CACHE_HOME": str(cache)})
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            size, count = resident(process.pid)
            peak, most = max(peak, size), max(most, count)
            time.sleep(0.1)
        seconds = time.perf_counter() - start
        for stream in (out, err):
            stream.seek(0)
        if status:
            raise SystemExit(err.read().decode())
        known = json.loads(out.read())
    return {
        "seconds": seconds, "user_seconds": usage.ru_utime, "system_seconds": usage.ru_stime, "peak_bytes": peak,
        "processes": most, "load": load, **known,
    }  # fmt: skip


def measure(model: str, target: str) -> list[dict[str, Any]]:
    """A cold and a warm compile."""
    with tempfile.TemporaryDirectory() as cache:
        return [
            {"model": model, "target": target, "run": name, **run(model, target, Path(cache))} for name in LIMIT_SECONDS
        ]


def processor_seconds(row: dict[str, Any]) -> float:
    """User and system, of all processes."""
    total: float = row["user_seconds"] + row["system_seconds"]
    return total


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What the limits and the assertions say."""
    found = []
    for row in rows:
        name, most = f"{row['model']} for {row['target']}, {row['run']}", LIMIT_SECONDS[row["run"]]
        checks = (
            (f"{name}: under {most:.0f} s", row["seconds"] < most),
            (f"{name}: under {LIMIT_BYTES >> 30} GiB", row["peak_bytes"] < LIMIT_BYTES),
            (f"{name}: assertions hold of {row['kernels']} kernels", not row["faults"]),
        )
        found += [f"{'met' if holds else 'MISSED'}  {text}" for text, holds in checks]
        found += [f"        {fault}" for fault in row["faults"]]
    return found


def prose(rows: list[dict[str, Any]]) -> list[str]:
    """A line of each model, as README.md has it."""
    found = []
    for cold, warm in zip(rows[::2], rows[1::2], strict=True):
        name = f"{cold['model'].removeprefix('deepseek-v4-').capitalize()} for {cold['target']}"
        spills = f"{len(cold['spilled'])} spill vector registers, {cold['scalar_spilled']} scalar ones"
        took = [f"{row['seconds']:.0f} s ({processor_seconds(row):.0f} s of processor time)" for row in (cold, warm)]
        found.append(
            f"{name}: {cold['kernels']} kernels in {took[0]}, again in {took[1]}, at most"
            f" {cold['peak_bytes'] / 1e9:.1f} GB in {cold['processes']} processes; {cold['products']} multiply by"
            f" matrix instructions, {spills}"
        )
    return found


def main() -> int:
    """Measure, print lines and verdicts, write the JSON; 1 if a limit is missed, and nothing is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deepseek-v4-flash", "deepseek-v4-pro"])
    parser.add_argument("--target", default="mi355x")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compile_kernels.json")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "TARGET", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        model, target, output = options.one
        print(json.dumps(compile_once(model, target, Path(output))))
        return 0
    rows = []
    for model in options.models:
        rows += measure(model, options.target)
        print(*prose(rows)[-1:], f"load {rows[-2]['load']:.1f} and {rows[-1]['load']:.1f}", sep="\n", flush=True)
    said = verdicts(rows)
    print(*said, sep="\n")
    if any(line.startswith("MISSED") for line in said):
        return 1
    command = "python benchmarks/compile_kernels.py " + " ".join(sys.argv[1:])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = {"command": command.strip(), "machine": machine(), "rows": rows}
    options.out.write_text(json.dumps(known, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
