"""Weight recipes: the real modules are filled from every form of a checkpoint, and the values are the stored ones."""

import dataclasses

import pytest
import torch
from torch import Tensor

from atomc.errors import RecipeError
from atomc.formats import FP8_TILE, MXFP4, dequantize
from atomc.models.bundled import bundled_config
from atomc.models.deepseek_v4.checkpoint import CheckpointReader, Storage, expected_tensors
from atomc.models.deepseek_v4.layers import inverse_frequencies
from atomc.models.deepseek_v4.model import DeepseekV4, MTPBlock
from atomc.models.deepseek_v4.weights import (
    ComputeDType,
    checkpoint_storage,
    load_parameters,
    official_parameter,
    official_storage,
    weight_recipe,
)
from atomc.recipes import evaluate, from_json, instantiate, output_spec, sources, to_json
from tests.support.tiny import TINY_DSPARK, random_checkpoint, tiny_config

FORMS = {"fp4": tiny_config(), "fp8": tiny_config(expert_dtype="fp8"), "plain": tiny_config()}


@pytest.fixture(scope="module", params=list(FORMS))
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CheckpointReader]:
    name: str = request.param
    folder = tmp_path_factory.mktemp("weights") / name
    return name, CheckpointReader(random_checkpoint(folder, FORMS[name], quantized=name != "plain"))


def in_full(reader: CheckpointReader, name: str, dtype: torch.dtype) -> Tensor:
    """Values of a linear weight, dequantised directly."""
    weight = reader.load(f"{name}.weight")
    if f"{name}.scale" not in reader:
        return weight.to(dtype)
    layout = MXFP4 if weight.dtype == torch.int8 else FP8_TILE
    return dequantize(weight, reader.load(f"{name}.scale"), layout, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_whole_model_is_filled_with_the_stored_values(
    form: tuple[str, CheckpointReader], dtype: ComputeDType
) -> None:
    name, reader = form
    config, compute = FORMS[name], getattr(torch, dtype)
    model = DeepseekV4(config, compute)
    load_parameters(model, config, reader, dtype)
    parameters = dict(model.named_parameters())
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}."
        for leaf in ("attn.wq_a", "attn.wo_a", "ffn.shared_experts.w2"):
            found = parameters[f"{prefix}{leaf}.weight"]
            assert torch.equal(found, in_full(reader, f"{prefix}{leaf}", compute))
        w13, w2 = parameters[f"{prefix}ffn.experts.w13"], parameters[f"{prefix}ffn.experts.w2"]
        for expert in range(config.n_routed_experts):
            at = f"{prefix}ffn.experts.{expert}."
            assert torch.equal(w13[expert, :32], in_full(reader, f"{at}w1", compute))
            assert torch.equal(w13[expert, 32:], in_full(reader, f"{at}w3", compute))
            assert torch.equal(w2[expert], in_full(reader, f"{at}w2", compute))
        assert torch.equal(parameters[f"{prefix}hc_attn.fn"], reader.load(f"{prefix}hc_attn_fn"))
        assert torch.equal(parameters[f"{prefix}attn_norm.weight"], reader.load(f"{prefix}attn_norm.weight").float())
    assert torch.equal(parameters["layers.0.ffn.gate.tid2eid"], reader.load("layers.0.ffn.gate.tid2eid").int())
    assert torch.equal(parameters["prologue.embed.weight"], reader.load("embed.weight").to(compute))
    assert torch.equal(parameters["head.hc_head.scale"], reader.load("hc_head_scale"))
    assert torch.equal(parameters["head.head.weight"], reader.load("head.weight").float())
    assert torch.equal(parameters["prologue.rope_yarn"], inverse_frequencies(config, compressed=True))
    assert all(bool(parameter.isfinite().all()) for parameter in parameters.values())


def test_a_region_takes_its_block_as_prefix(form: tuple[str, CheckpointReader]) -> None:
    name, reader = form
    mtp = MTPBlock(FORMS[name], torch.float32)
    load_parameters(mtp, FORMS[name], reader, "float32", prefix="mtp.0.")
    assert torch.equal(mtp.e_proj.weight, in_full(reader, "mtp.0.e_proj", torch.float32))
    assert torch.equal(mtp.block.attn.wkv.weight, in_full(reader, "mtp.0.attn.wkv", torch.float32))
    assert torch.equal(mtp.head.norm.weight, reader.load("mtp.0.norm.weight").float())
    assert torch.equal(mtp.head.hc_head.fn, reader.load("mtp.0.hc_head_fn"))
    assert torch.equal(mtp.head.head.weight, reader.load("head.weight").float())  # the main model's


def test_all_layers_of_a_kind_share_one_recipe() -> None:
    recipe = weight_recipe(tiny_config(), "ffn.experts.w2", "bfloat16", stored="fp4")
    assert sources(recipe)[:2] == ["{prefix}ffn.experts.0.w2.weight", "{prefix}ffn.experts.0.w2.scale"]
    assert from_json(to_json(recipe)) == recipe
    full = weight_recipe(tiny_config(), "layers.3.ffn.experts.w2", "bfloat16", stored="fp4")
    assert full == instantiate(recipe, "layers.3.")


