"""Tune kernels on a GPU: every candidate of a configuration is compiled, checked and timed, the best one written.

    python -m benchmarks.tune [--models deepseek-v4-flash deepseek-v4-pro] [--kernels gemm experts] [--minutes 5]

Writes `codegen/tuned/TARGET.json`, which the compiler reads (`atomc.codegen.tuning`); entries of problems that were not
measured again stay. Times are medians of graph replays over inputs that rotate past the L2 cache. A candidate must give
what the static model's configuration gives, within the rounding of its result. Candidates compile in processes first:
Triton's cache on disk is what they share.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import msgspec
import torch
import triton
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from atomc.codegen.device import Device, Recorder, Variant
from atomc.codegen.kernels import gemm, scaled_gemm
from atomc.codegen.kernels.gemm import Tiles
from atomc.codegen.tuning import FOLDER, Entry, Table, trial
from atomc.formats import FP8_ACTIVATION, FP8_TILE
from atomc.targets import Target, get_target
from benchmarks import tune_experts
from benchmarks.kernel_device import BuiltDevice, build
from benchmarks.kernel_inputs import Inputs
from benchmarks.timing import copies, replayed
from benchmarks.tune_problem import SAMPLE, Configuration, JitDevice, Problem, table_of

BUCKETS = (16, 64, 256, 1024, 8192)


@dataclass(frozen=True)
class Product:
    """A product with the constants of one weight, in one bucket."""

    kernel: str
    n: int
    k: int
    itemsize: int
    groups: int
    tokens: int

    @property
    def key(self) -> dict[str, int | str]:
        """As `codegen.tuning` looks it up."""
        operands = ("bf16", "fp32" if self.itemsize == 4 else "bf16")
        x, w = (str(FP8_ACTIVATION), str(FP8_TILE)) if self.kernel == "scaled_gemm" else operands
        return {"n": self.n, "k": self.k, "groups": self.groups, "x": x, "w": w}

    def calls(self, device: Device, sets: int, place: str = "cuda") -> list[Callable[[], Tensor]]:
        """The host function on `sets` sets of random inputs."""
        m, made = SAMPLE[self.tokens], []
        for _ in range(sets):
            if self.kernel == "scaled_gemm":
                shape = (m, self.groups, self.k) if self.groups > 1 else (m, self.k)
                at = Inputs(place)
                x, w = at.codes(shape, FP8_ACTIVATION), at.codes((self.groups * self.n, self.k), FP8_TILE)
                host = scaled_gemm.scaled_grouped_output if self.groups > 1 else scaled_gemm.scaled_linear
                given = (*x, *w, str(FP8_ACTIVATION), str(FP8_TILE), torch.bfloat16)
                made.append(lambda given=given, host=host: host(device, *given))
            else:
                dtype = torch.float32 if self.itemsize == 4 else torch.bfloat16
                a = torch.randn(m, self.k, device=place, dtype=torch.bfloat16)
                b = torch.randn(self.n, self.k, device=place, dtype=dtype)
                made.append(lambda a=a, b=b: gemm.linear_fp32(device, a, b))
        return made

    @property
    def bytes(self) -> float:
        """Of one set of inputs and its result."""
        m = SAMPLE[self.tokens]
        return self.groups * (m * self.k + self.n * self.k * self.itemsize) + 2.0 * m * self.groups * self.n

    @property
    def flops(self) -> float:
        """Of one call."""
        return 2.0 * SAMPLE[self.tokens] * self.groups * self.n * self.k

    def agrees(self, given: Tensor, expected: Tensor) -> bool:
        """Within what the result is rounded to."""
        return torch.allclose(given, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().mean()))

    def candidates(self, device: Device) -> list[Configuration]:
        """Configurations worth trying, the static model's first."""
        return list(candidates(device, self))


def problems(models: list[str], kernels: list[str]) -> Iterator[Problem]:
    """What is tuned of the models, for every bucket."""
    if tune_experts.KERNEL in kernels:
        yield from tune_experts.problems(models)
    yield from products(models, [kernel for kernel in kernels if kernel in ("scaled_gemm", "gemm")])


