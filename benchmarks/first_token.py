"""How long an artifact takes to its first token: imports, the device's context, loading, one greedy token.

    python benchmarks/first_token.py build/nano-h100.atom [--runs 3] [--out FILE]

Each run is a process of its own. Loading reads the weights, moves them to the device, binds, rehearses and captures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def once(artifact: Path) -> dict[str, float]:
    """Seconds of each part, in this process."""
    marks = [("", time.perf_counter())]
    import torch

    import atomc
    from atomc.runtime.request import SamplingParams

    marks.append(("import", time.perf_counter()))
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    marks.append(("context", time.perf_counter()))
    model = atomc.load(artifact)
    marks.append(("load", time.perf_counter()))
    model.generate(["def"], SamplingParams(temperature=0.0, max_tokens=1))
    marks.append(("first token", time.perf_counter()))
    return {name: at - before for (_, before), (name, at) in itertools.pairwise(marks)}


def main() -> int:
    """Run, print, write when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once(options.artifact)))
        return 0
    rows = []
    for _ in range(options.runs):
        command = [sys.executable, __file__, str(options.artifact), "--once"]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1]))
        print({name: round(seconds, 3) for name, seconds in rows[-1].items()}, flush=True)
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print("median", {name: round(seconds, 3) for name, seconds in median.items()})
    if options.out is not None:
        facts = {"command": " ".join(sys.argv), "artifact": options.artifact.stem, "rows": rows, "median": median}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
