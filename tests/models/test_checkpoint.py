"""What a checkpoint must hold (the published totals), and reading one back in every official form."""

import dataclasses
import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from atomc.formats import FP8_TILE, MXFP4, dequantize
from atomc.models.bundled import bundled_config
from atomc.models.deepseek_v4.checkpoint import CheckpointReader, entries, expected_tensors, validate, write_checkpoint
from atomc.models.deepseek_v4.config import DeepseekV4Config, load_config
from atomc.models.deepseek_v4.shards import INDEX_NAME
from atomc.recipes import TensorSpec
from tests.support.tiny import TINY_DSPARK, random_checkpoint, random_tensors, same_bits, tiny_config

E8M0, FP8 = torch.float8_e8m0fnu, torch.float8_e4m3fn


def total_bytes(tensors: dict[str, TensorSpec]) -> int:
    return sum(spec.nbytes for spec in tensors.values())


def with_dspark(size: str) -> DeepseekV4Config:
    config = bundled_config(f"deepseek-v4-{size}")
    layers = config.num_hidden_layers
    return dataclasses.replace(
        config,
        compress_ratios=(*config.compress_ratios, 0, 0),
        dspark_block_size=5,
        dspark_noise_token_id=128799,
        dspark_target_layer_ids=(layers - 3, layers - 2, layers - 1),
        dspark_markov_rank={"flash": 256, "pro": 512}[size],
    )


@pytest.mark.parametrize(
    ("size", "tensors", "payload", "main", "dtypes"),
    [
        ("flash", 69_187, 159_609_485_896, 156_015_698_140, (433, 417, 375, 34_167, 3, 33_792)),
        ("pro", 145_116, 864_704_792_696, 850_748_205_004, (619, 590, 528, 71_952, 3, 71_424)),
    ],
)
def test_instruct_totals_are_the_published_ones(
    size: str, tensors: int, payload: int, main: int, dtypes: tuple[int, ...]
) -> None:
    expected = expected_tensors(bundled_config(f"deepseek-v4-{size}"))
    assert len(expected) == tensors
    assert total_bytes(expected) == payload
    draft = {name: spec for name, spec in expected.items() if name.startswith("mtp.")}
    assert payload - total_bytes(draft) == main
    assert len(draft) == {"flash": 1_575, "pro": 2_343}[size]
    counts = Counter(spec.dtype for spec in expected.values())
    assert tuple(counts[d] for d in (torch.bfloat16, torch.float32, FP8, E8M0, torch.int64, torch.int8)) == dtypes


@pytest.mark.parametrize(
    ("size", "main", "draft"),
    [("flash", 284_332_240_471, 6_610_048_891), ("pro", 1_572_997_201_763, 25_840_145_979)],
)
def test_logical_parameters(size: str, main: int, draft: int) -> None:
    count: Counter[bool] = Counter()
    for entry in entries(bundled_config(f"deepseek-v4-{size}")):
        if entry.format != "i64":
            count[entry.name.startswith("mtp.")] += prod(entry.shape)
    assert (count[False], count[True]) == (main, draft)


@pytest.mark.parametrize(
    ("size", "tensors", "payload", "namespace", "in_namespace"),
    [
        ("flash", 72_317, 166_878_536_440, 10_862_838_300, 4_705),
        ("pro", 149_782, 892_727_580_904, 41_979_375_900, 7_009),
    ],
)
def test_dspark_totals(size: str, tensors: int, payload: int, namespace: int, in_namespace: int) -> None:
    expected = expected_tensors(with_dspark(size))
    draft = {name: spec for name, spec in expected.items() if name.startswith("mtp.")}
    assert (len(expected), total_bytes(expected)) == (tensors, payload)
    assert (len(draft), total_bytes(draft)) == (in_namespace, namespace)
    assert not any(name.startswith(("mtp.0.e_proj", "mtp.0.h_proj", "mtp.0.enorm")) for name in draft)


@pytest.mark.parametrize(
    ("size", "e8m0", "f32"),
    [("flash", 292_502_338_120, 292_555_345_480), ("pro", 1_602_033_600_632, 1_602_325_824_632)],
)
def test_base_totals(size: str, e8m0: int, f32: int) -> None:
    config = dataclasses.replace(bundled_config(f"deepseek-v4-{size}"), expert_dtype="fp8")
    assert total_bytes(expected_tensors(config)) == e8m0
    assert total_bytes(expected_tensors(config, scale_dtype=torch.float32)) == f32
    assert len(expected_tensors(config)) == {"flash": 69_187, "pro": 145_116}[size]


def test_shapes_of_one_layer_of_each_kind() -> None:
    expected = expected_tensors(bundled_config("deepseek-v4-flash"))
    for name, shape, dtype in [
        ("layers.0.attn.wq_b.weight", (32768, 1024), FP8),
        ("layers.0.attn.wq_b.scale", (256, 8), E8M0),
        ("layers.2.attn.compressor.ape", (4, 1024), torch.float32),
        ("layers.2.attn.indexer.wq_b.scale", (64, 8), E8M0),
        ("layers.2.attn.indexer.compressor.wkv.weight", (256, 4096), torch.bfloat16),
        ("layers.2.ffn.gate.tid2eid", (129280, 6), torch.int64),
        ("layers.3.attn.compressor.ape", (128, 512), torch.float32),
        ("layers.3.ffn.experts.255.w2.weight", (4096, 1024), torch.int8),
        ("layers.3.ffn.experts.255.w2.scale", (4096, 64), E8M0),
        ("layers.3.ffn.gate.bias", (256,), torch.float32),
        ("layers.42.hc_ffn_fn", (24, 16384), torch.float32),
        ("mtp.0.e_proj.scale", (32, 32), E8M0),
    ]:
        assert expected[name] == TensorSpec(shape, dtype)
    for absent in ("layers.0.attn.compressor.ape", "layers.3.attn.indexer.wq_b.weight", "layers.2.ffn.gate.bias"):
        assert absent not in expected


