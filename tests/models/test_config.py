"""The configuration: every released form is read, every illegal value refused with key, value, why and legal range."""

import dataclasses
import json
import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.deepseek_v4 import DeepseekV4Config as TransformersConfig

from atomc.errors import ConfigError
from atomc.models.bundled import bundled_config, bundled_names, bundled_path
from atomc.models.deepseek_v4.config import DeepseekV4Config, LayerKind, RopeScaling, load_config
from atomc.models.deepseek_v4.config_schema import FIXED, NUMBERS
from tests.support.tiny import TINY, TINY_DSPARK, tiny_config, tiny_dict

DSPARK = {
    "flash": {"dspark_target_layer_ids": [40, 41, 42], "dspark_markov_rank": 256},
    "pro": {"dspark_target_layer_ids": [58, 59, 60], "dspark_markov_rank": 512},
}
REMOVED = object()


def official(size: str) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(bundled_path(f"deepseek-v4-{size}").read_text())
    return raw


def dspark(size: str) -> dict[str, Any]:
    raw = official(size)
    ratios = [*raw["compress_ratios"], 0, 0]
    return {
        **raw,
        **DSPARK[size],
        "compress_ratios": ratios,
        "dspark_block_size": 5,
        "dspark_noise_token_id": 128799,
    }


def refused(raw: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        DeepseekV4Config.from_dict(raw, "some/config.json")
    assert caught.value.exit_code == 3
    assert "some/config.json" in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("size", "kinds", "entries"),
    [("flash", {"swa": 2, "csa": 21, "hca": 20}, 44), ("pro", {"csa": 30, "hca": 31}, 62)],
)
def test_releases_have_the_published_layers(size: str, kinds: dict[str, int], entries: int) -> None:
    config = bundled_config(f"deepseek-v4-{size}")
    layers = [config.layer_kind(i) for i in range(config.num_hidden_layers)]
    assert Counter(layer.attention for layer in layers) == kinds
    assert [layer.moe for layer in layers] == ["hash"] * 3 + ["topk"] * (config.num_hidden_layers - 3)
    assert len(config.compress_ratios) == entries
    assert (config.csa_ratio, config.hca_ratio, config.num_draft_stages) == (4, 128, 1)
    assert config.layer_kind(config.draft_layers[0]) == LayerKind("swa", "topk")
    assert config.rope_scaling == RopeScaling(16.0, 32.0, 1.0, 65536)
    assert config.num_attention_heads * config.head_dim // config.o_groups == 4096


def test_first_layers_of_pro_are_hca_with_hash_routing() -> None:
    config = bundled_config("deepseek-v4-pro")
    assert [config.layer_kind(i).attention for i in range(4)] == ["hca", "hca", "csa", "hca"]


@pytest.mark.parametrize("size", ["flash", "pro"])
@pytest.mark.parametrize("variant", ["instruct", "base", "dspark"])
def test_official_files_round_trip_exactly(size: str, variant: str) -> None:
    raw = {"instruct": official, "base": official, "dspark": dspark}[variant](size)
    if variant == "base":
        raw["expert_dtype"] = "fp8"
    config = DeepseekV4Config.from_dict(raw)
    assert config.to_dict() == raw
    assert DeepseekV4Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(DeepseekV4Config.from_dict(raw))


def test_dspark_stages_come_from_the_trailing_zeros() -> None:
    config = DeepseekV4Config.from_dict(dspark("flash"))
    assert config.num_nextn_predict_layers == 1
    assert config.num_draft_stages == 3
    assert config.is_dspark
    assert list(config.draft_layers) == [43, 44, 45]
    assert [config.layer_prefix(i) for i in (42, 43, 45)] == ["layers.42.", "mtp.0.", "mtp.2."]
    assert not bundled_config("deepseek-v4-flash").is_dspark


def test_without_draft_entries_there_is_no_draft_block() -> None:
    config = tiny_config(compress_ratios=TINY["compress_ratios"][:6])
    assert config.num_draft_stages == 0
    assert list(config.draft_layers) == []


def test_optional_features_may_be_off() -> None:
    config = tiny_config(rope_scaling=None, compress_ratios=[0] * 6, num_hash_layers=0, eos_token_id=[1, 2])
    assert config.rope_scaling is None
    assert (config.csa_ratio, config.hca_ratio) == (0, 0)
    assert config.eos_token_ids == (1, 2)
    assert DeepseekV4Config.from_dict(config.to_dict()) == config
    plain = DeepseekV4Config.from_dict(edited(quantization_config=REMOVED, expert_dtype=REMOVED))
    assert not plain.quantized
    assert "quantization_config" not in plain.to_dict()


