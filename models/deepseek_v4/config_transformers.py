"""The form of the configuration that transformers writes, to and from the official keys (spec 1.4).

transformers drops the draft blocks, so its form has none: neither trailing compress_ratios nor `dspark_*` keys.
"""

from collections.abc import Mapping
from typing import Any, Final

from atomc.models.deepseek_v4.config_schema import CSA_RATIO, describe

_SWA, _CSA, _HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
_LAYER_TYPES: Final = (_SWA, _CSA, _HCA)
_MLP_TYPES: Final = ("hash_moe", "moe")
_OWN_KEYS: Final = ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters", "partial_rotary_factor")
_PER_ROPE: Final = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def is_transformers_form(raw: Mapping[str, Any]) -> bool:
    """Whether the keys are transformers'; a file with `compress_ratios` is official whatever else it has."""
    return "compress_ratios" not in raw and any(key in raw for key in _OWN_KEYS)


def official_from_transformers(raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The official keys of transformers' form; what cannot be renamed is left out and reported in `problems`."""
    official = {key: value for key, value in raw.items() if key not in _OWN_KEYS and not key.startswith("dspark_")}
    if official.get("architectures", ()) is None:
        del official["architectures"]
    for read in (_read_ratios, _read_hash_layers, _read_rope, _read_rope_width):
        read(raw, official, problems)
    return official


def _read_ratios(raw: Mapping[str, Any], official: dict[str, Any], problems: list[str]) -> None:
    types, rates = raw.get("layer_types"), raw.get("compress_rates")
    legal = f"one of {', '.join(_LAYER_TYPES)} per layer"
    official["compress_ratios"] = []  # always set: `compress_ratios is missing` would name a key the user never wrote
    if not isinstance(types, list | tuple) or any(kind not in _LAYER_TYPES for kind in types):
        problems.append(describe("layer_types", types, "is not a list of layer types", legal))
        return
    if not isinstance(rates, Mapping):
        problems.append(describe("compress_rates", rates, "is not an object", f"{{{_CSA}: 4, {_HCA}: 128}}"))
        return
    if _CSA in types and rates.get(_CSA) != CSA_RATIO:
        problems.append(describe(f"compress_rates.{_CSA}", rates.get(_CSA), "is not supported", "only 4"))
    hca = rates.get(_HCA)
    if _HCA in types and (not isinstance(hca, int) or isinstance(hca, bool) or hca < 2 or hca == CSA_RATIO):
        problems.append(describe(f"compress_rates.{_HCA}", hca, "is no HCA ratio", "an integer >= 2 other than 4"))
        return
    ratio = {_SWA: 0, _CSA: CSA_RATIO, _HCA: hca}
    official["compress_ratios"] = [ratio[kind] for kind in types]


def _read_hash_layers(raw: Mapping[str, Any], official: dict[str, Any], problems: list[str]) -> None:
    types = raw.get("mlp_layer_types")
    if not isinstance(types, list | tuple) or any(kind not in _MLP_TYPES for kind in types):
        problems.append(describe("mlp_layer_types", types, "is not a list of MoE types", "hash_moe or moe per layer"))
        return
    hashed = list(types).count("hash_moe")
    if "moe" in types[:hashed]:
        legal = "all hash_moe entries before the first moe"
        problems.append(describe("mlp_layer_types", types, "has hash_moe after moe", legal))
    if len(types) != raw.get("num_hidden_layers", len(types)):
        problems.append(describe("mlp_layer_types", types, f"has {len(types)} entries", "num_hidden_layers entries"))
    official["num_hash_layers"] = hashed


def _read_rope(raw: Mapping[str, Any], official: dict[str, Any], problems: list[str]) -> None:
    parameters = raw.get("rope_parameters")
    parts = parameters if isinstance(parameters, Mapping) else {}
    main, compress = parts.get("main"), parts.get("compress")
    if not isinstance(main, Mapping) or not isinstance(compress, Mapping):
        problems.append(describe("rope_parameters", parameters, "has the wrong form", "{main: {...}, compress: {...}}"))
        return
    if main.get("rope_type", "default") != "default":
        problems.append(describe("rope_parameters.main.rope_type", main["rope_type"], "is not supported", "'default'"))
    for key, part, name in (("rope_theta", main, "main"), ("compress_rope_theta", compress, "compress")):
        theta = part.get("rope_theta", raw.get(key))
        if raw.get(key, theta) != theta:
            problems.append(describe(key, raw[key], f"contradicts rope_parameters.{name}.rope_theta", f"{theta!r}"))
        if theta is not None:
            official[key] = theta
    kind = compress.get("rope_type", compress.get("type", "default"))
    scaling = {key: value for key, value in compress.items() if key not in _PER_ROPE}
    official["rope_scaling"] = None if kind == "default" else {"type": kind, **scaling}


def _read_rope_width(raw: Mapping[str, Any], official: dict[str, Any], problems: list[str]) -> None:
    head_dim, factor = raw.get("head_dim"), raw.get("partial_rotary_factor")
    if not isinstance(head_dim, int) or ("qk_rope_head_dim" in raw and factor is None):
        return
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        problems.append(describe("partial_rotary_factor", factor, "is not a fraction", "a number in (0, 1]"))
        return
    width = round(head_dim * factor)
    if raw.get("qk_rope_head_dim", width) != width:
        why = f"contradicts partial_rotary_factor = {factor} of head_dim = {head_dim}"
        problems.append(describe("qk_rope_head_dim", raw["qk_rope_head_dim"], why, str(width)))
    official["qk_rope_head_dim"] = width


def transformers_from_official(official: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' form of a complete, legal official dictionary; draft blocks are dropped."""
    renamed = ("compress_ratios", "num_hash_layers", "rope_scaling")
    raw = {key: value for key, value in official.items() if key not in renamed and not key.startswith("dspark_")}
    layers, hashed = official["num_hidden_layers"], official["num_hash_layers"]
    ratios = official["compress_ratios"][:layers]
    hca = next((ratio for ratio in ratios if ratio not in (0, CSA_RATIO)), 128)
    fraction = official["qk_rope_head_dim"] / official["head_dim"]
    yarn = official["rope_scaling"]
    main = {"rope_type": "default", "rope_theta": official["rope_theta"], "partial_rotary_factor": fraction}
    scaling = {"rope_type": "default"} if yarn is None else {**yarn, "rope_type": "yarn", "attention_factor": 1.0}
    compress = {**scaling, "rope_theta": official["compress_rope_theta"], "partial_rotary_factor": fraction}
    raw["layer_types"] = [_SWA if ratio == 0 else _CSA if ratio == CSA_RATIO else _HCA for ratio in ratios]
    raw["mlp_layer_types"] = ["hash_moe"] * hashed + ["moe"] * (layers - hashed)
    raw["compress_rates"] = {_CSA: CSA_RATIO, _HCA: hca}
    raw["rope_parameters"] = {"main": main, "compress": compress}
    raw["partial_rotary_factor"] = fraction
    if "quantization_config" in raw:
        raw["quantization_config"] = {**raw["quantization_config"], "expert_dtype": raw["expert_dtype"]}
    return raw
