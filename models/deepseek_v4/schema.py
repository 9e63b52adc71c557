"""Every tensor of a DeepSeek-V4 checkpoint: official name, format and shape, from the configuration (spec 3.1)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch

from atomc.formats import FP8_TILE, MXFP4, Layout
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.recipes import TensorSpec

__all__ = ["Entry", "Storage", "TensorSpec", "entries", "expected_tensors", "stored_problem", "stored_specs"]

# How a release stores a tensor. fp8 and fp4 entries are a weight and a scale tensor.
EntryFormat: TypeAlias = Literal["fp8", "fp4", "bf16", "f32", "i64"]
# How a checkpoint at hand stores a linear weight: quantised (fp8_f32: FP8 with float32 scales), or in full, no scale.
Storage: TypeAlias = Literal["fp8", "fp8_f32", "fp4", "plain"]

_PLAIN_DTYPES: Final = (torch.bfloat16, torch.float32)
_DTYPES: Final[dict[EntryFormat, tuple[torch.dtype, ...]]] = {
    "bf16": _PLAIN_DTYPES,
    "f32": (torch.float32, torch.bfloat16),
    "i64": (torch.int64, torch.int32),
}
_LAYOUTS: Final[dict[EntryFormat, Layout]] = {"fp8": FP8_TILE, "fp4": MXFP4}
_SCALE_DTYPES: Final[dict[EntryFormat, tuple[torch.dtype, ...]]] = {
    "fp8": (torch.float8_e8m0fnu, torch.float32),
    "fp4": (torch.float8_e8m0fnu,),
}


@dataclass(frozen=True)
class Entry:
    """One logical tensor: `shape` is that of its values; a quantised one has its scales under `scale_name`."""

    name: str
    format: EntryFormat
    shape: tuple[int, ...]

    @property
    def scale_name(self) -> str:
        return self.name.removesuffix("weight") + "scale"

    @property
    def quantized(self) -> bool:
        return self.format in _LAYOUTS


def entries(config: DeepseekV4Config) -> Iterator[Entry]:
    """All logical tensors in the order of the model: top level, layers, draft blocks."""
    d, vocab = config.hidden_size, config.vocab_size
    yield Entry("embed.weight", "bf16", (vocab, d))
    yield Entry("head.weight", "bf16", (vocab, d))
    yield Entry("norm.weight", "bf16", (d,))
    yield from _hyper_head(config, "")
    for layer in range(len(config.compress_ratios)):
        prefix = config.layer_prefix(layer)
        yield from _attention(config, f"{prefix}attn.", config.compress_ratios[layer])
        yield from _hyper_connections(config, prefix)
        yield from _moe(config, f"{prefix}ffn.", config.layer_kind(layer).moe == "hash")
    yield from _dspark(config) if config.is_dspark else _mtp(config)


def _linear(config: DeepseekV4Config, name: str, out: int, in_: int) -> Entry:
    return Entry(f"{name}.weight", "fp8" if config.quantized else "bf16", (out, in_))


def _hyper_head(config: DeepseekV4Config, prefix: str) -> Iterator[Entry]:
    n = config.hc_mult
    yield Entry(f"{prefix}hc_head_fn", "f32", (n, n * config.hidden_size))
    yield Entry(f"{prefix}hc_head_base", "f32", (n,))
    yield Entry(f"{prefix}hc_head_scale", "f32", (1,))


def _hyper_connections(config: DeepseekV4Config, prefix: str) -> Iterator[Entry]:
    n, d = config.hc_mult, config.hidden_size
    rows = 2 * n + n * n
    for sublayer in ("attn", "ffn"):
        yield Entry(f"{prefix}{sublayer}_norm.weight", "bf16", (d,))
        yield Entry(f"{prefix}hc_{sublayer}_fn", "f32", (rows, n * d))
        yield Entry(f"{prefix}hc_{sublayer}_base", "f32", (rows,))
        yield Entry(f"{prefix}hc_{sublayer}_scale", "f32", (3,))


def _attention(config: DeepseekV4Config, prefix: str, ratio: int) -> Iterator[Entry]:
    d, heads, dh, rank = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
    groups, group_rank = config.o_groups, config.o_lora_rank
    yield _linear(config, f"{prefix}wq_a", rank, d)
    yield Entry(f"{prefix}q_norm.weight", "bf16", (rank,))
    yield _linear(config, f"{prefix}wq_b", heads * dh, rank)
    yield _linear(config, f"{prefix}wkv", dh, d)
    yield Entry(f"{prefix}kv_norm.weight", "bf16", (dh,))
    yield _linear(config, f"{prefix}wo_a", groups * group_rank, heads * dh // groups)
    yield _linear(config, f"{prefix}wo_b", d, groups * group_rank)
    yield Entry(f"{prefix}attn_sink", "f32", (heads,))
    overlap = ratio == config.csa_ratio
    if ratio:
        yield from _compressor(config, f"{prefix}compressor.", dh, ratio, overlap)
    if ratio and overlap:
        index_heads, index_dim = config.index_n_heads, config.index_head_dim
        yield _linear(config, f"{prefix}indexer.wq_b", index_heads * index_dim, rank)
        yield Entry(f"{prefix}indexer.weights_proj.weight", "bf16", (index_heads, d))
        yield from _compressor(config, f"{prefix}indexer.compressor.", index_dim, ratio, overlap)


def _compressor(config: DeepseekV4Config, prefix: str, dim: int, ratio: int, overlap: bool) -> Iterator[Entry]:
    width = 2 * dim if overlap else dim
    yield Entry(f"{prefix}wkv.weight", "bf16", (width, config.hidden_size))
    yield Entry(f"{prefix}wgate.weight", "bf16", (width, config.hidden_size))
    yield Entry(f"{prefix}ape", "f32", (ratio, width))
    yield Entry(f"{prefix}norm.weight", "bf16", (dim,))


def _moe(config: DeepseekV4Config, prefix: str, hash_routing: bool) -> Iterator[Entry]:
    d, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield Entry(f"{prefix}gate.weight", "bf16", (experts, d))
    if hash_routing:
        yield Entry(f"{prefix}gate.tid2eid", "i64", (config.vocab_size, config.num_experts_per_tok))
    else:
        yield Entry(f"{prefix}gate.bias", "f32", (experts,))
    routed: EntryFormat = config.expert_dtype if config.quantized else "bf16"
    for expert in range(experts):
        for name, shape in (("w1", (inner, d)), ("w2", (d, inner)), ("w3", (inner, d))):
            yield Entry(f"{prefix}experts.{expert}.{name}.weight", routed, shape)
    for name, (out, in_) in (("w1", (inner, d)), ("w2", (d, inner)), ("w3", (inner, d))):
        yield _linear(config, f"{prefix}shared_experts.{name}", out, in_)


def _mtp(config: DeepseekV4Config) -> Iterator[Entry]:
    d = config.hidden_size
    for layer in config.draft_layers:
        prefix = config.layer_prefix(layer)
        for name in ("e_proj", "h_proj"):
            yield _linear(config, f"{prefix}{name}", d, d)
        for name in ("enorm", "hnorm", "norm"):
            yield Entry(f"{prefix}{name}.weight", "bf16", (d,))
        yield from _hyper_head(config, prefix)


def _dspark(config: DeepseekV4Config) -> Iterator[Entry]:
    d, vocab, rank = config.hidden_size, config.vocab_size, config.dspark_markov_rank
    assert rank is not None, "the configuration checks that DSpark keys come together"
    first, last = config.layer_prefix(config.draft_layers[0]), config.layer_prefix(config.draft_layers[-1])
    yield _linear(config, f"{first}main_proj", d, len(config.dspark_target_layer_ids) * d)
    yield Entry(f"{first}main_norm.weight", "bf16", (d,))
    yield Entry(f"{last}norm.weight", "bf16", (d,))
    yield from _hyper_head(config, last)
    for name in ("markov_w1", "markov_w2"):
        yield Entry(f"{last}markov_head.{name}.weight", "bf16", (vocab, rank))
    yield Entry(f"{last}confidence_head.proj.weight", "bf16", (1, d + rank))


def stored_specs(entry: Entry, scale_dtype: torch.dtype = torch.float8_e8m0fnu) -> dict[str, TensorSpec]:
    """The one or two tensors a release stores for an entry."""
    shape, layout = entry.shape, _LAYOUTS.get(entry.format)
    if layout is None:
        return {entry.name: TensorSpec(shape, _DTYPES[entry.format][0])}
    return {
        entry.name: TensorSpec(layout.code_shape(shape), layout.element.storage),
        entry.scale_name: TensorSpec(
            layout.scale_shape(shape), scale_dtype if entry.format == "fp8" else layout.scale_dtype
        ),
    }


def expected_tensors(
    config: DeepseekV4Config, *, scale_dtype: torch.dtype = torch.float8_e8m0fnu
) -> dict[str, TensorSpec]:
    """Name -> shape and dtype of exactly the tensors of an official checkpoint (spec 3.1).

    `scale_dtype` is that of the FP8 scales: E8M0, or float32 as Base releases may have them.
    """
    return {name: spec for entry in entries(config) for name, spec in stored_specs(entry, scale_dtype).items()}


def stored_problem(entry: Entry, name: str, found: TensorSpec, *, plain: bool) -> str | None:
    """What is wrong with a stored tensor of an entry, or None.

    `plain`: the weight has no scale, so a quantised format may be stored in full as bfloat16 or float32. Beside the
    release's own dtypes, float32 for bfloat16, bfloat16 for float32 and int32 for int64 are accepted.
    """
    official = stored_specs(entry)[name]
    shape: tuple[int, ...] = official.shape
    dtypes: tuple[torch.dtype, ...]
    if entry.quantized and plain:
        shape, dtypes = entry.shape, _PLAIN_DTYPES
    elif entry.quantized:
        dtypes = _SCALE_DTYPES[entry.format] if name != entry.name else (official.dtype,)
    else:
        dtypes = _DTYPES[entry.format]
    if found.dtype not in dtypes:
        return f"has dtype {_short(found.dtype)}, expected {' or '.join(map(_short, dtypes))}"
    if found.shape != shape:
        return f"has shape {list(found.shape)}, expected {list(shape)}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