def test_layer_kind_refuses_indices_outside_the_model() -> None:
    with pytest.raises(IndexError, match="layer 7 of 7"):
        tiny_config().layer_kind(7)


@pytest.mark.parametrize("raw", [official("flash"), official("pro"), TINY], ids=["flash", "pro", "tiny"])
def test_what_transformers_makes_of_the_official_file_is_read_back(raw: dict[str, Any]) -> None:
    if raw is TINY:  # transformers knows only ratio 128
        raw = tiny_dict(compress_ratios=[128 if ratio == 16 else ratio for ratio in TINY["compress_ratios"]])
    theirs = TransformersConfig(**json.loads(json.dumps(raw))).to_dict()
    ours = DeepseekV4Config.from_dict(raw)
    main_only = dataclasses.replace(ours, compress_ratios=ours.compress_ratios[: ours.num_hidden_layers])
    assert DeepseekV4Config.from_dict(theirs) == main_only


def test_our_transformers_form_means_the_same_to_transformers() -> None:
    config = tiny_config()
    raw = json.loads(json.dumps(config.to_transformers_dict()))
    theirs = TransformersConfig(**raw)
    again = DeepseekV4Config.from_dict(theirs.to_dict())
    assert again == dataclasses.replace(config, compress_ratios=config.compress_ratios[:6])
    assert theirs.rope_parameters["compress"]["attention_factor"] == 1.0
    assert theirs.qk_rope_head_dim == 16


def edited(**edits: Any) -> dict[str, Any]:
    raw = tiny_dict(**edits)
    return {key: value for key, value in raw.items() if value is not REMOVED}


REQUIRED = [
    *(key for key in NUMBERS if not key.startswith("dspark_")),
    "compress_ratios",
    "eos_token_id",
    "rope_scaling",
    "expert_dtype",
    "model_type",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str) -> None:
    error = refused(edited(**{key: REMOVED}))
    assert len(error.problems) == 1
    assert error.problems[0].startswith(f"{key} is missing")
    assert "legal:" in error.problems[0]


def test_a_misspelt_key_is_recognised() -> None:
    error = refused(edited(hidden_size=REMOVED, hiden_size=64))
    assert "did you mean it by 'hiden_size'?" in str(error)


@pytest.mark.parametrize("key", [key for key in NUMBERS if not key.startswith("dspark_")])
@pytest.mark.parametrize("value", [-1, "64", None, True, [64], math.nan, 2**60, 1.5])
def test_a_number_of_the_wrong_type_or_range_is_refused(key: str, value: Any) -> None:
    if value == 1.5 and NUMBERS[key].kind is float:
        return
    error = refused(edited(**{key: value}))
    assert any(problem.startswith(f"{key} = ") and "legal:" in problem for problem in error.problems)


@pytest.mark.parametrize("key", list(FIXED))
def test_a_key_with_one_supported_value_refuses_others(key: str) -> None:
    other = {str: "other", bool: not FIXED[key], int: 2, float: 0.5}[type(FIXED[key])]
    error = refused(edited(**{key: other}))
    assert error.problems == (f"{key} = {other!r} is not supported; legal: only {FIXED[key]!r}",)


