"""Collectives as nodes of a graph: which operators they are, over which group, and what they make of placements.

Contract: a collective is an operator of `torch.distributed._functional_collectives`; its group is the ranks along one
mesh axis, named by the axis. What it returns may be read after `wait_tensor` only.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import torch
import torch.distributed._functional_collectives as _operators  # noqa: F401  defines them
from torch.fx import Node

from atomc.ops.placement import PARTIAL, REPLICATE, Placement, PlacementError, Shard

c10d = torch.ops._c10d_functional
Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
KINDS: Final[dict[Any, Kind]] = {
    c10d.all_gather_into_tensor.default: "all_gather",
    c10d.reduce_scatter_tensor.default: "reduce_scatter",
    c10d.all_reduce.default: "all_reduce",
    c10d.all_to_all_single.default: "all_to_all",
}
WAIT: Final = c10d.wait_tensor.default


def is_collective(node: Node) -> bool:
    """Whether a node starts a collective."""
    return node.op == "call_function" and node.target in KINDS


def group_of(node: Node) -> str:
    """The mesh axis along which a collective runs."""
    return str(node.args[-1])


def placed(kind: Kind, x: Placement, along: bool) -> Placement:
    """What a collective makes of its input's placement, on the axis that it runs along and on the others.

    Raises:
        PlacementError: the input needs none, or another one.
    """
    if not along:
        moves = kind in ("all_gather", "reduce_scatter", "all_to_all")
        if isinstance(x, Shard) and x.dim == 0 and x.by != "own" and moves:
            raise PlacementError(f"an {kind} moves rows that another axis cuts ({x})")
        return x
    found = _ALONG[kind].get(x)
    if found is None:
        wanted = " or ".join(map(str, _ALONG[kind]))
        raise PlacementError(f"an {kind} over an axis along which its input is {x}; it takes {wanted}")
    return found


_SENT, _HELD = Shard(0, by="destination"), Shard(0, by="expert")
_ALONG: Final[dict[Kind, dict[Placement, Placement]]] = {
    "all_gather": {Shard(0): REPLICATE},
    "reduce_scatter": {PARTIAL: Shard(0)},
    "all_reduce": {PARTIAL: REPLICATE},
    "all_to_all": {_SENT: _HELD, _HELD: _SENT},
}
__all__ = ["KINDS", "WAIT", "Kind", "c10d", "group_of", "is_collective", "placed"]