def products(models: list[str], kernels: list[str]) -> Iterator[Product]:
    """The products of the models, for every bucket."""
    shapes = {
        "deepseek-v4-flash": {
            "scaled_gemm": [(1536, 4096, 1), (32768, 1024, 1), (8192, 1024, 1), (1024, 4096, 8), (4096, 8192, 1),
                            (4096, 4096, 1), (4096, 2048, 1)],
            "gemm": [(n, 4096, 2) for n in (129280, 256, 64, 512, 1024, 2048)],
        },
        "deepseek-v4-pro": {
            "scaled_gemm": [(2048, 7168, 1), (65536, 1536, 1), (8192, 1536, 1), (1024, 4096, 16), (7168, 16384, 1),
                            (6144, 7168, 1), (7168, 3072, 1)],
            "gemm": [(n, 7168, 2) for n in (129280, 384, 64, 512, 1024, 2048)],
        },
    }  # fmt: skip
    for model in models:
        for kernel in kernels:
            for n, k, last in shapes[model][kernel]:
                itemsize, groups = (1, last) if kernel == "scaled_gemm" else (last, 1)
                for tokens in BUCKETS:
                    if not (kernel == "scaled_gemm" and groups == 1 and tokens > 64):  # cuBLASLt does these
                        yield Product(kernel, n, k, itemsize, groups, tokens)


