"""Write a trained run as a checkpoint folder in the official layout, and read such a folder back.

`python -m atomc.models.nano.export --run runs/nano --tokenizer bpe8192.json --out models/nano/deepseek-v4-nano`
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from atomc.models.nano.config import NanoConfig, read_config, write_config
from atomc.models.nano.quant import Quantized, dequantize_fp4, dequantize_fp8, quantize_fp4, quantize_fp8
from atomc.models.nano.weights import WeightSpec, checkpoint_name, split_experts, weight_specs

SHARDS = 2


def _stored(name: str, value: Tensor, spec: WeightSpec) -> Iterator[tuple[str, Tensor]]:
    """(official name, tensor in its storage dtype); a quantised weight is followed by its scale."""
    if spec.format in ("fp8", "fp4"):
        quantized = quantize_fp8(value) if spec.format == "fp8" else quantize_fp4(value)
        yield f"{name}.weight", quantized.values
        yield f"{name}.scale", quantized.scale
    else:
        yield checkpoint_name(name), value.bfloat16() if spec.format == "bf16" else value


def checkpoint_tensors(weights: Mapping[str, Tensor], config: NanoConfig) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by official name, in model order."""
    tensors: dict[str, Tensor] = {}
    for name, spec in weight_specs(config).items():
        for single, value in split_experts(name, weights[name].cpu()):
            tensors |= {key: stored.contiguous() for key, stored in _stored(single, value, spec)}
    return tensors


def write_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Shards of about equal size in the order of the model, and their index."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        shards[min(written * SHARDS // total, SHARDS - 1)][name] = tensor
        written += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_tokenizer(tokenizer: Path, folder: Path, config: NanoConfig) -> None:
    """tokenizer.json as it is, and the two small files that name its special tokens."""
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    names = {entry["id"]: entry["content"] for entry in json.loads(tokenizer.read_text())["added_tokens"]}
    bos, eos = names[config.bos_token_id], names[config.eos_token_id]
    settings = {"add_bos_token": True, "add_eos_token": False, "bos_token": bos, "clean_up_tokenization_spaces": False,
                "eos_token": eos, "model_max_length": config.max_position_embeddings, "pad_token": "<｜▁pad▁｜>",
                "tokenizer_class": "PreTrainedTokenizerFast"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    generation = {"bos_token_id": config.bos_token_id, "do_sample": False, "eos_token_id": config.eos_token_id,
                  "max_length": config.max_position_embeddings}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def export(weights: Mapping[str, Tensor], config: NanoConfig, tokenizer: Path, folder: Path) -> None:
    """Quantise and write the whole checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(checkpoint_tensors(weights, config), folder)
    write_config(config, folder / "config.json")
    write_tokenizer(tokenizer, folder, config)


def read_checkpoint(folder: Path) -> tuple[NanoConfig, dict[str, Tensor]]:
    """The dequantised fp32 weights by stacked name, and the I64 tables."""
    config = read_config(folder / "config.json")
    index: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors |= load_file(folder / file)

    def read(name: str, spec: WeightSpec) -> Tensor:
        if spec.format in ("fp8", "fp4"):
            quantized = Quantized(tensors[f"{name}.weight"], tensors[f"{name}.scale"])
            return dequantize_fp8(quantized) if spec.format == "fp8" else dequantize_fp4(quantized)
        value = tensors[checkpoint_name(name)]
        return value if spec.format == "i64" else value.float()

    weights = {}
    for name, spec in weight_specs(config).items():
        parts = [read(single, spec) for single, _ in split_experts(name, torch.empty(spec.shape, device="meta"))]
        weights[name] = torch.stack(parts) if ".experts." in name else parts[0]
    return config, weights


def main(
    run: Annotated[Path, typer.Option(help="Folder of the training run, with checkpoint.pt.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json of the model.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
) -> None:
    """Export the checkpoint of a run."""
    content: dict[str, Any] = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    export(content["masters"], NanoConfig(), tokenizer, out)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    typer.echo(f"{out}: {size / 1e6:.2f} MB of safetensors")


if __name__ == "__main__":
    typer.run(main)