@pytest.mark.parametrize("size", ["flash", "pro"])
def test_recipes_of_the_released_sizes_fit_without_any_weights(size: str) -> None:
    """Every parameter has the shape and dtype of its recipe, and every tensor of the main model is used just once."""
    config = bundled_config(f"deepseek-v4-{size}")
    expected = expected_tensors(config)
    with torch.device("meta"):
        model = DeepseekV4(config, torch.bfloat16)
    used: list[str] = []
    for name, parameter in model.named_parameters():
        recipe = instantiate(weight_recipe(config, name, "bfloat16", stored=official_storage(config, name)), "")
        if "ffn.experts" not in name or name.startswith("layers.3."):  # shapes of one layer's experts stand for all
            spec = output_spec(recipe, expected.__getitem__)
            assert (spec.shape, spec.dtype) == (tuple(parameter.shape), parameter.dtype), name
        used += sources(recipe)
    assert sorted(used) == sorted(name for name in expected if not name.startswith("mtp."))


def test_dspark_stages_have_recipes() -> None:
    config = tiny_config(**TINY_DSPARK)
    expected = expected_tensors(config)
    for name, shape in [
        ("mtp.0.main_proj.weight", (64, 192)),
        ("mtp.0.main_norm.weight", (64,)),
        ("mtp.2.markov_head.markov_w1.weight", (160, 16)),
        ("mtp.2.confidence_head.proj.weight", (1, 80)),
        ("mtp.2.hc_head_fn", (4, 256)),
        ("mtp.1.ffn.experts.w13", (12, 64, 64)),
    ]:
        recipe = weight_recipe(config, name, "bfloat16", stored=official_storage(config, name))
        assert output_spec(recipe, expected.__getitem__).shape == shape


@pytest.mark.parametrize(
    ("name", "stored"),
    [("attn.wq_a.weight", "fp8"), ("ffn.experts.w13", "fp4"), ("ffn.gate.weight", "plain"), ("embed.weight", "plain")],
)
def test_official_storage(name: str, stored: Storage) -> None:
    config = tiny_config()
    assert official_storage(config, name) == stored
    assert official_storage(dataclasses.replace(config, quantized=False), name) == "plain"


def test_checkpoint_storage(form: tuple[str, CheckpointReader]) -> None:
    name, reader = form
    assert checkpoint_storage(reader, "layers.0.", "ffn.experts.w13") == name
    assert checkpoint_storage(reader, "layers.0.", "attn.wq_a.weight") == ("plain" if name == "plain" else "fp8")
    assert checkpoint_storage(reader, "layers.0.", "attn_norm.weight") == "plain"


@pytest.mark.parametrize(
    ("parameter", "official"),
    [
        ("layers.3.hc_attn.fn", "layers.3.hc_attn_fn"),
        ("hc_ffn.scale", "hc_ffn_scale"),
        ("head.hc_head.base", "hc_head_base"),
        ("head.head.weight", "head.weight"),
        ("head.weight", "head.weight"),
        ("head.norm.weight", "norm.weight"),
        ("block.attn.wq_a.weight", "attn.wq_a.weight"),
        ("prologue.rope_plain", "rope_plain"),
        ("mtp.2.markov_head.markov_w1.weight", "mtp.2.markov_head.markov_w1.weight"),
        ("mtp.0.norm.weight", "mtp.0.norm.weight"),
    ],
)
def test_region_names_are_dropped(parameter: str, official: str) -> None:
    assert official_parameter(parameter) == official


@pytest.mark.parametrize(
    "name", ["attn.wq_c.weight", "attn.wq_a", "layers.0.ffn.experts.w1", "", "ffn.experts.0.w1.weight"]
)
def test_a_name_that_is_no_parameter_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="is no parameter of DeepSeek-V4"):
        weight_recipe(tiny_config(), name, "float32", stored="fp8")


def test_a_module_of_another_shape_is_refused(form: tuple[str, CheckpointReader]) -> None:
    name, reader = form
    other = DeepseekV4(dataclasses.replace(FORMS[name], vocab_size=161), torch.float32)
    with pytest.raises(RecipeError, match=r"prologue\.embed\.weight is \[161, 64\]"):
        load_parameters(other, FORMS[name], reader, "float32")


def test_bfloat16_is_the_rounding_of_float32(form: tuple[str, CheckpointReader]) -> None:
    """Quantised weights are exact in both, so rounding the float32 values changes nothing."""
    name, reader = form
    stored = checkpoint_storage(reader, "layers.2.", "ffn.experts.w13")
    wide, narrow = (
        evaluate(weight_recipe(FORMS[name], "layers.2.ffn.experts.w13", dtype, stored=stored), reader.load)
        for dtype in ("float32", "bfloat16")
    )
    assert torch.equal(wide.bfloat16(), narrow)
    if name != "plain":
        assert torch.equal(narrow.float(), wide)
