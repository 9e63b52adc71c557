"""A checkpoint and the artifact compiled from it, small enough to compile once in a test session."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.cli import run_apart
from tests.support.tiny import random_checkpoint, tiny_config
from tests.support.tokenizer import write_tokenizer

# A layer of each attention kind; hash and top-k routing.
LAYERS = {"num_hidden_layers": 3, "compress_ratios": [0, 16, 4, 0], "num_hash_layers": 1, "vocab_size": 320}
# The fewest regions that a model can have.
ONE_LAYER = {"num_hidden_layers": 1, "compress_ratios": [0, 0], "num_hash_layers": 1, "vocab_size": 320}
# Of the artifact that ranks are served from.
LAYOUTS = ("dp=2,moe=tp", "dp=2,moe=ep", "tp=2", "dp=2,tp=2", "dp=2,moe=tp,tbo=all")
LIMITS = ("--max-context", "320", "--max-batch-tokens", "48", "--max-requests", "4", "--max-logit-rows", "40")


def write_checkpoint(folder: Path, **overrides: object) -> Path:
    """A checkpoint with a tokenizer and a generation config that asks for greedy decoding."""
    random_checkpoint(folder, tiny_config(**overrides))
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": 1}))
    return folder


def compile_artifact(checkpoint: Path, output: Path, scheme: str, layouts: tuple[str, ...] = ()) -> None:
    """Compiles with the command line, and keeps what it said beside the artifact, as `NAME.json`."""
    parallel = [word for layout in layouts for word in ("--parallel", layout)]
    ran = run_apart("compile", checkpoint, "-o", output, *LIMITS, "--scheme", scheme, "--json", *parallel)
    assert ran.code == 0, ran.out + ran.err
    output.with_suffix(".json").write_text(ran.out)
