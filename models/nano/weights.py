"""The inventory of weights: official name, shape and storage format of each, and their initial values.

Routed experts are kept stacked while training, under the official name without the expert index
(`layers.0.ffn.experts.w1` is `[E, I, D]`); `split_experts` gives the names of the checkpoint.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from atomc.models.nano.config import NanoConfig

Format = Literal["fp8", "fp4", "bf16", "f32", "i64"]


@dataclass(frozen=True)
class WeightSpec:
    """`shape` is the logical shape (fp4 unpacked)."""

    shape: tuple[int, ...]
    format: Format


def _attention(c: NanoConfig, layer: int) -> Iterator[tuple[str, WeightSpec]]:
    D, d, qr, heads_width = c.hidden_size, c.head_dim, c.q_lora_rank, c.num_attention_heads * c.head_dim
    yield "attn.wq_a", WeightSpec((qr, D), "fp8")
    yield "attn.q_norm", WeightSpec((qr,), "bf16")
    yield "attn.wq_b", WeightSpec((heads_width, qr), "fp8")
    yield "attn.wkv", WeightSpec((d, D), "fp8")
    yield "attn.kv_norm", WeightSpec((d,), "bf16")
    yield "attn.wo_a", WeightSpec((c.o_groups * c.o_lora_rank, heads_width // c.o_groups), "fp8")
    yield "attn.wo_b", WeightSpec((D, c.o_groups * c.o_lora_rank), "fp8")
    yield "attn.attn_sink", WeightSpec((c.num_attention_heads,), "f32")
    kind, ratio = c.kind(layer), c.compress_ratios[layer]
    if kind != "swa":
        yield from _compressor("attn.compressor", D, d, ratio, halves=2 if kind == "csa" else 1)
    if kind == "csa":
        yield "attn.indexer.wq_b", WeightSpec((c.index_n_heads * c.index_head_dim, qr), "fp8")
        yield "attn.indexer.weights_proj", WeightSpec((c.index_n_heads, D), "bf16")
        yield from _compressor("attn.indexer.compressor", D, c.index_head_dim, ratio, halves=2)


def _compressor(prefix: str, D: int, d: int, ratio: int, halves: int) -> Iterator[tuple[str, WeightSpec]]:
    yield f"{prefix}.wkv", WeightSpec((halves * d, D), "bf16")
    yield f"{prefix}.wgate", WeightSpec((halves * d, D), "bf16")
    yield f"{prefix}.ape", WeightSpec((ratio, halves * d), "f32")
    yield f"{prefix}.norm", WeightSpec((d,), "bf16")


def _moe(c: NanoConfig, layer: int) -> Iterator[tuple[str, WeightSpec]]:
    D, I, E = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts  # noqa: E741
    yield "ffn.gate.weight", WeightSpec((E, D), "bf16")
    if c.is_hash(layer):
        yield "ffn.gate.tid2eid", WeightSpec((c.vocab_size, c.num_experts_per_tok), "i64")
    else:
        yield "ffn.gate.bias", WeightSpec((E,), "f32")
    for name, out_dim, in_dim in (("w1", I, D), ("w2", D, I), ("w3", I, D)):
        yield f"ffn.experts.{name}", WeightSpec((E, out_dim, in_dim), "fp4")
        yield f"ffn.shared_experts.{name}", WeightSpec((out_dim, in_dim), "fp8")


def _hyper_connection(c: NanoConfig, name: str, rows: int, scales: int) -> Iterator[tuple[str, WeightSpec]]:
    yield f"{name}_fn", WeightSpec((rows, c.hc_mult * c.hidden_size), "f32")
    yield f"{name}_base", WeightSpec((rows,), "f32")
    yield f"{name}_scale", WeightSpec((scales,), "f32")


def _block(c: NanoConfig, layer: int) -> Iterator[tuple[str, WeightSpec]]:
    mix_rows = c.hc_mult * (2 + c.hc_mult)
    for sublayer in ("attn", "ffn"):
        yield from _hyper_connection(c, f"hc_{sublayer}", mix_rows, 3)
        yield f"{sublayer}_norm", WeightSpec((c.hidden_size,), "bf16")
    yield from _attention(c, layer)
    yield from _moe(c, layer)


def weight_specs(config: NanoConfig) -> dict[str, WeightSpec]:
    """Every weight by its stacked name, without the `.weight` suffix of the checkpoint (see `checkpoint_name`)."""
    D, n = config.hidden_size, config.hc_mult
    specs = {"embed": WeightSpec((config.vocab_size, D), "bf16"), "head": WeightSpec((config.vocab_size, D), "bf16")}
    specs["norm"] = WeightSpec((D,), "bf16")
    specs |= dict(_hyper_connection(config, "hc_head", n, 1))
    for prefix, layer in config.blocks:
        specs |= {f"{prefix}.{name}": spec for name, spec in _block(config, layer)}
    for name in ("e_proj", "h_proj"):
        specs[f"mtp.0.{name}"] = WeightSpec((D, D), "fp8")
    for name in ("enorm", "hnorm", "norm"):
        specs[f"mtp.0.{name}"] = WeightSpec((D,), "bf16")
    return specs | {f"mtp.0.{name}": spec for name, spec in _hyper_connection(config, "hc_head", n, 1)}


def checkpoint_name(name: str) -> str:
    """The official tensor name: matrices and norms end in `.weight`, the F32 and integer tensors stand bare."""
    bare = re.search(r"(_fn|_base|_scale|attn_sink|\.ape|gate\.\w+)$", name)
    return name if bare else f"{name}.weight"


def split_experts(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One (stacked name, tensor) per expert, or the pair itself for anything that is not stacked."""
    if ".experts." not in name:
        yield name, value
        return
    before, after = name.split(".experts.")
    for expert, matrix in enumerate(value.unbind(0)):
        yield f"{before}.experts.{expert}.{after}", matrix


