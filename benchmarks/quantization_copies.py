"""Copies of a checkpoint in bf16, for what quantising it anew costs.

A weight that was quantised once is quantised again without loss: its values lie on the grid already. So there are two
copies: the weights as they are dequantised (quantising them must give the shipped codes back), and the same with
channels rescaled by factors that are no powers of two, and the weights that read those channels by their inverses.
That leaves the function as it was, but for rounding to bf16, and no block on a grid.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from atomc.compiler import TOKENIZER_FILES
from atomc.formats import FP8_TILE, FP8_TILE_F32, MXFP4, dequantize
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.reader import CheckpointReader
from atomc.models.deepseek_v4.schema import entries
from atomc.models.deepseek_v4.writer import write_checkpoint
from atomc.models.source import open_model

LAYOUTS = {"fp8": FP8_TILE, "fp8_f32": FP8_TILE_F32, "fp4": MXFP4}
Change = Callable[[str, Tensor], Tensor]
# Channels between two products: (what makes them, what reads them), below a layer's prefix.
NORMED = (
    ("attn_norm", ("attn.wq_a", "attn.wkv", "attn.compressor.wkv", "attn.compressor.wgate",
                   "attn.indexer.compressor.wkv", "attn.indexer.compressor.wgate", "attn.indexer.weights_proj")),
    ("attn.q_norm", ("attn.wq_b", "attn.indexer.wq_b")),
)  # fmt: skip


class Rescaling:
    """The factors of every channel, 2^u with u uniform in ±1/2, and what they do to a weight."""

    def __init__(self, config: DeepseekV4Config, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._up: dict[str, Tensor] = {}  # weight -> factors of its rows (or of a norm's elements)
        self._down: dict[str, Tensor] = {}  # weight -> factors its columns are divided by
        width, rank, group = config.hidden_size, config.q_lora_rank, config.o_groups * config.o_lora_rank
        for layer in range(config.num_hidden_layers):
            prefix = config.layer_prefix(layer)
            for (norm, readers), size in zip(NORMED, (width, rank), strict=True):
                self._add(prefix, norm, readers, size)
            self._add(prefix, "attn.wo_a", ("attn.wo_b",), group)
            experts = [f"ffn.experts.{e}" for e in range(config.n_routed_experts)] + ["ffn.shared_experts"]
            readers = ("ffn.gate", *(f"{e}.{w}" for e in experts for w in ("w1", "w3")))
            self._add(prefix, "ffn_norm", readers, width)
            for expert in experts:
                self._add(prefix, f"{expert}.w3", (f"{expert}.w2",), config.moe_intermediate_size)

    def _add(self, prefix: str, maker: str, readers: tuple[str, ...], size: int) -> None:
        factors = torch.exp2(torch.rand(size, generator=self._generator) - 0.5)
        self._up[f"{prefix}{maker}.weight"] = factors
        self._down |= {f"{prefix}{reader}.weight": factors for reader in readers}

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name in self._up:
            up = self._up[name]
            value = value.float() * (up if value.dim() == 1 else up[:, None])
        return value.float() / self._down[name] if name in self._down else value


def plain_copy(model: str, folder: Path, change: Change | None = None) -> Path:
    """A bf16 checkpoint of the model's dequantised weights, changed by name."""
    source = open_model(model, with_weights=True)
    reader, origin = source.reader, source.folder
    if reader is None or origin is None:
        raise SystemExit(f"{model} has no weights to copy")
    config = replace(source.config, quantized=False)
    write_checkpoint(folder, config, _tensors(reader, source.config, change or (lambda _, value: value)))
    for name in TOKENIZER_FILES:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    return folder


def _tensors(reader: CheckpointReader, config: DeepseekV4Config, change: Change) -> Iterator[tuple[str, Tensor]]:
    for entry in entries(config):
        value = reader.load(entry.name)
        if entry.quantized:
            value = dequantize(value, reader.load(entry.scale_name), LAYOUTS[reader.storage(entry.name)])
        value = change(entry.name, value)
        yield entry.name, value.bfloat16() if entry.format in ("fp8", "fp4", "bf16") else value


def differing_weights(one: Path, other: Path) -> tuple[int, list[str]]:
    """How many weights two artifacts have, and the names of those that are not the same values, dequantised.

    The codes may differ where a block's largest value fits the next smaller scale too.
    """
    a, b = _weights(one), _weights(other)
    different = set(a) ^ set(b) | {name for name in set(a) & set(b) if not torch.equal(a[name], b[name])}
    return len(a), sorted(different)


def _weights(artifact: Path) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for file in sorted((artifact / "weights").glob("*.safetensors")):
        stored |= load_file(file)
    layouts = {torch.int8: MXFP4, torch.float8_e4m3fn: FP8_TILE}
    values = {}
    for name, value in stored.items():
        if value.dtype in layouts:
            scale = stored.get(f"{name}.scale", stored.get(f"{name.removesuffix('.weight')}.scale"))
            assert scale is not None, f"{artifact}: {name} has no scales"
            values[name] = dequantize(value, scale, layouts[value.dtype])
        elif value.dtype is not torch.float8_e8m0fnu:
            values[name] = value
    return values
