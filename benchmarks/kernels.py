"""Every kernel on a GPU, at V4-Flash and V4-Pro shapes, beside what torch and its libraries take for the same work.

    python benchmarks/kernels.py --build build/h100-kernels [--target h100]    compile what is measured, on any machine
    python benchmarks/kernels.py --kernels build/h100-kernels                  measure; compiles first what is missing

Kernels are launched as the runtime launches them; times are medians of CUDA-graph replays over inputs that rotate past
the L2 cache. Prints a line a case and writes JSON after each family, so that nothing measured is lost.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from kernel_cases import FAMILIES, Case, size_of
from kernel_device import BuiltDevice, build, record
from kernel_inputs import Inputs
from kernel_peers import cublas, eager, inductor
from stack_timing import why
from timing import ceilings, copies, replayed, still_works, told, trim

from atomc.codegen.device import Variant
from atomc.models.bundled import bundled_config
from atomc.targets import Target, get_target

PEERS = ("eager", "cublas", "inductor")


@dataclass
class Row:
    """One measurement: of a call, what it must move and compute, and how near to a ceiling that is."""

    family: str
    model: str
    name: str
    tokens: int
    bytes: float
    flops: float
    peak: str
    seconds: float = math.nan
    bytes_per_s: float = math.nan
    flop_per_s: float = math.nan
    share: float = math.nan  # of the higher bound of the two: bytes over the copy rate, or FLOPs over the peak
    bound: str = ""
    library: list[str] = field(default_factory=list)  # calls of libraries in place of kernels
    reason: str = ""
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def judge(self, seconds: float, best: dict[str, Any]) -> None:
        """Rates, and the share of the ceiling that bounds it."""
        self.seconds, self.bytes_per_s, self.flop_per_s = seconds, self.bytes / seconds, self.flops / seconds
        floors = {"copy": self.bytes / best["copy"], self.peak: self.flops / best[self.peak] if self.peak else 0.0}
        self.bound = max(floors, key=floors.__getitem__)
        self.share = floors[self.bound] / seconds

    def known(self) -> dict[str, Any]:
        """What is known of it: JSON has no NaN."""
        return {name: value for name, value in asdict(self).items() if value == value and value != ""}

    def line(self) -> str:
        """Of the table."""
        head = f"{self.family:16} {self.model:5} {self.name:46}"
        if self.reason:
            return f"{head} {self.reason}"
        by = f" by {', '.join(self.library)}" if self.library else ""
        peers = "".join(f"  {name} x{p['seconds'] / self.seconds:.2f}" for name, p in self.peers.items()
                        if "seconds" in p)  # fmt: skip
        return (f"{head} {self.seconds * 1e6:9.1f} us {self.bytes_per_s / 1e12:6.2f} TB/s {self.flop_per_s / 1e12:6.0f}"
                f" TFLOP/s {self.share:5.0%} of {self.bound}{by}{peers}")  # fmt: skip


@dataclass
class Bench:
    """All rows, their cases, and what is left of the time."""

    options: argparse.Namespace
    target: Target
    rows: list[tuple[Row, Case]] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def plan(self) -> None:
        """The rows to measure, and the variants that they launch: by meta tensors, without a GPU."""
        at = Inputs("meta")
        for model in self.options.models:
            config = bundled_config(f"deepseek-v4-{model}")
            for family in self.options.families or FAMILIES:
                for case in FAMILIES[family](config):
                    arguments = case.make(at)
                    result, recorder = record(self.target, case.tokens, case.host(self.target), arguments)
                    moved = size_of(arguments) + size_of(result) if case.bytes is None else case.bytes
                    self.rows.append((Row(family, model, case.name, case.tokens, moved, case.flops, case.peak), case))
                    self.variants += recorder.variants
                at.drop()

    def left(self, until: float) -> bool:
        """Whether there is time for more, up to a share of all."""
        return time.perf_counter() - self.started < until * self.options.seconds

    def groups(self) -> Iterator[tuple[str, list[tuple[Row, Case]]]]:
        """Rows of one family of one model at a time: they share what is kept."""
        names = dict.fromkeys((row.family, row.model) for row, _ in self.rows)
        for family, model in names:
            yield f"{family} {model}", [r for r in self.rows if (r[0].family, r[0].model) == (family, model)]

    def each(self, what: str, until: float, measure: Callable[[Row, Case, Inputs], None]) -> None:
        """Measure all rows, family by family, while there is time; write after each."""
        for name, rows in self.groups():
            at, start = Inputs("cuda"), time.perf_counter()
            skipped = 0
            for row, case in rows:
                if not self.left(until):
                    skipped += 1
                    continue
                measure(row, case, at)
                trim()
            at.drop()
            torch.cuda.empty_cache()
            self.write()
            print(f"-- {what}: {name} took {time.perf_counter() - start:.1f} s"
                  f"{f'; {skipped} left out, no time' if skipped else ''}", flush=True)  # fmt: skip

    def kernels(self) -> None:
        """Time of each kernel."""
        device = BuiltDevice(self.options.kernels, self.target)

        def measure(row: Row, case: Case, at: Inputs) -> None:
            device.tokens, host = case.tokens, case.host(self.target)
            device.made.clear()
            try:
                first = case.make(at)
                sets = [first, *(case.make(at) for _ in range((case.rotate or copies(row.bytes)) - 1))]
                row.judge(replayed([lambda given=given: host(device, *given) for given in sets]), self.best)
                row.library = sorted(device.made)
            except Exception as error:  # the others are worth measuring all the same
                if not still_works():
                    raise
                row.reason = why(error)
            print(row.line(), flush=True)

        self.each("kernels", 0.6, measure)

    def peers(self) -> None:
        """Eager and the libraries for every row; then inductor, within its budget for each family."""
        wanted, spent = self.options.peers, {}

        def quick(row: Row, case: Case, at: Inputs) -> None:
            if "eager" in wanted:
                row.peers["eager"] = eager(case, at)
            if "cublas" in wanted and (case.gemm is not None or row.family == "gemm"):
                row.peers |= dict(cublas(case, at))
            print(row.line(), flush=True)

        def slow(row: Row, case: Case, at: Inputs) -> None:
            if row.tokens not in self.options.inductor_tokens or row.model != self.options.models[0]:
                return
            if spent.get(row.family, 0.0) > self.options.budget:
                row.peers["inductor"] = {"reason": f"its family had {self.options.budget:.0f} s"}
                return
            start = time.perf_counter()
            row.peers["inductor"] = found = inductor(case, at)
            spent[row.family] = spent.get(row.family, 0.0) + time.perf_counter() - start
            print(f"{row.line()}  {found.get('reason', '')}", flush=True)

        self.each("peers", 0.85, quick)
        if "inductor" in wanted:
            self.each("inductor", 1.0, slow)

    def write(self) -> None:
        """JSON of what is known now."""
        facts = {"command": " ".join(sys.argv), "device": torch.cuda.get_device_name(), "torch": torch.__version__,
                 "ceilings": self.best, "rows": [row.known() for row, _ in self.rows]}  # fmt: skip
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        self.options.out.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")

    def summary(self) -> None:
        """A line a family: shares of the ceilings, and the peers' time over ours (geometric means)."""
        for name, rows in self.groups():
            known = [row for row, _ in rows if row.seconds > 0]
            if not known:
                continue
            parts = []
            for title, some in (("decode", [r for r in known if r.tokens <= 128]),
                                ("prefill", [r for r in known if r.tokens > 128])):  # fmt: skip
                if some:
                    parts.append(f"{title} {statistics.median(r.share for r in some):.0%}")
                for peer in dict.fromkeys(p for r in some for p in r.peers):
                    ratios = [r.peers[peer]["seconds"] / r.seconds for r in some if "seconds" in r.peers.get(peer, {})]
                    if ratios:
                        parts.append(f"{peer} x{statistics.geometric_mean(ratios):.2f} ({len(ratios)})")
            print(f"{name:24} {len(known)} of {len(rows)}: {', '.join(parts)}")


