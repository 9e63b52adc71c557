"""What `atomc inspect` predicts of the steps that `layers.py` measured, beside the times that it measured.

    python benchmarks/predictions.py build/flash4-h100.atom benchmarks/results/layers_h100.json [--out FILE]

Needs no GPU. Each step is predicted twice: with the rates that the target is said to sustain, and with the rates of
copies and products that the measured run itself saw.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from atomc.cli.inspect import open_artifact
from atomc.cli.kernels import costs_of
from atomc.costs.predict import Costs, Scenario


def with_rates(costs: Costs, seen: Mapping[str, float]) -> Costs:
    """The same, at the rates of `copy`, `bf16` and `fp8` in bytes and FLOPs per second."""
    target = costs.target
    shares = seen["bf16"] / target.peak("bf16"), seen["fp8"] / target.peak("fp8")
    sustained = replace(target.sustained, memory=seen["copy"] / target.memory_rate, matrix=shares)
    return replace(costs, target=replace(target, sustained=sustained))


def seconds_by_kernel(costs: Costs, scenario: Scenario) -> dict[str, float]:
    """Function -> predicted seconds of all its launches in a step; the longest first."""
    found, sizes = Counter[str](), scenario.sizes(costs.serving)
    bucket = min(use.tokens for use in costs.kernel_uses() if use.tokens >= scenario.tokens)
    for use in costs.kernel_uses():
        if use.tokens == bucket:
            found[costs.kernels[use.cost.kernel].name] += costs.launch(use.cost, sizes).seconds * use.count
    return dict(found.most_common(8))


def main() -> int:
    """Predict, print, write when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    measured = json.loads(options.measured.read_text())
    opened = open_artifact(options.artifact)
    costs, rows = costs_of(opened), list[dict[str, Any]]()
    there = with_rates(costs, measured["ceilings"])
    for row in measured["rows"]:
        tokens, requests = row.get("tokens", row.get("requests")), row.get("requests", 1)
        scenario = Scenario(tokens, requests, row.get("context", tokens))
        total = costs.predict(scenario).total
        rows.append({
            "step": scenario.name, "context": scenario.context, "measured_s": row["device_s"],
            "predicted_s": total.seconds, "with_rates_of_that_run_s": there.predict(scenario).total.seconds,
            "bound": total.bound, "launches": total.launches, "kernels": seconds_by_kernel(costs, scenario),
        })  # fmt: skip
        print(rows[-1], flush=True)
    if options.out is not None:
        facts = {"command": " ".join(sys.argv), "artifact": opened.sha256, "limits": asdict(opened.manifest.limits),
                 "measured": options.measured.name, "measured_on": measured["device"], "rows": rows}  # fmt: skip
        options.out.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
