"""Every step of a layer stack on a GPU against float64, with random weights: `atomc verify` without a checkpoint.

    python benchmarks/verify_layers.py build/flash4.atom
    python benchmarks/verify_layers.py build/flash4.atom --tokens 300 --skip atom.scaled_moe_experts.default

The artifact is compiled anywhere (`atomc compile MODEL --target h100 --no-weights`). Random weights in its layouts are
made on the device, where what steps read is copied and references run, one expert at a time: the host needs little
memory, the device twice the weights and a few gigabytes. Each token asks for experts of its own, whose float64 products
take nearly all the time: a few tokens judge everything but long windows, more tokens without the experts those too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from layers import random_artifact

from atomc.cli.verify import message, show, summary
from atomc.verify import Options, verify_steps


def main() -> int:
    """Verify, print, write when asked; 1 if a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=24, help="of all requests together")
    parser.add_argument("--skip", nargs="*", default=[], help="operators that are not judged")
    parser.add_argument("--region", help="judge this region only")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    artifact = random_artifact(options.artifact)
    ids = torch.randint(0, artifact.manifest.serving.vocab_size, (options.tokens,)).tolist()
    start = said = time.perf_counter()

    def progress(what: str, done: int, _: int) -> None:
        nonlocal said
        if time.perf_counter() - said > 10:
            said = time.perf_counter()
            print(f"{said - start:.0f} s: {what}, {done} steps judged", flush=True)

    found = verify_steps(
        artifact, ids, Options(options.tokens, None, options.region, frozenset(options.skip)), progress
    )
    seconds = time.perf_counter() - start
    show(found, seconds, None)
    print(f"at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of the device were in use")
    if options.out is not None:
        facts: dict[str, Any] = {"command": " ".join(sys.argv), "device": torch.cuda.get_device_name()}
        rows = summary(found, seconds, None)
        text = json.dumps(facts | rows | {"artifact": rows["artifact"].name}, indent=1)
        options.out.write_text(text + "\n")
    if not found.ok:
        print(message(found))
    return 0 if found.ok else 1


if __name__ == "__main__":
    sys.exit(main())
