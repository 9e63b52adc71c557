"""Official tensor names from transformers' (spec 3.6), official names passing through unchanged.

`save_pretrained` of transformers 5.23 half restores official names (with a `model.` prefix, and `attn.norm` for
`attn.kv_norm`), a bare state dict has transformers' own; both are read. Stacked experts are cut by the reader.
"""

import re
from typing import Final

_TOP: Final = {
    "embed_tokens": "embed",
    "lm_head": "head",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
}
_BLOCK: Final = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"{sub}_hc.{part}": f"hc_{sub}_{part}" for sub in ("attn", "ffn") for part in ("fn", "base", "scale")},
    "attn.norm": "attn.kv_norm",
    "ffn.gate.e_score_correction_bias": "ffn.gate.bias",
    "ffn.shared_experts.gate_proj": "ffn.shared_experts.w1",
    "ffn.shared_experts.down_proj": "ffn.shared_experts.w2",
    "ffn.shared_experts.up_proj": "ffn.shared_experts.w3",
    "attn.q_a_proj": "attn.wq_a",
    "attn.q_a_norm": "attn.q_norm",
    "attn.q_b_proj": "attn.wq_b",
    "attn.kv_proj": "attn.wkv",
    "attn.o_a_proj": "attn.wo_a",
    "attn.o_b_proj": "attn.wo_b",
    "attn.sinks": "attn.attn_sink",
    "attn.compressor.indexer.q_b_proj": "attn.indexer.wq_b",
    "attn.compressor.indexer.scorer.weights_proj": "attn.indexer.weights_proj",
    **{
        f"attn.compressor.{theirs}{leaf}": f"attn.{ours}compressor.{official}"
        for theirs, ours in (("", ""), ("indexer.", "indexer."))
        for leaf, official in (
            ("kv_proj", "wkv"),
            ("gate_proj", "wgate"),
            ("position_bias", "ape"),
            ("kv_norm", "norm"),
        )
    },
}
_TAILS: Final = ((".weight_scale_inv", ".scale"), (".weight", ".weight"))
_LAYER: Final = re.compile(r"(layers\.\d+\.)(.+)")
_STACKED: Final = re.compile(r"(layers\.\d+\.ffn\.experts\.)(gate_up_proj|down_proj)(?:\.weight)?(_scale_inv|\.scale)?")


def official_name(stored: str) -> str:
    """The official name of a tensor that transformers named, or the name itself.

    `weight_scale_inv` becomes `scale`: despite its name the value is a multiplier. Stacked experts keep theirs.
    """
    name = stored.removeprefix("model.")
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return _rename(name, _TOP)
    prefix, rest = layer.groups()
    rest = re.sub(r"^self_attn\.", "attn.", rest)
    rest = re.sub(r"^mlp\.", "ffn.", rest)
    return prefix + _rename(rest, _BLOCK)


def _rename(name: str, table: dict[str, str]) -> str:
    for tail, official_tail in _TAILS:
        if name.endswith(tail):
            stem = name.removesuffix(tail)
            return table.get(stem, stem) + official_tail
    return table.get(name, name)


def stacked_experts(name: str) -> tuple[str, tuple[str, ...], str] | None:
    """(prefix of the experts, official projections in row order, "weight" or "scale") of a stacked tensor's name."""
    match = _STACKED.fullmatch(name)
    if match is None:
        return None
    prefix, projection, scale = match.groups()
    return prefix, ("w1", "w3") if projection == "gate_up_proj" else ("w2",), "scale" if scale else "weight"
