"""Kinds of collectives, by the names that a plan has for them, and what they make of placements."""

from __future__ import annotations

from typing import Final, Literal

from atomc.ops.placement import PARTIAL, REPLICATE, Placement, PlacementError, Shard

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
NAMESPACE: Final = "_c10d_functional"  # of torch's operators of collectives
KINDS: Final[dict[str, Kind]] = {
    f"{NAMESPACE}.all_gather_into_tensor.default": "all_gather",
    f"{NAMESPACE}.reduce_scatter_tensor.default": "reduce_scatter",
    f"{NAMESPACE}.all_reduce.default": "all_reduce",
    f"{NAMESPACE}.all_to_all_single.default": "all_to_all",
}
WAIT: Final = f"{NAMESPACE}.wait_tensor.default"


def placed(kind: Kind, x: Placement, along: bool) -> Placement:
    """What a collective makes of its input's placement, on the axis that it runs along and on the others.

    Raises:
        PlacementError: the input needs none, or another one.
    """
    if not along:
        moves = kind in ("all_gather", "reduce_scatter", "all_to_all")
        if kind == "all_gather" and x == Shard(0):
            return Shard(0, by="block")  # of each rank a block, in each of them the axis cuts the rows
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
    "all_gather": {Shard(0): REPLICATE, Shard(1): Shard(0, by="column")},
    "reduce_scatter": {PARTIAL: Shard(0)},
    "all_reduce": {PARTIAL: REPLICATE},
    "all_to_all": {_SENT: _HELD, _HELD: _SENT},
}