def main() -> int:
    """Build, or measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; all without")
    parser.add_argument("--models", nargs="+", choices=("flash", "pro"), default=["flash", "pro"])
    parser.add_argument("--peers", type=lambda text: text.split(","), default=["eager", "cublas"])
    parser.add_argument("--inductor-tokens", type=int, nargs="+", default=[16, 4096], help="rows inductor compiles for")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of inductor for each family")
    parser.add_argument("--seconds", type=float, default=210.0, help="after which what is left is left out")
    parser.add_argument("--target", default="h100")
    parser.add_argument("--build", type=Path, help="compile into this folder, and measure nothing")
    parser.add_argument("--jobs", type=int, help="processes that compile; default: one a core")
    parser.add_argument("--kernels", type=Path, default=Path("build/benchmark-kernels"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels_h100.json"))
    options = parser.parse_args()
    if unknown := set(options.peers) - {*PEERS, ""}:
        parser.error(f"--peers: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    bench = Bench(options, get_target(options.target))
    bench.plan()
    took = f"planned in {time.perf_counter() - bench.started:.1f} s"
    print(f"{len(bench.rows)} cases, {len(set(bench.variants))} kernels; {took}", flush=True)
    build(options.build or options.kernels, dict.fromkeys(bench.variants), bench.target, options.jobs)
    print(f"built after {time.perf_counter() - bench.started:.1f} s", flush=True)
    if options.build is not None:
        return 0
    bench.best = ceilings()
    print(told(bench.best), flush=True)
    try:
        bench.kernels()
        bench.peers()
    finally:
        bench.write()
        bench.summary()
    return 0


if __name__ == "__main__":
    sys.exit(main())