@pytest.mark.parametrize(
    ("edits", "fragments"),
    [
        ({"o_groups": 3}, ["o_groups = 3", "num_attention_heads = 8"]),
        ({"num_experts_per_tok": 13}, ["num_experts_per_tok = 13", "n_routed_experts = 12", "1 .. 12"]),
        ({"compress_ratios": [0, 4]}, ["compress_ratios = (0, 4)", "2 entries for 6 layers"]),
        ({"compress_ratios": [0, 8, 4, 16, 4, 0, 0]}, ["several HCA ratios [8, 16]"]),
        ({"compress_ratios": [0, 1, 4, 1, 4, 0, 0]}, ["ratio 1"]),
        ({"compress_ratios": [0, 16, 4, 16, 4, 0, 4]}, ["draft entries that are not 0"]),
        ({"compress_ratios": [0, 16, -4, 16, 4, 0, 0]}, ["compress_ratios", "wrong type"]),
        ({"compress_ratios": [0, 16, 4.0, 16, 4, 0, 0]}, ["compress_ratios", "wrong type"]),
        ({"compress_ratios": "0,4"}, ["compress_ratios = '0,4'"]),
        ({"compress_ratios": [0, 16, 4, 16, 4, 0, 0, 0]}, ["num_nextn_predict_layers = 1", "(2)", "dspark_* keys"]),
        ({"compress_ratios": [0] * 8, "num_nextn_predict_layers": 2}, ["not supported without dspark_* keys"]),
        ({"qk_rope_head_dim": 15}, ["qk_rope_head_dim = 15 is odd"]),
        ({"qk_rope_head_dim": 34}, ["qk_rope_head_dim = 34", "wider than a head", "= 32"]),
        ({"num_hash_layers": 7}, ["num_hash_layers = 7", "num_hidden_layers = 6"]),
        ({"hidden_size": 72}, ["hidden_size = 72", "fp4", "multiple of 32"]),
        ({"moe_intermediate_size": 40}, ["moe_intermediate_size = 40", "fp4", "multiple of 32"]),
        ({"expert_dtype": "int4"}, ["expert_dtype = 'int4' is unknown", "'fp4' or 'fp8'"]),
        ({"scoring_func": "softmax"}, ["scoring_func = 'softmax'", "sqrtsoftplus"]),
        ({"mlp_bias": True}, ["mlp_bias = True"]),
        ({"architectures": ["LlamaForCausalLM"]}, ["architectures", "LlamaForCausalLM"]),
        ({"bos_token_id": 160}, ["bos_token_id = 160", "0 .. 159"]),
        ({"eos_token_id": [1, 400]}, ["eos_token_id = 400", "0 .. 159"]),
        ({"eos_token_id": []}, ["eos_token_id = []"]),
        ({"eos_token_id": "1"}, ["eos_token_id = '1'"]),
        ({"eos_token_id": True}, ["eos_token_id = True"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling = 'yarn'"]),
        ({"rope_scaling": {**TINY["rope_scaling"], "type": "linear"}}, ["rope_scaling.type = 'linear'"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling.factor is missing", "beta_fast is missing"]),
        ({"rope_scaling": {**TINY["rope_scaling"], "factor": 0.5}}, ["rope_scaling.factor = 0.5", ">= 1"]),
        ({"rope_scaling": {**TINY["rope_scaling"], "beta_fast": 1}}, ["rope_scaling.beta_fast = 1.0"]),
        ({"rope_scaling": {**TINY["rope_scaling"], "mscale": 2}}, ["unsupported keys ['mscale']"]),
        ({"rope_scaling": {**TINY["rope_scaling"], "attention_factor": 1.2}}, ["attention_factor = 1.2"]),
        ({"quantization_config": "fp8"}, ["quantization_config = 'fp8'"]),
        (
            {"quantization_config": {**TINY["quantization_config"], "weight_block_size": [32, 32]}},
            ["quantization_config.weight_block_size = [32, 32]", "[128, 128]"],
        ),
        (
            {"quantization_config": {**TINY["quantization_config"], "expert_dtype": "fp8"}},
            ["quantization_config.expert_dtype = 'fp8'", "contradicts 'fp4'"],
        ),
        ({"dspark_block_size": 5}, ["given in part", "all four"]),
        ({**TINY_DSPARK, "compress_ratios": TINY["compress_ratios"][:6]}, ["no draft entry"]),
        ({**TINY_DSPARK, "dspark_target_layer_ids": [3, 4, 6]}, ["dspark_target_layer_ids", "below 6"]),
        ({**TINY_DSPARK, "dspark_target_layer_ids": [4, 3]}, ["dspark_target_layer_ids", "increasing"]),
        ({**TINY_DSPARK, "dspark_target_layer_ids": "345"}, ["dspark_target_layer_ids = '345'"]),
        ({**TINY_DSPARK, "dspark_noise_token_id": 999}, ["dspark_noise_token_id = 999"]),
        ({**TINY_DSPARK, "dspark_block_size": 0}, ["dspark_block_size = 0"]),
    ],
)
def test_an_illegal_value_says_key_value_why_and_range(edits: dict[str, Any], fragments: list[str]) -> None:
    error = refused(edited(**edits))
    for fragment in fragments:
        assert fragment in str(error)


def test_all_problems_come_in_one_error() -> None:
    error = refused(edited(o_groups=3, num_experts_per_tok=99, hidden_act="gelu", head_dim=0, vocab_size=REMOVED))
    assert len(error.problems) == 5
    assert "5 problems" in str(error)


def test_a_long_list_is_cut_after_twenty_with_a_count() -> None:
    error = refused({"model_type": "deepseek_v4"})
    assert len(error.problems) > 20
    assert f"and {len(error.problems) - 20} more" in str(error)
    assert str(error).count("\n  - ") == 20


@pytest.mark.parametrize("raw", [[], None, "text", 3])
def test_a_file_that_is_no_object_is_refused(raw: Any) -> None:
    assert "not an object" in str(refused(raw))


def transformers_form(**edits: Any) -> dict[str, Any]:
    raw = {**tiny_config().to_transformers_dict(), **edits}
    return {key: value for key, value in raw.items() if value is not REMOVED}


@pytest.mark.parametrize(
    ("edits", "fragments"),
    [
        ({"layer_types": ["full_attention"] * 6}, ["layer_types", "sliding_attention"]),
        ({"layer_types": REMOVED}, ["layer_types = None"]),
        ({"layer_types": ["sliding_attention"]}, ["1 entries for 6 layers"]),
        ({"compress_rates": REMOVED}, ["compress_rates = None"]),
        ({"compress_rates": {"compressed_sparse_attention": 8, "heavily_compressed_attention": 16}}, ["= 8", "only 4"]),
        ({"compress_rates": {"compressed_sparse_attention": 4}}, ["heavily_compressed_attention = None"]),
        ({"mlp_layer_types": ["moe", "hash_moe"] * 3}, ["hash_moe after moe"]),
        ({"mlp_layer_types": ["dense"] * 6}, ["mlp_layer_types"]),
        ({"mlp_layer_types": ["moe"]}, ["1 entries"]),
        ({"rope_parameters": {"rope_theta": 1}}, ["rope_parameters", "main"]),
        ({"rope_theta": 77.0}, ["rope_theta = 77.0", "contradicts"]),
        ({"qk_rope_head_dim": 24}, ["qk_rope_head_dim = 24", "contradicts partial_rotary_factor"]),
        ({"partial_rotary_factor": 1.5}, ["partial_rotary_factor = 1.5"]),
    ],
)
def test_the_transformers_form_is_checked_too(edits: dict[str, Any], fragments: list[str]) -> None:
    error = refused(transformers_form(**edits))
    for fragment in fragments:
        assert fragment in str(error)


def test_the_transformers_form_may_lack_the_redundant_rope_width() -> None:
    config = DeepseekV4Config.from_dict(transformers_form(qk_rope_head_dim=REMOVED))
    assert config.qk_rope_head_dim == 16
    assert DeepseekV4Config.from_dict(transformers_form(partial_rotary_factor=REMOVED)) == config


def test_replace_is_checked_as_well() -> None:
    with pytest.raises(ConfigError, match="o_groups = 3"):
        dataclasses.replace(tiny_config(), o_groups=3)


def test_load_config_reads_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert load_config(tmp_path) == load_config(tmp_path / "config.json") == tiny_config()
    with pytest.raises(ConfigError, match=r"absent/config\.json does not exist|absent does not exist"):
        load_config(tmp_path / "absent")
    for text in ("{", '"\ud800'.encode("utf-8", "surrogatepass").decode("latin-1"), ""):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="cannot be read as JSON"):
            load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "rope_theta": math.nan}))
    with pytest.raises(ConfigError, match="rope_theta = nan is not finite"):
        load_config(tmp_path)


