"""Whole layer stacks on a GPU: time of a decode step and of a prefill chunk, from an artifact without weights.

    python benchmarks/layers.py build/flash4.atom [--context 4096] [--requests 1 16 64] [--tokens 1024 4096 8192]

The artifact is compiled anywhere (`atomc compile MODEL --target h100 --no-weights`); random weights in its layouts are
made on the device. A decode step is timed as it is served: fields of the batch copied, graph replayed, logits left on
the device; a prefill chunk as launches. Medians; the roofline is the longer of the bytes that a step must touch over
the copy rate of the same run, and the operations over the matrix rates of their formats. `--compare` times decode steps
alone, with and without side streams and dependent launches, and holds the bits of their logits against one another.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from stack_roofline import operations
from stack_timing import Row, attempt, replayed, stepped
from timing import ceilings, told
from torch import Tensor

from atomc.artifact.expr import evaluate
from atomc.artifact.plan import SlotInfo
from atomc.artifact.store import read_manifest
from atomc.models.deepseek_v4.config import DeepseekV4Config, load_config
from atomc.ops import Batch
from atomc.runtime.executor import Executor, PoolSizes
from atomc.runtime.loader import LoadedArtifact, read_plan


def random_weight(name: str, slot: SlotInfo, experts: int) -> Tensor:
    """Random values of a weight as it is stored: codes without NaN, scales near the weights of a release."""
    shape = [evaluate(n, {}) for n in slot.shape]
    match slot.dtype:
        case "float8_e8m0fnu":
            return torch.randint(113, 119, shape, dtype=torch.uint8, device="cuda").view(torch.float8_e8m0fnu)
        case "int8":
            return torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")
        case "int32":
            return torch.rand(shape[0], experts, device="cuda").topk(shape[1]).indices.int()
        case "float8_e4m3fn":
            made = torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda")
            flat = made.view(-1)
            for at in range(0, flat.numel(), 1 << 26):
                part = flat[at : at + (1 << 26)]
                part.copy_((torch.randn(part.numel(), device="cuda") * 60).clamp(-440, 440))
            return made
    value = torch.randn(shape, device="cuda") * (0.02 if len(shape) > 1 else 0.1)
    return (value + (name.endswith("norm.weight"))).to(getattr(torch, slot.dtype))


def random_artifact(folder: Path) -> LoadedArtifact:
    """The artifact with random weights in place of those it has not."""
    manifest = read_manifest(folder)
    program, regions = read_plan(folder)
    experts = json.loads((folder / "config.json").read_text())["n_routed_experts"]
    weights = {}
    for call in program.calls:
        region = regions[call.region]
        for item in region.inputs:
            if item.role == "weight":
                weights[call.prefix + item.name] = random_weight(item.name, region.slots[item.slot], experts)
    return LoadedArtifact(folder, manifest, program, regions, weights)


class Steps:
    """Batches of an executor, with pages and blocks of their own for each request."""

    def __init__(self, executor: Executor, requests: int) -> None:
        serving = self.serving = executor.serving
        pages, blocks = serving.window_table_width, serving.block_table_width
        order = torch.randperm(executor.num_window_pages - 1) + 1
        self.window = (order[: requests * pages].view(requests, pages)).int()
        order = torch.randperm(executor.num_blocks - 1) + 1
        self.blocks = order[: requests * blocks].view(requests, blocks).int()

    def batch(self, requests: int, start: int, length: int) -> Batch:
        """`length` tokens of each request from position `start`."""
        positions = torch.arange(start, start + length).repeat(requests)
        ends = [
            torch.nonzero((positions + 1) % ratio == 0).flatten() if ratio else torch.empty(0)
            for ratio in (self.serving.csa_ratio, self.serving.hca_ratio)
        ]
        ends = [e if len(e) else torch.tensor([-1]) for e in ends]
        query = torch.arange(requests + 1) * length
        fields = (
            torch.randint(0, self.serving.vocab_size, positions.shape), positions,
            torch.arange(requests).repeat_interleave(length), query, torch.arange(requests), self.window[:requests],
            self.blocks[:requests], *ends, query[1:] - 1,
        )  # fmt: skip
        return Batch(*(f.int().contiguous() for f in fields))


def touched(artifact: LoadedArtifact, config: DeepseekV4Config, tokens: int) -> float:
    """Bytes of weights that a step of `tokens` tokens reads: of experts, those expected under uniform routing."""
    total = 0.0
    count, chosen = config.n_routed_experts, config.num_experts_per_tok
    hit = count * (1 - (1 - chosen / count) ** tokens)
    for call in artifact.program.calls:
        region = artifact.regions[call.region]
        for item in region.inputs:
            if item.role != "weight":
                continue
            slot = region.slots[item.slot]
            size = float(torch.empty(0, dtype=getattr(torch, slot.dtype)).element_size())
            for n in slot.shape:
                size *= evaluate(n, {})
            if item.name.startswith("ffn.experts."):
                size *= hit / count
            elif item.name.startswith("embed") or "tid2eid" in item.name:
                size *= min(tokens / evaluate(slot.shape[0], {}), 1)
            total += size
    return total


def state_bytes(artifact: LoadedArtifact, config: DeepseekV4Config, requests: int, context: int) -> float:
    """Bytes of state that a decode step reads: window rows, all index rows, the selected compressed rows."""
    serving, total = artifact.manifest.serving, 0.0
    for tensors in artifact.program.states.values():
        by_name = {t.name: t for t in tensors}
        for name, tensor in by_name.items():
            size = float(torch.empty(0, dtype=getattr(torch, tensor.dtype)).element_size())
            for n in tensor.shape:
                size *= n
            if tensor.pool == "window_pages":
                total += requests * size * min(context, config.sliding_window) / serving.window_page
            elif tensor.pool == "blocks":
                share = 1.0
                if name == "rows" and "index_rows" in by_name:
                    share = min(1.0, config.index_topk / max(context / 4, 1))
                total += requests * size * share * context / serving.block_tokens
    return total


def pools_of(artifact: LoadedArtifact, requests: list[int]) -> PoolSizes:
    """For the most of these requests, each with all that it may have."""
    serving, most = artifact.manifest.serving, max([*requests, 1])
    return PoolSizes(most * serving.window_table_width + 1, most * serving.block_table_width + 1, most)


def rows(options: argparse.Namespace, profile: Path | None = None) -> Iterator[Row]:
    """Measure decode steps and prefill chunks of `options.artifact`, with what each must touch and compute."""
    artifact = random_artifact(options.artifact)
    serving, config = artifact.manifest.serving, load_config(options.artifact)
    start = time.perf_counter()
    executor = Executor(artifact, pools_of(artifact, options.requests))
    torch.cuda.synchronize()
    print(f"bound, rehearsed and captured in {time.perf_counter() - start:.2f} s", flush=True)
    steps = Steps(executor, max([*options.requests, 1]))
    for requests in options.requests:
        batch = steps.batch(requests, options.context - 1, 1)
        row = Row("atomc", "decode", requests=requests, context=options.context)
        row.bytes = touched(artifact, config, requests) + state_bytes(artifact, config, requests, options.context)
        row.flops = operations(config, requests, 1, options.context)
        row = attempt(row, partial(executor.step, batch), options.repeat, "cuda")
        if executor.graphs is not None and row.reason is None:
            row.replay_s = replayed(partial(executor.graphs.replay, requests))
        yield row
    for tokens in (t for t in options.tokens if t <= serving.max_batch_tokens):
        batch = steps.batch(1, 0, tokens)
        row = Row("atomc", "prefill", tokens=tokens, chunks=1)
        row.bytes, row.flops = touched(artifact, config, tokens), operations(config, 1, tokens, tokens)
        yield attempt(row, partial(executor.step, batch), max(options.repeat // 4, 3), "cuda")
    if made := compilers():
        raise SystemExit(f"a step compiled something: {made} were imported")
    if profile is not None:
        profiles(executor, steps, options)


def compilers() -> list[str]:
    """Compilers that this process has imported: none may be, after any number of steps."""
    return [
        name for name in ("triton", "torch._inductor.compile_fx", "torch._dynamo.eval_frame") if name in sys.modules
    ]


def main() -> int:
    """Measure, print, write when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 4096, 8192])
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--profile", type=Path, help="folder for tables and traces of kernels")
    parser.add_argument("--compare", action="store_true", help="decode with and without overlap of launches")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.compare:
        return compare(options)
    best, found = ceilings(), []
    print(told(best), flush=True)
    for row in rows(options, options.profile):
        row.compare(best)
        found.append(row.known())
        print(row.known(), flush=True)
    if options.out is not None:
        written(options, best, found)
    return 0


