"""How each parameter is cut where a model lies on many ranks (spec 3.7): the model's hints to the shard pass.

Heads, groups of heads and rows of the vocabulary are cut along `tp`; the routed experts along every axis, either each
of them or by whole ones. The rest is whole on every rank: first products, norms, compressors, router,
hyper-connections, the shared expert. So is the lightning indexer, where the reference cuts its heads and sums the
scores: that sum has a number for each token and each compressed row of its context, far more than the work that it
saves, and whole scores need no operator of their own between scoring and selection.
"""

from __future__ import annotations

import re
from typing import Final

from atomc.ops.placement import REPLICATE, Placement, Shard

_BY_TP: Final = (
    (re.compile(r"attn\.(wq_b|wo_a)\.(weight|scale)|attn\.attn_sink|(embed|head)\.weight"), Shard(0)),
    (re.compile(r"attn\.wo_b\.(weight|scale)"), Shard(1)),
)
_EXPERTS: Final = re.compile(r"ffn\.experts\.(w13|w2)(\.scale)?")
_EACH: Final = {"w13": Shard(1, parts=2), "w2": Shard(2)}


def promised_cuts(region: str, tp: bool) -> int:
    """How many places the shard pass rewrites: experts, and along `tp` the output projection, embedding and head."""
    return int(tp) + region.startswith("layer_")


def placement_of(path: str, axis: str, moe: str) -> Placement:
    """How the parameter at `path`, local to its block, is placed along a mesh axis; `moe`: `tp` or `ep`."""
    if found := _EXPERTS.fullmatch(path):
        return Shard(0) if moe == "ep" else _EACH[found[1]]
    if axis == "tp":
        return next((placement for pattern, placement in _BY_TP if pattern.fullmatch(path)), REPLICATE)
    return REPLICATE
