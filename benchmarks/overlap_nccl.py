"""Collectives of NCCL under the products of V4-Flash on two or more GPUs of one node: what is hidden, and its price.

    python benchmarks/overlap_nccl.py [--ranks 2] [--tokens 4096 8192] [--layers 6] [--seconds 120] [--out FILE.json]
                                      [--ctas N] [--low-priority]

It starts its own processes, one for each GPU, and ends them when the seconds are over; what was found until then stays.
Nothing here is the model: the products have the sizes of a rank's layer under dp=RANKS,moe=tp (bfloat16), weights and
activations are random, and the messages have the bytes that the compiled layer sends.

For each number of tokens a rank:
    alone        seconds of all-gather and reduce-scatter (float32, and bfloat16 sums), of the whole message and of
                 half, with bytes that a rank sends over them; seconds of a layer's compute before and after its gather
    contention   what products and copies take while collectives run without a pause, over what they take alone, and
                 the other way round
    layers       a chain of layers: compute alone; whole, each collective waited for (TBO off); in two micro-batches,
                 waited for, and in the order of `atomc.passes.overlap` for the seconds measured (TBO on), predicted and
                 measured; hidden = 1 - (scheduled - compute alone) / collectives alone
    captured     the same scheduled chain in one CUDA graph

`--ctas`: workgroups of each collective; by default the library's choice. Collectives run on a stream of high priority.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timing import captured

from atomc.parallel.tasks import Schedule, Stream, Task, TaskGraph, simulate
from atomc.passes.overlap import overlap
from atomc.targets import Target, get_target

D, Q, HEADS, HEAD, GROUPS, RANK = 4096, 1024, 64, 512, 8, 1024
EXPERTS, CHOSEN, INNER, SEEN = 256, 6, 2048, 640  # SEEN: rows that a token's attention reads
STACKS = 32  # experts' products as so many larger ones: the same FLOPs, fewer weights to keep
BF16, F32 = torch.bfloat16, torch.float32


class Layer:
    """A rank's work in one layer for so many tokens of its own: `attention`, then `experts` on the tokens of all."""

    def __init__(self, tokens: int, ranks: int, weights: dict[str, torch.Tensor]) -> None:
        self.tokens, self.ranks, self.w = tokens, ranks, weights
        self.x, self.y = _random(tokens, D), _random(tokens, D)
        self.message = torch.zeros(tokens, D + D // 128 + 8 * CHOSEN, dtype=torch.uint8, device="cuda")
        self.gathered = self.message.new_empty((tokens * ranks, self.message.shape[1]))
        pairs = tokens * ranks * CHOSEN // STACKS
        self.rows = _random(STACKS, pairs, D)
        self.sums = torch.zeros(tokens * ranks, D, dtype=F32, device="cuda")
        self.mine = self.sums.new_empty((tokens, D))

    def attention(self) -> None:
        """Projections, 640 rows of attention for each of 64 heads, output projections (spec 2.2 to 2.4)."""
        x, w = self.x, self.w
        q = (x @ w["wq_a"]) @ w["wq_b"]
        scores = q.view(-1, HEAD) @ w["cache"].t()
        o = (scores @ w["cache"]).view(self.tokens, GROUPS, -1).transpose(0, 1)
        z = torch.bmm(o, w["wo_a"]).transpose(0, 1).reshape(self.tokens, GROUPS * RANK)
        torch.mm(z, w["wo_b"], out=self.y)

    def experts(self) -> None:
        """The rank's columns of the chosen experts, and the sum for each token in float32 (spec 2.8)."""
        a = torch.bmm(self.rows, self.w["w13"])
        half = a.shape[-1] // 2
        out = torch.bmm(torch.nn.functional.silu(a[..., :half]) * a[..., half:], self.w["w2"])
        torch.sum(out.view(self.tokens * self.ranks, CHOSEN, D), dim=1, dtype=F32, out=self.sums)

    def gather(self) -> Any:
        return dist.all_gather_into_tensor(self.gathered, self.message, async_op=True)

    def scatter(self) -> Any:
        return dist.reduce_scatter_tensor(self.mine, self.sums, async_op=True)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=BF16, device="cuda") * 0.02


