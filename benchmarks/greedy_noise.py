"""What the precision of FP8 sums does to greedy text: nano on the cpu, with and without their error, no GPU needed.

    python benchmarks/greedy_noise.py build/nano.atom [--error 1.3e-4] [--experts 5.8e-4] [--seeds 3]

Hopper's matrix unit adds FP8 products with about 14 bits; `atomc verify` on an H100 measures what that leaves as the
relative error of each product (Frobenius). On the cpu each of a product's two operands gets a random error of that size
over the root of two after it was dequantised, which together give its result the same one; what the experts return gets
theirs. Greedy continuations are then compared as `gpu_numerics.py` compares those of a GPU: how many part, and at what
gap of log-probabilities. If these are alike, the precision of its sums is enough to explain the GPU's differences.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_numerics import PROMPTS, parted
from torch import Tensor

import atomc
from atomc.ops import OPS
from atomc.runtime.llm import Completion
from atomc.runtime.request import SamplingParams


def disturbed(function: Callable[..., Tensor], error: float) -> Callable[..., Tensor]:
    """The operator with a random relative error of each element of its result."""

    def run(*given: Any, **named: Any) -> Tensor:
        y = function(*given, **named)
        return y * (1 + error * torch.randn(y.shape)).to(y.dtype)

    return run


@contextmanager
def errors(sizes: dict[str, float]) -> Iterator[None]:
    """Within it, operators have the errors of `sizes` on the cpu."""
    known = {name: OPS[name] for name in sizes}
    try:
        for name, op in known.items():
            OPS[name] = replace(op, cpu=disturbed(op.cpu, sizes[name]))
        yield
    finally:
        OPS.update(known)


def texts(path: Path, tokens: int) -> list[Completion]:
    """Greedy continuations of the prompts."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=5)
    return atomc.load(path).generate(list(PROMPTS), params)


def main() -> int:
    """Compare, print, write when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--error", type=float, default=1.3e-4, help="of FP8 linear layers")
    parser.add_argument("--experts", type=float, default=5.8e-4, help="of routed experts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    exact, rows = texts(options.artifact, options.tokens), []
    sizes = {"dequantize": options.error / 2**0.5, "moe_experts_quant": options.experts}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        with errors(sizes):
            other = texts(options.artifact, options.tokens)
        found = [parted(a, b) for a, b in zip(other, exact, strict=True)]
        gaps = sorted(round(row["gap"], 3) for row in found if row.get("gap") is not None)
        unknown = sum("gap" in row and row["gap"] is None for row in found)
        rows.append(
            {"seed": seed, "equal": len(found) - len(gaps) - unknown, "gaps": gaps, "not in the top 5": unknown}
        )
        print(rows[-1], flush=True)
    if options.out is not None:
        facts = {"command": " ".join(sys.argv), "errors": sizes, "tokens": options.tokens, "prompts": len(PROMPTS)}
        options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
