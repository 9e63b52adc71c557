"""Small DeepSeek-V4 models for comparing mathematics, and hypothesis strategies for them and for feeding them."""

from __future__ import annotations

from itertools import pairwise
from math import lcm
from typing import Any

import torch
from hypothesis import strategies as st

from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.state import Paging
from tests.support.eager import Step
from tests.support.tiny import tiny_config

# Tiny enough that 90 tokens fill windows of both ratios many times and exceed the window and the top-k.
SMALL: dict[str, Any] = {
    "compress_ratios": [0, 16, 4, 16, 4, 4],
    "sliding_window": 16,
    "index_topk": 6,
    "num_nextn_predict_layers": 0,
    "quantization_config": None,
}


def tiny(**changes: Any) -> DeepseekV4Config:
    """The tiny configuration without quantisation, some values changed; the number of layers follows the ratios."""
    values = {**SMALL, **changes}
    drafts = values["num_nextn_predict_layers"]
    return tiny_config(num_hidden_layers=len(values["compress_ratios"]) - drafts, **values)


def random_ids(config: DeepseekV4Config, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def _pick(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


@st.composite
def ratio_patterns(draw: st.DrawFn) -> list[int]:
    """Layers of every kind in any order, or the pattern of Flash or of Pro; one HCA ratio a model."""
    hca = draw(_pick(2, 3, 8, 16, 20))
    fixed = ([0, 0, 4, hca, 4], [hca, hca, 4, hca], [0, hca, 4])
    free = st.lists(_pick(0, 4, hca), min_size=1, max_size=4)
    return draw(st.one_of(_pick(*fixed), free))


_YARN = st.none() | st.fixed_dictionaries(
    {
        "type": st.just("yarn"),
        "factor": _pick(1, 4, 16, 40.5),
        "beta_fast": _pick(32, 8),
        "beta_slow": _pick(1, 2),
        "original_max_position_embeddings": _pick(64, 4096, 65536),
    }
)


@st.composite
def configs(draw: st.DrawFn) -> DeepseekV4Config:
    """Any small legal model.

    No narrower than this: the RMS of a few channels comes near 0, and then rounding errors grow without bound.
    """
    ratios = draw(ratio_patterns())
    groups, rope, experts = draw(_pick(1, 2, 4)), draw(_pick(2, 4, 8, 16)), draw(st.integers(1, 12))
    return tiny(
        compress_ratios=ratios,
        vocab_size=64,
        hidden_size=draw(st.integers(40, 72)),
        o_groups=groups,
        num_attention_heads=groups * draw(st.integers(1, 3)),
        qk_rope_head_dim=rope,
        # transformers stores the rope width as a fraction of head_dim, and truncates: only exact fractions survive.
        head_dim=draw(_pick(*(width for width in (16, 32, 64) if width >= rope))),
        index_head_dim=16 + draw(_pick(0, 2, 5, 16)),
        index_n_heads=draw(st.integers(1, 8)),
        index_topk=draw(st.integers(1, 12)),
        q_lora_rank=draw(st.integers(24, 48)),
        o_lora_rank=draw(st.integers(8, 24)),
        sliding_window=draw(_pick(1, 2, 3, 5, 8, 16)),
        rope_theta=draw(_pick(10000, 100.5)),
        compress_rope_theta=draw(_pick(160000, 10000)),
        rope_scaling=draw(_YARN),
        n_routed_experts=experts,
        num_experts_per_tok=draw(st.integers(1, min(experts, 4))),
        moe_intermediate_size=draw(st.integers(12, 36)),
        num_hash_layers=draw(st.integers(0, len(ratios))),
        routed_scaling_factor=draw(_pick(1.0, 1.5, 2.5)),
        swiglu_limit=draw(_pick(0.3, 0.6, 10.0)),
        hc_mult=draw(_pick(4, 2, 3, 1)),
        hc_sinkhorn_iters=draw(_pick(20, 1, 2)),
        hc_eps=draw(_pick(1e-6, 1e-2)),
        rms_norm_eps=draw(_pick(1e-6, 1e-3)),
    )


@st.composite
def lengths(draw: st.DrawFn, config: DeepseekV4Config, most: int = 64) -> int:
    """A sequence length, most often at a border: of the window, of the compressed windows, of the top-k."""
    window, hca = config.sliding_window, config.hca_ratio or 16
    borders = (window, 4 * draw(st.integers(1, 8)), hca, 2 * hca, 4 * (config.index_topk + 1))
    near = st.tuples(_pick(*borders), _pick(-1, 0, 1)).map(sum)
    return min(most, max(1, draw(st.one_of(_pick(1, 3), near, st.integers(1, most)))))


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[int]:
    """The sizes of consecutive chunks of `length` tokens."""
    inner = sorted(draw(st.sets(st.integers(1, length - 1), max_size=6))) if length > 1 else []
    borders = [0, *inner, length]
    return [b - a for a, b in pairwise(borders)]


@st.composite
def interleavings(draw: st.DrawFn, pieces: list[list[int]]) -> list[Step]:
    """Steps that feed each sequence's pieces in order, several sequences at once, in any company and any order."""
    left = {i: list(sizes) for i, sizes in enumerate(pieces)}
    steps: list[Step] = []
    while left:
        order = draw(st.permutations(sorted(left)))
        step = [(i, left[i].pop(0)) for i in order[: draw(st.integers(1, len(order)))]]
        steps.append(step)
        left = {i: sizes for i, sizes in left.items() if sizes}
    return steps


@st.composite
def pagings(draw: st.DrawFn, config: DeepseekV4Config) -> Paging:
    """Pages and blocks of any size the caches allow."""
    common = lcm(config.csa_ratio or 1, config.hca_ratio or 1)
    return Paging(draw(_pick(1, 2, 3, 8, 64)), common * draw(_pick(1, 2, 5)))
