"""Compiling the released sizes for many ranks, with steps in two micro-batches, and proving them: without a GPU.

    python benchmarks/compile_layouts.py [--models deepseek-v4-flash deepseek-v4-pro] [--target mi355x]
        [--parallel dp=8,moe=tp,tbo=prefill dp=8,moe=ep] [--out benchmarks/results/compile_layouts.json]

Each model is compiled without weights, for steps of up to 8,192 tokens, with an empty folder of compiled kernels, by
the command, in a process of its own; then `atomc verify --collectives` proves it from what was written. Times are wall
and processor time of the processes, imports included. Predicted: what a step of 8,192 tokens of a prompt takes on each
rank and how long its communication is exposed, whole and in two micro-batches (docs/planning.md); none of it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

from atomc.models.bundled import bundled_config
from atomc.parallel.layout import parse_layout
from atomc.planning.decide import decide
from atomc.planning.step import Step
from atomc.targets import get_target

TOKENS = 8192
LIMIT_SECONDS = 300.0


def run(command: list[str], cache: Path) -> tuple[dict[str, float], str]:
    """Seconds of a command, and what it printed; raises `SystemExit` with its error."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-m", "atomc.cli", *command], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.perf_counter() - start, 1), "processor_seconds": round(spent, 1)}, done.stdout


def predicted(model: str, target: str, layout: str) -> dict[str, float]:
    """Milliseconds of a step of a prompt on each rank, whole and in halves, and of exposed communication."""
    asked = parse_layout(f"{layout.partition(',tbo')[0]},tbo=all")
    found = decide(bundled_config(model), asked, get_target(target), Step(TOKENS, 1, TOKENS))
    assert found.halves is not None
    both = {"whole": found.whole, "halves": found.halves}
    times = {f"{name}_ms": round(1e3 * s.seconds, 1) for name, s in both.items()}
    return times | {f"{name}_exposed_ms": round(1e3 * sum(s.exposed.values()), 1) for name, s in both.items()}


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model."""
    with tempfile.TemporaryDirectory() as folder:
        artifact, cache = Path(folder) / "a.atom", Path(folder) / "cache"
        words = [word for layout in options.parallel for word in ("--parallel", layout)]
        limits = ["--max-batch-tokens", str(TOKENS), "--max-context", str(TOKENS)]
        compiled, _ = run(
            ["compile", model, "--no-weights", "--dtype", "bfloat16", "--target", options.target, *limits, *words,
             "-o", str(artifact)], cache,
        )  # fmt: skip
        verified, said = run(["verify", "--collectives", str(artifact), "--json"], cache)
        forms = {
            plan["layout"]: {
                name: {"arena_bytes": form["arena_bytes"], "values_bytes": form["values_bytes"]}
                for name, form in plan["forms"].items()
            }
            for plan in json.loads((artifact / "plan" / "ranks.json").read_text())
        }
    known = json.loads(said)
    return {
        "model": model, "target": options.target, "compile": compiled, "verify": verified,
        "proof_seconds": known["seconds"],
        "layouts": [
            {
                "layout": one["layout"], "why": one["why"], "overlap": one["overlap"],
                "collectives": {form: len(sent) for form, sent in one["collectives"].items()},
                "forms": forms[one["layout"]], "predicted": predicted(model, options.target, one["layout"]),
            }
            for one in known["layouts"]
        ],
    }  # fmt: skip


def main() -> int:
    """Measure, print a line each, write the JSON; 1 if a compile and its proof take more than five minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deepseek-v4-flash", "deepseek-v4-pro"])
    parser.add_argument("--target", default="mi355x")
    parser.add_argument("--parallel", nargs="+", default=["dp=8,moe=tp,tbo=prefill", "dp=8,moe=ep"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compile_layouts.json")
    options = parser.parse_args()
    rows, load = [], os.getloadavg()[0]
    for model in options.models:
        row = measure(model, options)
        rows.append(row)
        took = f"{row['compile']['seconds']:.0f} s ({row['compile']['processor_seconds']:.0f} s of processor time)"
        print(f"{model}: compiled in {took}, proven again in {row['verify']['seconds']:.0f} s", flush=True)
        for one in row["layouts"]:
            print(f"  {one['layout']}: {one['predicted']}", flush=True)
    if late := [row["model"] for row in rows if row["compile"]["seconds"] + row["verify"]["seconds"] > LIMIT_SECONDS]:
        print(f"MISSED: {', '.join(late)} took more than {LIMIT_SECONDS:.0f} s")
        return 1
    command = "python benchmarks/compile_layouts.py " + " ".join(sys.argv[1:])
    known = {"command": command.strip(), "machine": machine(), "load": load, "rows": rows}
    options.out.write_text(json.dumps(known, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