def weights(ranks: int) -> dict[str, torch.Tensor]:
    """Of one layer of a rank, the experts' columns cut."""
    width = INNER // ranks
    return {
        "wq_a": _random(D, Q), "wq_b": _random(Q, HEADS * HEAD), "cache": _random(SEEN, HEAD),
        "wo_a": _random(GROUPS, HEADS * HEAD // GROUPS, RANK), "wo_b": _random(GROUPS * RANK, D),
        "w13": _random(STACKS, D, 2 * width), "w2": _random(STACKS, width, D),
    }  # fmt: skip


# -- measuring ---------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any], first: Callable[[], Any] | None = None, repeat: int = 5, warm: int = 2) -> float:
    """Median seconds on the device of the slowest rank; all ranks begin together.

    `first` is issued before and not timed; it may still run, on another stream.
    """
    found = []
    for turn in range(warm + repeat):
        torch.cuda.synchronize()
        dist.barrier()
        if first is not None:
            first()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        if turn >= warm:
            found.append(start.elapsed_time(end) / 1e3)
    torch.cuda.synchronize()
    slowest = torch.tensor(statistics.median(found), device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def waited(work: Callable[[], Any], times: int = 10) -> Callable[[], None]:
    """So many collectives, one after the other, the last waited for."""

    def run() -> None:
        for _ in range(times):
            handle = work()
        handle.wait()

    return run


def several(work: Callable[[], Any], times: int) -> Callable[[], None]:
    """The same work so many times."""

    def run() -> None:
        for _ in range(times):
            work()

    return run


def alone(ranks: int, layer: Layer) -> dict[str, Any]:
    """Collectives and compute, each by itself."""
    found: dict[str, Any] = {}
    bf16_sums, bf16_mine = layer.sums.to(BF16), layer.mine.to(BF16)
    cases = {
        "all_gather": (layer.gather, layer.message.nbytes * (ranks - 1)),
        "reduce_scatter": (layer.scatter, layer.mine.nbytes * (ranks - 1)),
        "reduce_scatter_bf16": (
            lambda: dist.reduce_scatter_tensor(bf16_mine, bf16_sums, async_op=True), bf16_mine.nbytes * (ranks - 1),
        ),
    }  # fmt: skip
    for name, (work, sent) in cases.items():
        spent = seconds(waited(work)) / 10
        found[name] = {"seconds": spent, "sent_bytes": sent, "gb_per_s": sent / spent / 1e9}
    small = torch.zeros(256, device="cuda")
    found["least_all_reduce_seconds"] = seconds(waited(lambda: dist.all_reduce(small, async_op=True))) / 10
    found["attention"] = seconds(several(layer.attention, 3)) / 3
    found["experts"] = seconds(several(layer.experts, 3)) / 3
    return found


def contention(layer: Layer, found: dict[str, Any]) -> dict[str, Any]:
    """Shares of their speed that compute and collectives keep while the other runs without a pause."""
    source = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    computes = {"attention": layer.attention, "experts": layer.experts, "copy": lambda: target.copy_(source)}
    other = torch.cuda.Stream()
    shares: dict[str, Any] = {}
    for name, compute in computes.items():
        one = seconds(several(compute, 5)) / 5
        for collective, start in (("all_gather", layer.gather), ("reduce_scatter", layer.scatter)):
            each = found[collective]["seconds"]
            sends = several(start, 4 + math.ceil(10 * one / each))  # longer than five computes beside them
            shares[f"{name} beside {collective}"] = one / (seconds(several(compute, 5), sends) / 5)
            busy = several(compute, 2 + math.ceil(16 * each / one))  # longer than eight collectives beside them
            shares[f"{collective} beside {name}"] = each / (seconds(waited(start, 8), on(other, busy)) / 8)
    return shares


def on(stream: torch.cuda.Stream, work: Callable[[], None]) -> Callable[[], None]:
    """Work that is issued to another stream."""

    def run() -> None:
        with torch.cuda.stream(stream):
            work()

    return run


# -- a chain of layers -------------------------------------------------------------------------------------------------


def chain(layers: int, halves: int, spent: dict[str, float], target: Target | None = None) -> TaskGraph:
    """Layers of attention, all-gather, experts, reduce-scatter, for one or two micro-batches.

    Args:
        spent: seconds of each, of short runs. target: whose facts say what both streams take from one another, and of
            the power; None: nothing.
    """
    tasks: list[Task] = []

    def add(what: str, at: str, reads: tuple[str, ...], writes: tuple[str, ...]) -> None:
        stream: Stream = "compute" if what in ("attention", "experts") else "collective"
        beside, power = 1.0, 0.0
        if target is not None and stream == "compute":
            beside, power = 1 - target.link.units, target.sustained.burst * spent[what]
        elif target is not None:
            beside, power = target.link.kept, target.link.power * spent[what]
        tasks.append(Task(f"{what} {at}", stream, spent[what], reads, writes, beside=beside, power=power))

    for layer in range(layers):
        for half in range(halves):
            at, cache = f"{layer}.{half}", f"cache{layer}"
            add("attention", at, (f"x{at}", cache), (f"h{at}", cache))
            add("gather", at, (f"h{at}",), (f"g{at}",))
            add("experts", at, (f"g{at}",), (f"p{at}",))
            add("scatter", at, (f"p{at}",), (f"x{layer + 1}.{half}",))
    return TaskGraph(tuple(tasks))


def runner(schedule: Schedule, parts: list[Layer], *, computes: bool = True, sends: bool = True) -> Callable[[], None]:
    """Issues a schedule: compute to the current stream, collectives to the group's own."""
    work = {
        "attention": Layer.attention, "experts": Layer.experts, "gather": Layer.gather, "scatter": Layer.scatter,
    }  # fmt: skip

    def run() -> None:
        handles: dict[str, Any] = {}
        for action, name in schedule.issues:
            what, _, at = name.partition(" ")
            part = parts[int(at.split(".")[1])]
            if action == "run" and computes:
                work[what](part)
            elif action == "start" and sends:
                handles[name] = work[what](part)
            elif action == "wait" and sends:
                handles.pop(name).wait()

    return run


def chained(tokens: int, ranks: int, layers: int, w: dict[str, torch.Tensor]) -> tuple[dict[str, Any], Any]:
    """TBO off and on, predicted and measured; and what runs it."""
    whole, halves = [Layer(tokens, ranks, w)], [Layer(tokens // 2, ranks, w) for _ in range(2)]
    spent: dict[str, dict[str, float]] = {}
    for name, part in (("whole", whole[0]), ("half", halves[0])):
        computes = {
            what: seconds(several(work, 3)) / 3
            for what, work in (("attention", part.attention), ("experts", part.experts))
        }
        sends = {
            what: seconds(waited(work)) / 10 for what, work in (("gather", part.gather), ("scatter", part.scatter))
        }
        spent[name] = computes | sends
    whole_plan, plan = overlap(chain(layers, 1, spent["whole"])), overlap(chain(layers, 2, spent["half"]))
    waiting = simulate(plan.graph, plan.graph.in_order())
    found: dict[str, Any] = {
        "predicted_off": whole_plan.seconds, "predicted_on": plan.seconds,
        "predicted_speedup": whole_plan.seconds / plan.seconds, "predicted_hidden": plan.hidden / plan.communication,
        "off": seconds(runner(whole_plan, whole)), "halves_waited_for": seconds(runner(waiting, halves)),
        "on": seconds(runner(plan, halves)), "compute": seconds(runner(plan, halves, sends=False)),
        "collectives": seconds(runner(plan, halves, computes=False)), "parts": spent,
    }  # fmt: skip
    found["hidden"] = 1 - (found["on"] - found["compute"]) / found["collectives"]
    found["speedup"] = found["off"] / found["on"]
    return found, runner(plan, halves)


def with_contention(spent: dict[str, dict[str, float]], layers: int, target: Target) -> dict[str, float]:
    """The chains whole and scheduled, predicted with what the target's facts say of contention and power."""
    whole, plan = (overlap(chain(layers, n, spent[name])) for n, name in ((1, "whole"), (2, "half")))
    off = simulate(chain(layers, 1, spent["whole"], target), whole.issues).seconds
    on = simulate(chain(layers, 2, spent["half"], target), plan.issues).seconds
    return {"off": off, "on": on, "speedup": off / on}


# -- processes ---------------------------------------------------------------------------------------------------------


def measure(rank: int, ranks: int, args: argparse.Namespace, folder: str) -> None:
    """One rank; rank 0 prints, and writes the file after every part."""
    torch.cuda.set_device(rank)
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=not args.low_priority)
    if args.ctas:
        options.config.min_ctas = options.config.max_ctas = args.ctas
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, pg_options=options,
        device_id=torch.device("cuda", rank),
    )  # fmt: skip
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "ranks": ranks,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())), "tokens": {},
    }  # fmt: skip
    w, began = weights(ranks), time.monotonic()

    def note(text: str) -> None:
        if rank == 0:
            print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)
            if args.out:
                args.out.write_text(json.dumps(found, indent=1) + "\n")

    note(f"{ranks} x {found['device']}, torch {found['torch']}, nccl {found['nccl']}")
    runs: dict[int, Any] = {}
    for tokens in args.tokens:
        mine = found["tokens"][str(tokens)] = {}
        mine["alone"] = alone(ranks, Layer(tokens, ranks, w))
        note(f"{tokens} tokens alone: " + _text(mine["alone"]))
        mine["layers"], runs[tokens] = chained(tokens, ranks, args.layers, w)
        note(f"{tokens} tokens, {args.layers} layers: " + _text(mine["layers"]))
    for tokens in args.tokens:
        mine = found["tokens"][str(tokens)]
        mine["contention"] = contention(Layer(tokens, ranks, w), mine["alone"])
        mine["predicted_with_contention"] = with_contention(mine["layers"]["parts"], args.layers, get_target("h100"))
        note(f"{tokens} tokens, share of speed kept: " + _text(mine["contention"]))
        note(f"{tokens} tokens, predicted with the target's: " + _text(mine["predicted_with_contention"]))
    for tokens, run in runs.items():  # last: what a library cannot capture may end the process
        found["tokens"][str(tokens)]["captured_on"] = seconds(
            captured(run, "thread_local").replay
        )  # NCCL's own thread calls the driver
        note(f"{tokens} tokens, captured in one graph: {found['tokens'][str(tokens)]['captured_on'] * 1e3:.3f} ms")
    note("done")
    dist.destroy_process_group()


