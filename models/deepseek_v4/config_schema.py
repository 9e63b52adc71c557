"""What a legal key of a DeepSeek-V4 configuration is: type and range (spec 1.2, 1.3).

`read_values` turns the official `config.json` dictionary into checked values and collects every problem on the way: the
caller raises one `ConfigError`. The rules between keys are in `config_rules`.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final

CSA_RATIO: Final = 4
REQUIRED: Final = object()

_HIGHEST: Final = 2**48  # far beyond any size that can exist

_short = reprlib.Repr()
_short.maxlist = _short.maxtuple = _short.maxdict = 8


@dataclass(frozen=True)
class RopeScaling:
    """YaRN of the layers with a compressor (spec 2.2); no magnitude scaling, no softmax correction."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Number:
    """Legal values of a numeric key; `low` is inclusive unless `above` is set."""

    kind: type
    low: float
    above: bool = False
    default: Any = REQUIRED

    def problem(self, key: str, value: object) -> str | None:
        accepted = (int,) if self.kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, accepted):
            return describe(key, value, f"is {_type_name(value)}, not {self._noun}", self.legal)
        if isinstance(value, float) and not math.isfinite(value):
            return describe(key, value, "is not finite", self.legal)
        if value > _HIGHEST:
            return describe(key, value, "is too large", f"{self.legal} and <= {_HIGHEST}")
        if value < self.low or (self.above and value == self.low):
            return describe(key, value, "is too small", self.legal)
        return None

    @property
    def _noun(self) -> str:
        return "an integer" if self.kind is int else "a number"

    @property
    def legal(self) -> str:
        return f"{self._noun} {'>' if self.above else '>='} {self.low:g}"


def _size(low: int = 1) -> Number:
    return Number(int, low)


_POSITIVE: Final = Number(float, 0, above=True)

NUMBERS: Final[Mapping[str, Number]] = {
    "vocab_size": _size(),
    "hidden_size": _size(),
    "num_hidden_layers": _size(),
    "num_attention_heads": _size(),
    "head_dim": _size(),
    "qk_rope_head_dim": _size(2),
    "q_lora_rank": _size(),
    "o_groups": _size(),
    "o_lora_rank": _size(),
    "sliding_window": _size(),
    "max_position_embeddings": _size(),
    "rope_theta": Number(float, 1, above=True),
    "compress_rope_theta": Number(float, 1, above=True),
    "index_n_heads": _size(),
    "index_head_dim": _size(),
    "index_topk": _size(),
    "n_routed_experts": _size(),
    "num_experts_per_tok": _size(),
    "moe_intermediate_size": _size(),
    "num_hash_layers": _size(0),
    "routed_scaling_factor": _POSITIVE,
    "swiglu_limit": _POSITIVE,
    "hc_mult": _size(),
    "hc_sinkhorn_iters": _size(),
    "hc_eps": Number(float, 0),
    "rms_norm_eps": _POSITIVE,
    "num_nextn_predict_layers": _size(0),
    "bos_token_id": _size(0),
    "dspark_block_size": Number(int, 1, default=None),
    "dspark_noise_token_id": Number(int, 0, default=None),
    "dspark_markov_rank": Number(int, 1, default=None),
}

