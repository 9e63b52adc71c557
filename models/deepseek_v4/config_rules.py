"""Rules between the keys of a DeepSeek-V4 configuration, over values that `config_schema` found legal on their own."""

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from atomc.models.deepseek_v4.config_schema import RopeScaling, describe

# One rule between keys: a problem, or None.
Rule: TypeAlias = Callable[..., str | None]


def _layers_covered(ratios: tuple[int, ...], layers: int) -> str | None:
    if len(ratios) < layers:
        why = f"has {len(ratios)} entries for {layers} layers"
        return describe("compress_ratios", ratios, why, "at least num_hidden_layers entries")
    if any(ratios[layers:]):
        return describe("compress_ratios", ratios[layers:], "are draft entries that are not 0", "0 for draft blocks")
    return None


def _draft_stages(
    ratios: tuple[int, ...], layers: int, predict: int, block: int | None, rank: int | None, noise: int | None,
    targets: tuple[int, ...],
) -> str | None:  # fmt: skip
    stages = max(len(ratios) - layers, 0)
    given = [block is not None, rank is not None, noise is not None, bool(targets)]
    keys = "dspark_block_size, dspark_markov_rank, dspark_noise_token_id, dspark_target_layer_ids"
    if any(given) and not all(given):
        return describe(keys, (block, rank, noise, targets), "are given in part", "all four (DSpark) or none")
    if all(given) and stages == 0:
        return describe("compress_ratios", ratios, "has no draft entry though dspark_* keys are given", "one 0 a stage")
    if not any(given) and stages not in (0, predict):
        why = f"is not the number of draft entries of compress_ratios ({stages}), and there are no dspark_* keys"
        return describe("num_nextn_predict_layers", predict, why, "the number of MTP blocks")
    if not any(given) and stages > 1:
        return describe("num_nextn_predict_layers", predict, "is not supported without dspark_* keys", "0 or 1")
    return None


def _dspark_targets(targets: tuple[int, ...], layers: int) -> str | None:
    if list(targets) != sorted(set(targets)) or any(layer >= layers for layer in targets):
        legal = f"increasing layer indices below {layers}"
        return describe("dspark_target_layer_ids", targets, "are not layers of this model", legal)
    return None


def _ids_in_vocab(vocab: int, bos: int, eos: int | tuple[int, ...], noise: int | None) -> str | None:
    ids = {"bos_token_id": (bos,), "eos_token_id": eos if isinstance(eos, tuple) else (eos,)}
    if noise is not None:
        ids["dspark_noise_token_id"] = (noise,)
    bad = [(key, value) for key, tokens in ids.items() for value in tokens if value >= vocab]
    return describe(*bad[0], "is outside the vocabulary", f"0 .. {vocab - 1}") if bad else None


def _heads_in_groups(heads: int, groups: int) -> str | None:
    if heads % groups:
        return describe("o_groups", groups, f"does not divide num_attention_heads = {heads}", f"a divisor of {heads}")
    return None


def _rope_width(rope: int, head: int, index_head: int) -> str | None:
    legal = f"an even number from 2 to min(head_dim, index_head_dim) = {min(head, index_head)}"
    if rope % 2:
        return describe("qk_rope_head_dim", rope, "is odd", legal)
    if rope > min(head, index_head):
        return describe("qk_rope_head_dim", rope, "is wider than a head", legal)
    return None


def _experts(topk: int, experts: int) -> str | None:
    if topk > experts:
        return describe("num_experts_per_tok", topk, f"exceeds n_routed_experts = {experts}", f"1 .. {experts}")
    return None


def _hash_layers(hashed: int, layers: int) -> str | None:
    if hashed > layers:
        return describe("num_hash_layers", hashed, f"exceeds num_hidden_layers = {layers}", f"0 .. {layers}")
    return None


def _fp4_groups(quantized: bool, expert_dtype: str, hidden: int, intermediate: int) -> str | None:
    if not quantized or expert_dtype != "fp4" or not (hidden % 32 or intermediate % 32):
        return None
    key, value = ("hidden_size", hidden) if hidden % 32 else ("moe_intermediate_size", intermediate)
    return describe(key, value, "cannot hold fp4 experts, whose scales cover 32 columns", "a multiple of 32")


def _yarn_betas(scaling: RopeScaling | None) -> str | None:
    if scaling is not None and scaling.beta_fast <= scaling.beta_slow:
        legal = f"a number > beta_slow = {scaling.beta_slow:g}"
        return describe("rope_scaling.beta_fast", scaling.beta_fast, "is not above beta_slow", legal)
    return None


_RULES: Final[tuple[tuple[tuple[str, ...], Rule], ...]] = (
    (("compress_ratios", "num_hidden_layers"), _layers_covered),
    (
        (
            "compress_ratios", "num_hidden_layers", "num_nextn_predict_layers", "dspark_block_size",
            "dspark_markov_rank", "dspark_noise_token_id", "dspark_target_layer_ids",
        ),
        _draft_stages,
    ),
    (("dspark_target_layer_ids", "num_hidden_layers"), _dspark_targets),
    (("vocab_size", "bos_token_id", "eos_token_id", "dspark_noise_token_id"), _ids_in_vocab),
    (("num_attention_heads", "o_groups"), _heads_in_groups),
    (("qk_rope_head_dim", "head_dim", "index_head_dim"), _rope_width),
    (("num_experts_per_tok", "n_routed_experts"), _experts),
    (("num_hash_layers", "num_hidden_layers"), _hash_layers),
    (("quantized", "expert_dtype", "hidden_size", "moe_intermediate_size"), _fp4_groups),
    (("rope_scaling",), _yarn_betas),
)  # fmt: skip


def cross_problems(values: Mapping[str, Any]) -> list[str]:
    """Problems between values; a rule whose values are not all there (they had problems themselves) is left out."""
    found = [rule(*(values[key] for key in keys)) for keys, rule in _RULES if all(key in values for key in keys)]
    return [problem for problem in found if problem is not None]
