"""A small model whose weights have several tiles and groups, compiled once in a test process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.artifact import write_checkpoint

# Square weights of 2 x 2 tiles, ragged ones; experts of five groups; index rows of four.
CONFIG = {
    "num_hidden_layers": 3, "compress_ratios": [0, 16, 4, 0], "num_hash_layers": 1, "vocab_size": 320,
    "hidden_size": 160, "q_lora_rank": 160, "head_dim": 48, "num_attention_heads": 4, "o_groups": 2, "o_lora_rank": 80,
    "index_head_dim": 128, "index_n_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "swiglu_limit": 1.5,
}  # fmt: skip
LIMITS = {"max_context": 320, "max_batch_tokens": 64, "max_requests": 4, "max_logit_rows": 32}


@dataclass(frozen=True)
class Compiled:
    """A checkpoint and the artifact made of it."""

    checkpoint: Path
    artifact: Path


def compile_quietly(checkpoint: Path, output: Path, target: str = "cpu", **options: object) -> Path:
    """The artifact of a checkpoint, in this process."""
    from atomc.compiler import Options, compile_model

    compile_model(str(checkpoint), target, output, Options(**(LIMITS | options)))  # type: ignore[arg-type]
    return output


def varied(checkpoint: Path) -> Path:
    """With scales that differ from block to block: those of random weights are alike in whatever order."""
    for file in checkpoint.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith(".scale"):
                rows, columns = (torch.arange(n) for n in tensor.shape)
                step = (rows[:, None] + 2 * columns[None]) % 3
                tensors[name] = (tensor.view(torch.uint8) + step - 1).to(torch.uint8).view(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return checkpoint


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Read-only: copy what a test changes."""
    base = tmp_path_factory.mktemp("verify")
    checkpoint = varied(write_checkpoint(base / "checkpoint", **CONFIG))
    return Compiled(checkpoint, compile_quietly(checkpoint, base / "model.atom"))


@pytest.fixture(scope="session", params=[pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def for_gpu(request: pytest.FixtureRequest, compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The same checkpoint compiled for an H100; read-only."""
    pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")
    folder = tmp_path_factory.mktemp("gpu") / "model.atom"
    artifact = compile_quietly(compiled.checkpoint, folder, target="h100", dtype=request.param)
    return Compiled(compiled.checkpoint, artifact)