def candidates(device: Device, problem: Product) -> list[Tiles]:
    """Tiles worth trying, the static model's first."""
    base = gemm.static(device, problem.n, problem.k, problem.itemsize, problem.groups)
    found = [base]
    if problem.tokens <= 64:
        shapes = [(base.first, base.tokens, rows) for rows in (64, 128)]
        depths = (128,) if problem.kernel == "scaled_gemm" else (64, 128)
        wanted, pipelines = (0, 1, 2, 4), {64: ((4, 4), (4, 6)), 128: ((4, 4), (8, 4))}
    else:
        shapes = [(False, 128, 128), (False, 64, 128), (True, 128, 64), (True, 64, 64), (False, 64, 64)]
        depths = (128 // problem.itemsize,)
        pipelines = {64: ((4, 3), (4, 4)), 128: ((8, 3), (8, 4))}
        wanted = (0, 1, 2) if problem.tokens <= 1024 else (0,)
    for first, tokens, rows in shapes:
        programs = problem.groups * -(-problem.tokens // tokens) * -(-problem.n // rows)
        for depth in depths:
            for units in wanted:
                most = max(units * device.target.compute_units, 1)
                splits = gemm.splits_of(programs, -(-problem.k // depth), most, 32)
                for warps, stages in pipelines[rows]:
                    found.append(Tiles(first, tokens, rows, depth, splits, warps, stages))
    return list(dict.fromkeys(found))


def compile_one(problem: Problem, config: dict[str, int | bool]) -> str:
    """Compile a candidate, in a process of its own; why it does not compile, or nothing."""
    device = JitDevice(get_target(target_name()), problem.tokens, "cuda")
    try:
        with trial(problem.kernel, config):
            problem.calls(device, 1)[0]()
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  too large for the GPU, or a compiler's limit: not a candidate
        return f"{type(error).__name__}: {str(error)[:100]}"
    return ""


def target_name() -> str:
    """The target that is this machine's GPU."""
    return "h200" if "H200" in torch.cuda.get_device_name() else "h100"


def best_of(problem: Problem, found: list[Configuration], device: Device) -> tuple[Entry | None, str]:
    """The fastest candidate that gives the static model's result, and a line on it."""
    calls = problem.calls(device, copies(problem.bytes) if problem.tokens <= 1024 else 2)
    times: list[tuple[float, Configuration]] = []
    expected: Tensor | None = None
    for tried in found:
        with trial(problem.kernel, table_of(tried)):
            try:
                given = calls[0]().float()
                if expected is None:
                    expected = given
                elif not problem.agrees(given, expected):
                    raise SystemExit(f"{problem}: {tried} gives another result than the static model's configuration")
                times.append((replayed(calls, 5), tried))
            except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
                if tried == found[0]:
                    return None, f"the static model's configuration fails: {error}"
    static = next(s for s, tried in times if tried == found[0])
    seconds, best = min(times, key=lambda t: t[0])
    by = device.triton if isinstance(device, BuiltDevice) else ""
    entry = Entry(problem.kernel, problem.key, problem.tokens, table_of(best), seconds, static, by)
    rate, flops = problem.bytes / seconds / 1e12, problem.flops / seconds / 1e12
    line = f"{static * 1e6:8.1f} -> {seconds * 1e6:8.1f} us, {rate:.2f} TB/s, {flops:.0f} TFLOP/s"
    return entry, f"{line}  {asdict(best)}"


def main() -> int:
    """Compile, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["deepseek-v4-flash", "deepseek-v4-pro"])
    parser.add_argument("--kernels", nargs="*", default=["scaled_gemm", "gemm", tune_experts.KERNEL])
    parser.add_argument("--tokens", nargs="*", type=int, default=list(BUCKETS))
    parser.add_argument("--minutes", type=float, default=8.0, help="start no problem after so long")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--target", default=None, help="of --build; else the GPU that is here")
    parser.add_argument("--build", type=Path, default=None, metavar="FOLDER", help="compile the candidates, and end")
    parser.add_argument("--built", type=Path, default=None, metavar="FOLDER", help="time what --build compiled")
    options = parser.parse_args()
    start, name = time.monotonic(), options.target or target_name()
    out = options.out or FOLDER / f"{name}.json"
    console = Console(force_terminal=False)
    target = get_target(name)
    wanted = [p for p in problems(options.models, options.kernels) if p.tokens in options.tokens]
    trials = {p: p.candidates(Recorder(target, p.tokens)) for p in wanted}
    console.print(f"{name}: {len(wanted)} problems, {sum(map(len, trials.values()))} candidates")
    if options.build:
        build(options.build, variants_of(trials, target), target)
        return 0
    if not options.built:
        trials = compiled(trials, console, start + options.minutes * 60)
        console.print(f"compiled in {time.monotonic() - start:.0f} s")
    entries = []
    for problem, found in trials.items():
        if time.monotonic() - start > options.minutes * 60:
            console.print(f"out of time before {problem}")
            break
        device: Device = BuiltDevice(options.built, target) if options.built else JitDevice(target, 0, "cuda")
        device.tokens = problem.tokens
        entry, line = best_of(problem, found, device)
        console.print(f"{problem.kernel} {problem.key} {problem.tokens}: {line}", soft_wrap=True)
        entries += [entry] if entry is not None else []
    write(out, name, entries)
    return 0


def variants_of(trials: dict[Problem, list[Configuration]], target: Target) -> list[Variant]:
    """What all candidates launch."""
    found: dict[Variant, None] = {}
    for problem, configurations in trials.items():
        for tried in configurations:
            device = Recorder(target, problem.tokens)
            with trial(problem.kernel, table_of(tried)):
                problem.calls(device, 2, "meta")[0]()
            found |= dict.fromkeys(device.variants)
    return list(found)


def compiled(
    trials: dict[Problem, list[Configuration]], console: Console, end: float
) -> dict[Problem, list[Configuration]]:
    """The candidates that compile, in Triton's cache; all others are dropped.

    Raises:
        SystemExit: it took until `end`.
    """
    failed: dict[Problem, set[Configuration]] = {p: set() for p in trials}
    workers = max((os.cpu_count() or 2) - 2, 1)
    with Progress(console=console) as bar, ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(compile_one, p, table_of(t)): (p, t) for p, found in trials.items() for t in found}
        task = bar.add_task("compile", total=len(jobs))
        for job in as_completed(jobs):
            problem, tried = jobs[job]
            if job.result():
                failed[problem].add(tried)
            bar.advance(task)
            if time.monotonic() > end:
                pool.shutdown(cancel_futures=True)
                raise SystemExit("compiling took all the time; give --minutes, or fewer --kernels")
    return {p: [t for t in found if t not in failed[p]] for p, found in trials.items()}


def write(path: Path, name: str, entries: list[Entry]) -> None:
    """Put new entries beside what the file has of other problems."""

    def place(entry: Entry) -> tuple[object, ...]:
        return entry.kernel, tuple(sorted(entry.problem.items())), entry.tokens

    known = msgspec.json.decode(path.read_bytes(), type=Table) if path.exists() else None
    merged = {place(e): e for e in (*(known.entries if known else ()), *entries)}
    commands = [*(known.commands if known else ()), " ".join(["benchmarks/tune.py", *sys.argv[1:]])]
    table = Table(
        name, torch.cuda.get_device_name(), str(torch.__version__), triton.__version__, commands,
        known.note if known else "", [],
    )  # fmt: skip
    head = msgspec.json.encode(table).decode().removesuffix("]}")
    lines = ",\n".join(msgspec.json.encode(merged[key]).decode() for key in sorted(merged))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}\n{lines}\n]}}\n", encoding="utf-8")
    msgspec.json.decode(path.read_bytes(), type=Table)


if __name__ == "__main__":
    sys.exit(main())
