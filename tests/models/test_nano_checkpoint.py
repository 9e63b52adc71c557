"""The bundled deepseek-v4-nano checkpoint: official layout, size, and that it really was trained."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from atomc.models.nano.config import NanoConfig, read_config
from atomc.models.nano.evaluate import Model
from atomc.models.nano.export import checkpoint_tensors, read_checkpoint, write_shards
from atomc.models.nano.generate import greedy

FOLDER = Path(__file__).parents[2] / "models" / "nano" / "deepseek-v4-nano"
MAX_BYTES = 20_000_000

DTYPES = {
    "embed.weight": torch.bfloat16,
    "hc_head_fn": torch.float32,
    "layers.0.ffn.gate.tid2eid": torch.int64,
    "layers.1.attn.attn_sink": torch.float32,
    "layers.1.attn.indexer.wq_b.weight": torch.float8_e4m3fn,
    "layers.1.attn.indexer.wq_b.scale": torch.float8_e8m0fnu,
    "layers.2.attn.compressor.wgate.weight": torch.bfloat16,
    "layers.2.attn.compressor.ape": torch.float32,
    "layers.4.ffn.gate.bias": torch.float32,
    "layers.4.ffn.experts.7.w2.weight": torch.int8,
    "layers.4.ffn.experts.7.w2.scale": torch.float8_e8m0fnu,
    "mtp.0.e_proj.weight": torch.float8_e4m3fn,
    "mtp.0.hc_head_scale": torch.float32,
}


@pytest.fixture(scope="module")
def checkpoint() -> tuple[NanoConfig, dict[str, Tensor]]:
    return read_checkpoint(FOLDER)


def test_layout() -> None:
    weight_map = json.loads((FOLDER / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) == 2
    for name, dtype in DTYPES.items():
        with safe_open(FOLDER / weight_map[name], framework="pt") as shard:
            assert shard.get_tensor(name).dtype == dtype, name
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= MAX_BYTES


def test_every_mechanism_is_present() -> None:
    config = read_config(FOLDER / "config.json")
    assert {config.kind(layer) for layer in range(config.num_hidden_layers)} == {"swa", "csa", "hca"}
    assert {config.is_hash(layer) for layer in range(config.num_hidden_layers)} == {True, False}
    assert config.n_routed_experts >= 8 and config.hc_mult == 4
    widths = (config.hidden_size, config.moe_intermediate_size, config.q_lora_rank, config.o_lora_rank, config.head_dim)
    assert all(width % 128 == 0 for width in widths)


def test_export_of_what_was_read_is_the_same_checkpoint(
    checkpoint: tuple[NanoConfig, dict[str, Tensor]], tmp_path: Path
) -> None:
    config, weights = checkpoint
    write_shards(checkpoint_tensors(weights, config), tmp_path)
    _, again = read_tensors(tmp_path, config)
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def read_tensors(folder: Path, config: NanoConfig) -> tuple[NanoConfig, dict[str, Tensor]]:
    (folder / "config.json").write_text((FOLDER / "config.json").read_text())
    return read_checkpoint(folder)


def test_hash_table_spreads_the_tokens(checkpoint: tuple[NanoConfig, dict[str, Tensor]]) -> None:
    config, weights = checkpoint
    table_Vk = weights["layers.0.ffn.gate.tid2eid"]
    assert torch.all(table_Vk.sort(1).values.diff(dim=1) > 0)
    share_E = torch.bincount(table_Vk.flatten(), minlength=config.n_routed_experts) / table_Vk.numel()
    assert share_E.min() > 0.5 / config.n_routed_experts


def test_bits_per_byte_of_a_little_documentation(checkpoint: tuple[NanoConfig, dict[str, Tensor]]) -> None:
    """A sentence any documentation could hold; an untrained model needs 13 bits a token, about 3.6 a byte."""
    config, weights = checkpoint
    text = "This function returns a list of all the names in the current module. If the name does not exist, it raises "
    text += "an exception. The default value is None, which means that the value of the argument is not changed.\n"
    ids = [config.bos_token_id, *Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(text).ids]
    rows = torch.full((1, 66), config.eos_token_id)
    rows[0, : len(ids)] = torch.tensor(ids)
    with torch.no_grad():
        nll_BT = Model.create(config, compiled=False).losses(weights, rows, torch.tensor(False)).nll_BT
    assert nll_BT[0, : len(ids) - 1].sum().item() / math.log(2) / len(text) < 1.2


def test_greedy_text_is_python(checkpoint: tuple[NanoConfig, dict[str, Tensor]]) -> None:
    config, weights = checkpoint
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    prompt = [config.bos_token_id, *tokenizer.encode("import os\nimport sys\n\nclass Reader(").ids]
    (answer,) = greedy(weights, config, [prompt], 12)
    assert "):" in tokenizer.decode(answer)