def _text(found: dict[str, Any]) -> str:
    words = []
    for name, value in found.items():
        if isinstance(value, dict) and "gb_per_s" in value:
            words.append(f"{name} {value['seconds'] * 1e6:.0f} us ({value['gb_per_s']:.0f} GB/s)")
        elif isinstance(value, float):
            ratio = any(word in name for word in ("hidden", "speedup", "beside"))
            words.append(f"{name} {value:.3f}" if ratio else f"{name} {value * 1e3:.3f} ms")
    return ", ".join(words)


def _main_of(rank: int, ranks: int, args: argparse.Namespace, folder: str) -> None:
    done = False
    try:
        measure(rank, ranks, args, folder)
        done = True
    finally:
        if not done:  # the others would wait for it in a collective, and the library for them
            traceback.print_exc()
            os._exit(1)


def main() -> int:
    """Start a process for each rank, wait so many seconds at most, end what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--ctas", type=int, help="workgroups of each collective")
    parser.add_argument("--low-priority", action="store_true", help="collectives on a stream as any other")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if torch.cuda.device_count() < args.ranks:
        print(f"{args.ranks} ranks need as many GPUs; here are {torch.cuda.device_count()}.")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        ranks = [context.Process(target=_main_of, args=(r, args.ranks, args, folder)) for r in range(args.ranks)]
        for process in ranks:
            process.start()
        end = time.monotonic() + args.seconds
        while any(p.is_alive() for p in ranks) and time.monotonic() < end and not any(p.exitcode for p in ranks):
            time.sleep(0.2)
        late = [process for process in ranks if process.is_alive()]
        if late:
            print(f"ended after {args.seconds:.0f} s, or because another rank failed: {len(late)} ranks", flush=True)
        for process in late:
            process.kill()
        for process in ranks:
            process.join()
    return int(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    raise SystemExit(main())