def test_bundled_names() -> None:
    assert bundled_names() == ["deepseek-v4-flash", "deepseek-v4-nano", "deepseek-v4-pro"]
    with pytest.raises(ConfigError, match="bundled: deepseek-v4-flash"):
        bundled_config("deepseek-v5")


def test_errors_survive_pickling() -> None:
    error = refused(edited(o_groups=3))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.problems) == (str(error), error.problems)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ALL_KEYS = sorted({*TINY, *TINY_DSPARK, *FIXED, *tiny_config().to_transformers_dict()})


@given(st.dictionaries(st.sampled_from(ALL_KEYS), json_values, max_size=4), st.sampled_from(["official", "hf"]))
def test_any_json_gives_a_configuration_or_a_config_error(edits: dict[str, Any], form: str) -> None:
    raw = {**(TINY if form == "official" else tiny_config().to_transformers_dict()), **edits}
    try:
        config = DeepseekV4Config.from_dict(raw)
    except ConfigError:
        return
    assert DeepseekV4Config.from_dict(config.to_dict()) == config


@given(
    st.fixed_dictionaries(
        {
            "num_attention_heads": st.sampled_from([2, 4, 8]),
            "o_groups": st.sampled_from([1, 2, 3]),
            "compress_ratios": st.lists(st.sampled_from([0, 4, 16]), min_size=4, max_size=9),
            "num_hash_layers": st.integers(0, 8),
            "expert_dtype": st.sampled_from(["fp4", "fp8"]),
            "moe_intermediate_size": st.sampled_from([32, 48, 64]),
        }
    )
)
def test_legality_is_what_the_rules_say(edits: dict[str, Any]) -> None:
    ratios = edits["compress_ratios"]
    legal = (
        edits["num_attention_heads"] % edits["o_groups"] == 0
        and len(ratios) in (6, 7)
        and not any(ratios[6:])
        and edits["num_hash_layers"] <= 6
        and (edits["expert_dtype"] == "fp8" or edits["moe_intermediate_size"] % 32 == 0)
    )
    try:
        DeepseekV4Config.from_dict(edited(**edits))
    except ConfigError:
        assert not legal
    else:
        assert legal
