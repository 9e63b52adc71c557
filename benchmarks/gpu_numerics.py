"""Greedy text of an artifact on a GPU against the same model on the cpu: where they part, and how near a tie that was.

    python benchmarks/gpu_numerics.py build/nano-h100.atom build/nano.atom [--prompts 20] [--tokens 200]

For each prompt both artifacts continue greedily. At the first token that differs, the cpu's log-probabilities of the
two candidates say whether it was a near tie: a difference of logits below what the formats leave open. Teacher-forced
log-probabilities of the cpu's own text are compared token by token too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import atomc
from atomc.runtime.llm import Completion
from atomc.runtime.request import SamplingParams

PROMPTS = (
    "def load_config(path):", "import os\n\nclass Reader:", "# Sorts a list of numbers\ndef", "The module provides",
    "for i in range(10):\n", "class Node(object):\n    def __init__(self", "try:\n    import json\nexcept",
    "def main():\n",
    "if __name__ == '__main__':\n", "Returns the number of", "    return self.", "with open(path) as f:\n",
    "from collections import", "def test_", "raise ValueError(", "x = [", "async def fetch(url):",
    "    def __repr__(self):",
    "The following example shows how to", "import numpy as np\n",
)  # fmt: skip


def parted(gpu: Completion, cpu: Completion) -> dict[str, Any]:
    """Where two continuations part, and the cpu's log-probabilities of both tokens there."""
    pairs = enumerate(zip(gpu.token_ids, cpu.token_ids, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), None)
    if at is None:
        return {"same": min(len(gpu.token_ids), len(cpu.token_ids))}
    known = dict(cpu.logprobs[at].top)
    other = known.get(gpu.token_ids[at])
    return {"same": at, "gap": None if other is None else known[cpu.token_ids[at]] - other}


def main() -> int:
    """Compare, print, write when asked; 1 if a difference is no near tie."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpu", type=Path)
    parser.add_argument("cpu", type=Path)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--tie", type=float, default=0.1, help="largest gap of log-probabilities that is a near tie")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    prompts = list((PROMPTS * (-(-options.prompts // len(PROMPTS))))[: options.prompts])
    params = SamplingParams(temperature=0.0, max_tokens=options.tokens, ignore_eos=True, logprobs=5)
    answers, seconds = {}, {}
    for name, path in (("gpu", options.gpu), ("cpu", options.cpu)):
        start = time.perf_counter()
        llm = atomc.load(path)
        seconds[f"{name} load"] = time.perf_counter() - start
        start = time.perf_counter()
        answers[name] = llm.generate(prompts, params)
        seconds[f"{name} generate"] = time.perf_counter() - start
        print(f"{name}: loaded in {seconds[f'{name} load']:.1f} s, {options.prompts * options.tokens} tokens in "
              f"{seconds[f'{name} generate']:.1f} s", flush=True)  # fmt: skip
    rows = [{"prompt": p, **parted(g, c)} for p, g, c in zip(prompts, answers["gpu"], answers["cpu"], strict=True)]
    for row in rows:
        print(row)
    first = [
        max(abs(a.logprob - b.logprob) for a, b in zip(g.logprobs[: r["same"]], c.logprobs[: r["same"]], strict=True))
        for g, c, r in zip(answers["gpu"], answers["cpu"], rows, strict=True)
        if r["same"]
    ]
    wrong = [r for r in rows if "gap" in r and (r["gap"] is None or r["gap"] > options.tie)]
    summary = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "same tokens, median": statistics.median(r["same"] for r in rows),
        "whole texts equal": sum("gap" not in r for r in rows), "prompts": len(rows),
        "largest difference of log-probabilities before": max(first, default=0.0),
        "largest gap at a first difference": max((r["gap"] or 0.0 for r in rows if "gap" in r), default=0.0),
        "differences that are no near tie": len(wrong), "seconds": seconds,
    }  # fmt: skip
    print(json.dumps(summary, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps({"command": " ".join(sys.argv), **summary, "rows": rows}, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