def written(options: argparse.Namespace, best: dict[str, float], found: list[dict[str, Any]]) -> None:
    """Write rows with what they are of."""
    config = load_config(options.artifact)
    facts = {
        "command": " ".join(sys.argv), "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "compilers imported": compilers(), "ceilings": best, "artifact": options.artifact.stem,
        "layers": list(config.compress_ratios), "rows": found,
    }  # fmt: skip
    options.out.write_text(json.dumps(facts, indent=1) + "\n")


WAYS = {
    "one after the other": {"side_streams": False, "dependent_launches": False},
    "side streams": {"side_streams": True, "dependent_launches": False},
    "dependent launches": {"side_streams": False, "dependent_launches": True},
    "both": {"side_streams": True, "dependent_launches": True},
}


def compare(options: argparse.Namespace) -> int:
    """Decode steps in each of `WAYS`. Returns 1 if their logits differ in a bit."""
    artifact = random_artifact(options.artifact)
    pools = pools_of(artifact, options.requests)
    best = ceilings()
    print(told(best), flush=True)
    expected: dict[int, Tensor] = {}
    different, found = 0, []
    for way, flags in WAYS.items():
        start = time.perf_counter()
        executor = Executor(artifact, pools, **flags)
        torch.cuda.synchronize()
        print(f"{way}: bound, rehearsed and captured in {time.perf_counter() - start:.2f} s")
        torch.manual_seed(0)
        steps = Steps(executor, max([*options.requests, 1]))
        for requests in options.requests:
            bits = decoded(executor, steps, requests)
            same = int((bits == expected.setdefault(requests, bits)).sum())
            different += bits.numel() - same
            batch = steps.batch(requests, options.context - 1, 1)
            row = {"way": way, "requests": requests, "context": options.context}
            row |= stepped(partial(executor.step, batch), options.repeat)
            if executor.graphs is not None:
                row["replay_s"] = replayed(partial(executor.graphs.replay, requests))
            found.append(row | {"same_logits": f"{same} of {bits.numel()}"})
            print(found[-1], flush=True)
        del executor
        gc.collect()
        torch.cuda.empty_cache()
    print("all logits agree to the bit" if not different else f"{different} rows of logits DIFFER")
    if options.out is not None:
        written(options, best, found)
    return int(different > 0)