def test_an_unquantised_configuration_expects_no_scales() -> None:
    expected = expected_tensors(dataclasses.replace(tiny_config(), quantized=False))
    assert not any(name.endswith(".scale") for name in expected)
    assert expected["layers.0.ffn.experts.0.w1.weight"] == TensorSpec((32, 64), torch.bfloat16)


@pytest.mark.parametrize("overrides", [{}, {"expert_dtype": "fp8"}, TINY_DSPARK], ids=["instruct", "base", "dspark"])
@pytest.mark.parametrize("quantized", [True, False])
def test_what_is_written_is_read_back(tmp_path: Path, overrides: dict[str, Any], quantized: bool) -> None:
    config = dataclasses.replace(tiny_config(**overrides), quantized=quantized)
    folder = random_checkpoint(tmp_path / "model", config, seed=5, quantized=quantized)
    assert load_config(folder) == config
    with CheckpointReader(folder) as reader:
        validate(reader, config, finite=True)
        given_ = dict(random_tensors(config, seed=5))
        assert sorted(reader) == sorted(given_)
        assert len(reader) == len(given_)
        for name, tensor in given_.items():
            assert same_bits(reader.load(name), tensor)
            assert reader.spec(name) == TensorSpec(tuple(tensor.shape), tensor.dtype)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    folders = [random_checkpoint(tmp_path / name, tiny_config(), seed=3) for name in ("a", "b")]
    for file in folders[0].iterdir():
        assert file.read_bytes() == (folders[1] / file.name).read_bytes()


def test_the_layout_is_the_official_one(sound: Path) -> None:
    names = sorted(path.name for path in sound.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert names == sorted([*shards, INDEX_NAME, "config.json"])
    index = json.loads((sound / INDEX_NAME).read_text())
    assert index["weight_map"].keys() == expected_tensors(tiny_config()).keys()
    assert index["metadata"]["total_size"] == total_bytes(expected_tensors(tiny_config()))
    assert json.loads((sound / "config.json").read_text())["compress_ratios"] == [0, 16, 4, 16, 4, 0, 0]


def test_shards_without_an_index_and_a_single_file_are_read(copy: Path) -> None:
    (copy / INDEX_NAME).unlink()
    validate(CheckpointReader(copy), tiny_config())
    tensors: dict[str, Tensor] = {}
    for shard in copy.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(shard)
        shard.unlink()
    safetensors.torch.save_file(tensors, copy / "model.safetensors")
    reader = CheckpointReader(copy)
    validate(reader, tiny_config())
    assert [file.name for file in reader.files] == ["model.safetensors"]


def test_storage_of_weights(sound: Path, tmp_path: Path) -> None:
    reader = CheckpointReader(sound)
    assert reader.storage("layers.0.attn.wq_a.weight") == "fp8"
    assert reader.storage("layers.0.ffn.experts.0.w1.weight") == "fp4"
    assert reader.storage("embed.weight") == "plain"
    plain = CheckpointReader(random_checkpoint(tmp_path / "plain", tiny_config(), quantized=False))
    assert plain.storage("layers.0.ffn.experts.0.w1.weight") == "plain"


def test_float32_scales_of_base_releases_are_accepted(tmp_path: Path) -> None:
    config = tiny_config(expert_dtype="fp8")
    tensors = {
        name: tensor.float() if tensor.dtype == E8M0 else tensor for name, tensor in random_tensors(config, seed=0)
    }
    folder = write_checkpoint(tmp_path / "base", config, tensors)
    validate(CheckpointReader(folder), config)


def test_some_weights_may_be_stored_in_full(tmp_path: Path) -> None:
    """One public repack stores wo_a as BF16 (spec 3.3)."""
    tensors = dict(random_tensors(tiny_config()))
    for name in [name for name in tensors if "wo_a" in name]:
        if name.endswith("scale"):
            del tensors[name]
        else:
            tensors[name] = tensors[name].bfloat16()
    folder = write_checkpoint(tmp_path / "repack", tiny_config(), tensors)
    assert CheckpointReader(folder).storage("layers.1.attn.wo_a.weight") == "plain"


def test_dequantised_experts_are_those_that_were_quantised(sound: Path) -> None:
    reader, name = CheckpointReader(sound), "layers.4.ffn.experts.7.w2."
    fp4 = dequantize(reader.load(f"{name}weight"), reader.load(f"{name}scale"), MXFP4)
    assert tuple(fp4.shape) == (64, 32)
    assert 0.5 < float(fp4.std()) * 32**0.5 < 1.5
    fp8 = dequantize(reader.load("layers.1.attn.wq_a.weight"), reader.load("layers.1.attn.wq_a.scale"), FP8_TILE)
    assert 0.5 < float(fp8.std()) * 8 < 1.5
