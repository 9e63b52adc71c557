"""Generation speed of an artifact on this machine: one request, and several at once.

    python benchmarks/generate.py build/nano.atom [--tokens 128] [--threads 2] [--out benchmarks/results/generate.json]

Greedy decoding of fixed prompts, end of sequence ignored, so that every run does the same work. Each case runs
`--repeat` times after one warm-up; the median counts. The last lines say where the time of one decode step goes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does, before torch is imported

import torch
from machine import machine

import atomc
from atomc.runtime.llm import LLM
from atomc.runtime.request import SamplingParams

PROMPT = "def read_config(path):\n    "


def tokens_per_second(llm: LLM, requests: int, tokens: int, repeat: int) -> dict[str, float]:
    """Median tokens per second over all requests, prefill included."""
    prompts = [f"# file {i}\n{PROMPT}" for i in range(requests)]
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    seconds = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        answers = llm.generate(prompts, params)
        seconds.append(time.perf_counter() - start)
        assert all(len(a.token_ids) == tokens for a in answers)
    median = statistics.median(seconds[1:])
    return {"requests": requests, "tokens_per_s": requests * tokens / median, "ms_per_step": 1e3 * median / tokens}


def operators(llm: LLM, tokens: int) -> list[tuple[str, float]]:
    """Share of each torch operator's own time in decoding one request, largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tokens_per_second(llm, 1, tokens, 1)
    rows = [(row.key, row.self_cpu_time_total) for row in profile.key_averages()]
    total = sum(spent for _, spent in rows)
    return sorted(((key, spent / total) for key, spent in rows), key=lambda row: -row[1])[:8]


def main() -> None:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    llm = atomc.load(options.artifact)
    cases = [tokens_per_second(llm, n, options.tokens, options.repeat) for n in (1, 4, 8, 16)]
    for case in cases:
        gain = case["tokens_per_s"] / cases[0]["tokens_per_s"]
        speed, step = case["tokens_per_s"], case["ms_per_step"]
        print(f"{case['requests']:3.0f} requests  {speed:8.1f} tokens/s  {step:6.2f} ms/step  {gain:4.2f}×")
    shares = operators(llm, 32)
    print("time of one-request decoding by operator:", ", ".join(f"{key} {share:.0%}" for key, share in shares))
    if options.out is not None:
        flags = f"--tokens {options.tokens} --threads {options.threads}"
        command = f"python benchmarks/generate.py {options.artifact} {flags}"
        result = {"command": command, "machine": machine(), "cases": cases, "operators": shares}
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