def decoded(executor: Executor, steps: Steps, requests: int, count: int = 32) -> Tensor:
    """The bits of each request's logits [count, requests], summed, of decode steps after a prefill."""
    length = min(512, executor.serving.max_batch_tokens // requests)
    executor.step(steps.batch(requests, 0, length))
    found = []
    for at in range(count):
        logits = executor.step(steps.batch(requests, length + at, 1))
        if not logits.isfinite().all():
            raise SystemExit(
                f"logits of {requests} requests are not finite at token {length + at}: they compare nothing"
            )
        found.append(logits.view(torch.int32).sum(1))
    return torch.stack(found)


def profiles(executor: Executor, steps: Steps, options: argparse.Namespace) -> None:
    """Of one step each: a table of its kernels by time, and the trace for a viewer, with streams."""
    from torch.profiler import ProfilerActivity, profile

    cases = [(f"decode {n}", steps.batch(n, options.context - 1, 1)) for n in options.requests]
    cases += [(f"prefill {t}", steps.batch(1, 0, t)) for t in options.tokens]
    for name, batch in cases:
        executor.step(batch)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            executor.step(batch)
            torch.cuda.synchronize()
        table = seen.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=60)
        (options.profile / f"{name.replace(' ', '_')}.txt").write_text(table)
        seen.export_chrome_trace(str(options.profile / f"{name.replace(' ', '_')}.trace.json.gz"))


if __name__ == "__main__":
    sys.exit(main())
