"""The dense forward of deepseek-v4-nano against transformers' `DeepseekV4ForCausalLM`, in fp32 on the CPU."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from atomc.models.nano.config import NanoConfig, YarnScaling
from atomc.models.nano.dense import forward
from atomc.models.nano.weights import initial_weights

TINY = NanoConfig(
    vocab_size=96, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, head_dim=32, qk_rope_head_dim=16,
    q_lora_rank=24, o_groups=2, o_lora_rank=16, sliding_window=16, compress_ratios=(0, 4, 8, 4, 8, 4, 0),
    rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=64), max_position_embeddings=256,
    index_n_heads=4, index_head_dim=32, index_topk=6, n_routed_experts=8, num_experts_per_tok=3, num_hash_layers=2,
    moe_intermediate_size=32, swiglu_limit=0.6,
)  # fmt: skip

RENAMES = (
    (r"\bembed$", "model.embed_tokens.weight"),
    (r"^head$", "lm_head.weight"),
    (r"^norm$", "model.norm.weight"),
    (r"^hc_head_", "model.hc_head.hc_"),
    (r"^layers", "model.layers"),
    (r"attn_norm$", "input_layernorm.weight"),
    (r"ffn_norm$", "post_attention_layernorm.weight"),
    (r"hc_(attn|ffn)_", r"\1_hc."),
    (r"\battn\.wq_a$", "self_attn.q_a_proj.weight"),
    (r"\battn\.q_norm$", "self_attn.q_a_norm.weight"),
    (r"\battn\.wq_b$", "self_attn.q_b_proj.weight"),
    (r"\battn\.wkv$", "self_attn.kv_proj.weight"),
    (r"\battn\.kv_norm$", "self_attn.kv_norm.weight"),
    (r"\battn\.wo_(a|b)$", r"self_attn.o_\1_proj.weight"),
    (r"\battn\.attn_sink$", "self_attn.sinks"),
    (r"\battn\.indexer\.compressor", "self_attn.compressor.indexer"),
    (r"\battn\.indexer\.wq_b$", "self_attn.compressor.indexer.q_b_proj.weight"),
    (r"\battn\.indexer\.weights_proj$", "self_attn.compressor.indexer.scorer.weights_proj.weight"),
    (r"\battn\.compressor", "self_attn.compressor"),
    (r"(compressor.*)\.wkv$", r"\1.kv_proj.weight"),
    (r"(compressor.*)\.wgate$", r"\1.gate_proj.weight"),
    (r"(compressor.*)\.ape$", r"\1.position_bias"),
    (r"(compressor.*)\.norm$", r"\1.kv_norm.weight"),
    (r"ffn\.gate\.bias$", "mlp.gate.e_score_correction_bias"),
    (r"ffn\.", "mlp."),
    (r"shared_experts\.w1$", "shared_experts.gate_proj.weight"),
    (r"shared_experts\.w3$", "shared_experts.up_proj.weight"),
    (r"shared_experts\.w2$", "shared_experts.down_proj.weight"),
)


def random_weights(config: NanoConfig, seed: int) -> dict[str, Tensor]:
    """Initial weights with everything that starts at a constant made random."""
    weights = initial_weights(config, torch.arange(config.vocab_size), seed)
    rng = torch.Generator().manual_seed(seed)
    for name, value in weights.items():
        if value.is_floating_point():
            weights[name] = value + torch.randn(value.shape, generator=rng) * 0.1
    return weights


def transformers_state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, value in weights.items():
        if name.startswith("mtp") or ".experts." in name:
            continue
        for pattern, target in RENAMES:
            name = re.sub(pattern, target, name)
        state[name] = value
    for name in [name for name in weights if name.endswith(".experts.w1") and not name.startswith("mtp")]:
        experts = "model." + name.removesuffix("w1").replace("ffn", "mlp")
        w1, w2, w3 = (weights[name[:-1] + digit] for digit in "123")
        state |= {f"{experts}gate_up_proj": torch.cat([w1, w3], 1), f"{experts}down_proj": w2}
    return state


def transformers_model(config: NanoConfig) -> Any:
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    kinds = {"swa": "sliding_attention", "csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}
    layers = range(config.num_hidden_layers)
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups",
        "o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts",
        "num_experts_per_tok", "num_hash_layers", "moe_intermediate_size", "routed_scaling_factor", "swiglu_limit",
        "max_position_embeddings", "qk_rope_head_dim", "compress_rope_theta", "rope_theta",
    )  # fmt: skip
    yarn = config.rope_scaling
    scaling = {"rope_type": "yarn", "factor": yarn.factor, "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow,
               "original_max_position_embeddings": yarn.original_max_position_embeddings}  # fmt: skip
    compressed = [layer for layer in layers if config.kind(layer) != "swa"]
    rates = {kinds[config.kind(layer)]: config.compress_ratios[layer] for layer in compressed}
    hf_config = DeepseekV4Config(
        **{name: getattr(config, name) for name in same},
        layer_types=[kinds[config.kind(layer)] for layer in layers],
        compress_rates=rates,
        rope_parameters=scaling,
        attn_implementation="eager",
    )
    return DeepseekV4ForCausalLM(hf_config).eval()


@pytest.mark.parametrize("seed", [0, 1])
def test_logits_equal_transformers(seed: int) -> None:
    weights = random_weights(TINY, seed)
    model = transformers_model(TINY)
    missing, unexpected = model.load_state_dict(transformers_state(weights), strict=False)
    assert not unexpected and not [name for name in missing if "inv_freq" not in name]
    ids_BT = torch.randint(0, TINY.vocab_size, (2, 96), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = model(ids_BT, use_cache=False).logits
        out = forward(weights, ids_BT, ids_BT.roll(-1, 1), TINY, torch.tensor(False))
    torch.testing.assert_close(out.x_BTD @ weights["head"].T, expected, atol=2e-5, rtol=0)


def test_every_weight_but_the_router_bias_gets_a_gradient() -> None:
    weights = random_weights(TINY, 2)
    for value in weights.values():
        value.requires_grad_(value.is_floating_point())
    ids_BT = torch.randint(0, TINY.vocab_size, (1, 96), generator=torch.Generator().manual_seed(0))
    out = forward(weights, ids_BT, ids_BT.roll(-1, 1), TINY, torch.tensor(True))
    index_kl = torch.stack([attn.index_kl_BT.mean() for attn in out.attn]).sum()
    (((out.x_BTD + out.x_mtp_BTD) @ weights["head"].T).square().mean() + index_kl).backward()
    without = {name for name, value in weights.items() if value.is_floating_point() and value.grad is None}
    assert without == {name for name in weights if name.endswith("gate.bias")}


def test_index_loss_trains_the_indexer_and_nothing_else() -> None:
    weights = random_weights(TINY, 3)
    for value in weights.values():
        value.requires_grad_(value.is_floating_point())
    ids_BT = torch.randint(0, TINY.vocab_size, (1, 96), generator=torch.Generator().manual_seed(0))
    out = forward(weights, ids_BT, ids_BT.roll(-1, 1), TINY, torch.tensor(False))
    torch.stack([attn.index_kl_BT.mean() for attn in out.attn]).sum().backward()
    trained = {name for name, value in weights.items() if value.grad is not None and value.grad.abs().sum() > 0}
    assert trained == {name for name in weights if ".indexer." in name}
