"""Whole layer stacks on a GPU: an artifact beside transformers and the same model in plain torch, eager and compiled.

    python benchmarks/stacks.py build/flash4-h100.atom [--parts atomc transformers torch inductor]

Each part is a process of its own, with a limit of time, one after the other: it gives its memory back, and what it has
measured is kept whatever becomes of it. All have the artifact's layers and dimensions, and random weights: the artifact
in its own layouts, the others in bf16. Prints rows as they come, then the times beside each other; writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from machine import machine
from stack_timing import Row

import atomc
from atomc.models.deepseek_v4.config import load_config

HERE = Path(__file__).resolve()


PARTS = ("atomc", "transformers", "torch", "inductor")


def part_rows(name: str, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of a part, each as soon as it is measured."""
    if name == "atomc":
        import layers

        yield from layers.rows(options)
        return
    config = load_config(options.artifact)
    if name == "transformers":
        import stack_transformers

        yield from stack_transformers.rows(config, options)
    else:
        import stack_torch

        yield from (stack_torch.inductor_rows if name == "inductor" else stack_torch.eager_rows)(config, options)


def child(options: argparse.Namespace) -> int:
    """Measure one part; a line of JSON a row into `--rows`. The part `device` says what there is, and its ceilings."""
    with options.rows.open("a") as file:
        found: Iterator[dict[str, Any]] = (row.known() for row in part_rows(options.part, options))
        for known in [device_facts(options)] if options.part == "device" else found:
            print(json.dumps(known), flush=True)
            file.write(json.dumps(known) + "\n")
            file.flush()
    return 0


def device_facts(options: argparse.Namespace) -> dict[str, Any]:
    """The device, versions, and on a GPU the rates that it reaches."""
    import torch

    facts = {"torch": torch.__version__}
    if find_spec("transformers"):
        facts["transformers"] = version("transformers")
    if options.device != "cuda":
        return {**facts, "device": machine()["cpu"]}
    from timing import ceilings, told

    best = ceilings()
    print(told(best), flush=True)
    return {**facts, "device": torch.cuda.get_device_name(), "ceilings": best}


def run(part: str, options: argparse.Namespace, limit: float) -> tuple[list[dict[str, Any]], str]:
    """The rows of a part, by a process of its own; and why it ended early, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        rows.touch()
        command = [sys.executable, "-u", str(HERE), *sys.argv[1:], "--part", part, "--rows", str(rows)]
        path = f"{Path(atomc.__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        environment = {**os.environ, "PYTHONPATH": path}
        if part in ("transformers", "torch"):  # nearly all memory is weights: what is left must not be cut up
            environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        why = ""
        try:
            code = subprocess.run(command, env=environment, timeout=limit, check=False).returncode
            why = f"ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            why = f"not done after {limit:.0f} s"
        return [json.loads(line) for line in rows.read_text().splitlines()], why


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line a case: the artifact's time, and the others' over it."""
    cases: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        size = row["requests"] if row["step"] == "decode" else row["tokens"]
        cases.setdefault((row["step"], size), {})[row["who"]] = row
    for (step, size), found in cases.items():
        ours = found.get("atomc", {})
        parts = [f"{step} {size:5}"]
        for who, row in found.items():
            if "device_s" not in row:
                parts.append(f"{who}: {row['reason']}")
                continue
            ratio = f" x{row['device_s'] / ours['device_s']:.1f}" if ours.get("device_s") and who != "atomc" else ""
            floor = f" ({row['share_of_floor']:.0%} of the roofline)" if "share_of_floor" in row else ""
            parts.append(f"{who} {row['device_s'] * 1e3:.2f} ms{ratio}{floor}")
        yield "; ".join(parts)


def arguments() -> argparse.ArgumentParser:
    """Of this script and of its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="compiled with --no-weights; a config.json, without `atomc`")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 4096, 8192])
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=220.0, help="for all parts together")
    parser.add_argument("--device", default="cuda", help="cpu: to see that it runs, without `atomc`")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stacks_h100.json"))
    parser.add_argument("--add", action="store_true", help="keep what the results have of other parts")
    parser.add_argument("--part", choices=(*PARTS, "device"), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Run the parts, print, write."""
    options = arguments().parse_args()
    if options.part is not None:
        return child(options)
    start = time.perf_counter()
    (device,), _ = run("device", options, options.seconds)
    config = load_config(options.artifact)
    facts = {"command": " ".join(sys.argv), **device, "artifact": options.artifact.stem,
             "layers": list(config.compress_ratios[: config.num_hidden_layers])}  # fmt: skip
    rows, ends = kept(options, facts) if options.add else ([], {})
    for part in options.parts:
        left = options.seconds - (time.perf_counter() - start)
        print(f"-- {part}, {left:.0f} s left", flush=True)
        if left < 5:
            ends[part] = "no time was left"
            continue
        began = time.perf_counter()
        found, why = run(part, options, left)
        rows += [{"part": part, **compared(row, device.get("ceilings"))} for row in found]
        ends[part] = why or f"done in {time.perf_counter() - began:.0f} s"
        print(f"-- {part}: {len(found)} rows, {ends[part]}", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**facts, "parts": ends, "rows": rows}, indent=1) + "\n")
    for line in table(rows):
        print(line)
    return 0


def kept(options: argparse.Namespace, facts: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows and ends of the parts that the results have and this run does not measure: of the same device and layers."""
    if not options.out.exists():
        return [], {}
    before = json.loads(options.out.read_text())
    for name in ("device", "torch", "artifact", "layers"):
        if before[name] != facts[name]:
            raise SystemExit(f"--add: {options.out} is of {name} {before[name]}, not {facts[name]}.")
    rows = [row for row in before["rows"] if row["part"] not in options.parts]
    return rows, {part: end for part, end in before["parts"].items() if part not in options.parts}


def compared(known: dict[str, Any], best: dict[str, Any] | None) -> dict[str, Any]:
    """A row with the least time that it could take."""
    row = Row(**known)
    if best is not None:
        row.compare(best)
    return row.known()


if __name__ == "__main__":
    sys.exit(main())