# Keys with one supported value. They may be absent (this value is then meant), never different.
FIXED: Final[Mapping[str, Any]] = {
    "model_type": "deepseek_v4",
    "hidden_act": "silu",
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "num_key_value_heads": 1,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
_FIXED_IF_PRESENT: Final[Mapping[str, Any]] = {**FIXED, "mlp_bias": False}

QUANTIZATION: Final[Mapping[str, Any]] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
EXPERT_DTYPES: Final = ("fp4", "fp8")

_YARN: Final[Mapping[str, Number]] = {
    "factor": Number(float, 1),
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "original_max_position_embeddings": _size(),
}


def describe(key: str, value: object, why: str, legal: str) -> str:
    """The one form of a configuration problem: key, value, why, legal range."""
    return f"{key} = {_short.repr(value)} {why}; legal: {legal}"


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__


def read_values(raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Checked field values of the official form; a field with a problem is left out and reported in `problems`."""
    values: dict[str, Any] = {}
    for key, number in NUMBERS.items():
        _read_number(raw, key, number, values, problems)
    _check_fixed(raw, problems)
    _read_ratios(raw, values, problems)
    _read_eos(raw, values, problems)
    _read_rope_scaling(raw, values, problems)
    _read_quantization(raw, values, problems)
    _read_dspark_targets(raw, values, problems)
    return values


def _missing(raw: Mapping[str, Any], key: str, legal: str) -> str:
    similar = get_close_matches(key, [str(k) for k in raw if k not in NUMBERS and k not in FIXED], n=1, cutoff=0.8)
    hint = f" (did you mean it by {similar[0]!r}?)" if similar else ""
    return f"{key} is missing{hint}; legal: {legal}"


def _read_number(raw: Mapping[str, Any], key: str, number: Number, values: dict[str, Any], problems: list[str]) -> None:
    if key not in raw:
        if number.default is REQUIRED:
            problems.append(_missing(raw, key, number.legal))
        else:
            values[key] = number.default
        return
    value = raw[key]
    if value is None and number.default is None:
        values[key] = None
        return
    problem = number.problem(key, value)
    if problem is not None:
        problems.append(problem)
    else:
        values[key] = float(value) if number.kind is float else value


def _check_fixed(raw: Mapping[str, Any], problems: list[str]) -> None:
    if "model_type" not in raw:
        problems.append(_missing(raw, "model_type", "'deepseek_v4'"))
    for key, only in _FIXED_IF_PRESENT.items():
        if key in raw and (raw[key] != only or isinstance(raw[key], bool) is not isinstance(only, bool)):
            problems.append(describe(key, raw[key], "is not supported", f"only {only!r}"))
    architectures = raw.get("architectures")
    if architectures is not None and architectures != ["DeepseekV4ForCausalLM"]:
        problems.append(describe("architectures", architectures, "is not supported", "['DeepseekV4ForCausalLM']"))


def int_list(value: object) -> tuple[int, ...] | None:
    """The value as a tuple of non-negative integers, or None if it is anything else."""
    if not isinstance(value, list | tuple):
        return None
    good = all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value)
    return tuple(value) if good else None


def _read_ratios(raw: Mapping[str, Any], values: dict[str, Any], problems: list[str]) -> None:
    legal = "a list of integers >= 0, one per layer (0 = SWA, 4 = CSA, one other value >= 2 = HCA), then draft zeros"
    if "compress_ratios" not in raw:
        problems.append(_missing(raw, "compress_ratios", legal))
        return
    ratios = int_list(raw["compress_ratios"])
    if ratios is None:
        problems.append(describe("compress_ratios", raw["compress_ratios"], "has the wrong type", legal))
        return
    hca = sorted({ratio for ratio in ratios if ratio not in (0, CSA_RATIO)})
    if len(hca) > 1:
        problems.append(describe("compress_ratios", ratios, f"has several HCA ratios {hca}", legal))
    elif hca == [1]:
        problems.append(describe("compress_ratios", ratios, "has ratio 1, which compresses nothing", legal))
    else:
        values["compress_ratios"] = ratios


def _read_eos(raw: Mapping[str, Any], values: dict[str, Any], problems: list[str]) -> None:
    legal = "a token id, or a non-empty list of token ids"
    if "eos_token_id" not in raw:
        problems.append(_missing(raw, "eos_token_id", legal))
        return
    value = raw["eos_token_id"]
    ids = int_list([value]) if isinstance(value, int) else int_list(value)
    if not ids:
        problems.append(describe("eos_token_id", value, "is not a token id", legal))
    else:
        values["eos_token_id"] = ids[0] if isinstance(value, int) else ids


def _read_rope_scaling(raw: Mapping[str, Any], values: dict[str, Any], problems: list[str]) -> None:
    legal = f"null, or {{type: 'yarn', {', '.join(_YARN)}}}"
    if "rope_scaling" not in raw:
        problems.append(_missing(raw, "rope_scaling", legal))
        return
    scaling = raw["rope_scaling"]
    if scaling is None:
        values["rope_scaling"] = None
        return
    if not isinstance(scaling, Mapping):
        problems.append(describe("rope_scaling", scaling, "has the wrong type", legal))
        return
    found = len(problems)
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "yarn":
        problems.append(describe("rope_scaling.type", kind, "is not supported", "'yarn'"))
    unknown = sorted(set(scaling) - set(_YARN) - {"type", "rope_type", "attention_factor"})
    if unknown:
        problems.append(describe("rope_scaling", scaling, f"has unsupported keys {unknown}", legal))
    if scaling.get("attention_factor", 1.0) != 1.0:
        problems.append(describe("rope_scaling.attention_factor", scaling["attention_factor"], "is not 1", "only 1.0"))
    numbers: dict[str, Any] = {}
    for key, number in _YARN.items():
        renamed = {f"rope_scaling.{k}": v for k, v in scaling.items()}
        _read_number(renamed, f"rope_scaling.{key}", number, numbers, problems)
    if len(problems) == found:
        values["rope_scaling"] = RopeScaling(**{key.removeprefix("rope_scaling."): v for key, v in numbers.items()})


def _read_quantization(raw: Mapping[str, Any], values: dict[str, Any], problems: list[str]) -> None:
    quantization = raw.get("quantization_config")
    if quantization is not None and not isinstance(quantization, Mapping):
        legal = f"absent, null or {dict(QUANTIZATION)}"
        problems.append(describe("quantization_config", quantization, "has the wrong type", legal))
        return
    for key, only in QUANTIZATION.items():
        value = (quantization or {}).get(key, only)
        if (list(value) if isinstance(value, tuple) else value) != only:
            problems.append(describe(f"quantization_config.{key}", value, "is not supported", f"only {only!r}"))
    values["quantized"] = quantization is not None
    values["weight_block_size"] = (128, 128)
    _read_expert_dtype(raw, quantization, values, problems)


def _read_expert_dtype(
    raw: Mapping[str, Any], quantization: Mapping[str, Any] | None, values: dict[str, Any], problems: list[str]
) -> None:
    legal = "'fp4' or 'fp8'"
    inner = (quantization or {}).get("expert_dtype")
    expert_dtype = raw.get("expert_dtype", inner)
    if quantization is None and expert_dtype is None:
        expert_dtype = "fp4"  # without quantisation nothing reads it
    if expert_dtype is None:
        problems.append(_missing(raw, "expert_dtype", legal))
    elif expert_dtype not in EXPERT_DTYPES:
        problems.append(describe("expert_dtype", expert_dtype, "is unknown", legal))
    elif inner not in (None, expert_dtype):
        problems.append(describe("quantization_config.expert_dtype", inner, f"contradicts {expert_dtype!r}", legal))
    else:
        values["expert_dtype"] = expert_dtype


def _read_dspark_targets(raw: Mapping[str, Any], values: dict[str, Any], problems: list[str]) -> None:
    key = "dspark_target_layer_ids"
    targets = int_list(raw.get(key) or ())
    if targets is None:
        problems.append(describe(key, raw[key], "has the wrong type", "a list of layer indices"))
    else:
        values[key] = targets