def _initial(name: str, spec: WeightSpec, config: NanoConfig, rng: torch.Generator) -> Tensor:
    """Outputs of sublayers and the head start at zero, so that every block begins as (nearly) the identity."""
    shape, leaf = spec.shape, name.rsplit(".", 1)[-1]
    if leaf in ("wo_b", "w2", "head", "bias", "ape", "attn_sink"):
        return torch.zeros(shape)
    if leaf.endswith("norm"):
        return torch.ones(shape)
    if leaf.endswith("_scale"):
        return torch.full(shape, 0.1)
    if leaf.endswith("_base"):
        return _initial_hc_base(name, config)
    if leaf == "embed":
        return torch.randn(shape, generator=rng) * 0.5
    std = 0.02 if leaf.endswith("_fn") or name.endswith("gate.weight") else 0.7 / math.sqrt(shape[-1])
    return torch.randn(shape, generator=rng) * std


def _initial_hc_base(name: str, config: NanoConfig) -> Tensor:
    """Each sublayer favours another stream, since streams that start equal must part; comb starts near the identity."""
    n = config.hc_mult
    if name.endswith("hc_head_base"):
        return torch.full((n,), -1.1)
    layer = int(name.split(".")[1]) if name.startswith("layers.") else config.num_hidden_layers
    favoured = torch.nn.functional.one_hot(torch.tensor((2 * layer + ("hc_ffn" in name)) % n), n).float()
    pre, post = favoured * 1.5 - 1.5, favoured - 0.3
    return torch.cat([pre, post, (3.0 * torch.eye(n)).flatten()])


def balanced_hash_table(token_counts_V: Tensor, experts: int, top_k: int, seed: int) -> Tensor:
    """`tid2eid` `[V, k]`: tokens by falling frequency, each to its k least loaded experts, ties broken at random."""
    rng = torch.Generator().manual_seed(seed)
    load_E = torch.zeros(experts, dtype=torch.float64)
    table_Vk = torch.empty(len(token_counts_V), top_k, dtype=torch.int64)
    # A frequent token alone would fill its experts for long; the jitter keeps the combinations mixed.
    jitter_VE = torch.rand(len(token_counts_V), experts, generator=rng, dtype=torch.float64)
    counts = token_counts_V.double() + 1.0
    for token in torch.argsort(counts, descending=True, stable=True).tolist():
        chosen_k = torch.argsort(load_E + jitter_VE[token] * counts[token])[:top_k]
        load_E[chosen_k] += counts[token]
        table_Vk[token] = chosen_k.sort().values
    return table_Vk


def initial_weights(config: NanoConfig, token_counts_V: Tensor, seed: int) -> dict[str, Tensor]:
    """fp32 masters (and I64 tables) by stacked name."""
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for name, spec in weight_specs(config).items():
        if spec.format == "i64":
            layer_seed = seed + int(name.split(".")[1])
            experts, top_k = config.n_routed_experts, config.num_experts_per_tok
            weights[name] = balanced_hash_table(token_counts_V, experts, top_k, layer_seed)
        else:
            weights[name] = _initial(name, spec, config, rng)
    return weights
