"""What the operators between ranks make of placements: routed experts, and what packs and sorts rows for them."""

from __future__ import annotations

from typing import Final

from atomc.formats import Layout
from atomc.ops.placement import OWN, PARTIAL, REPLICATE, Call, Operand, Placement, PlacementError, Shard, Size


def whole_blocks(layout: str, x: Operand, width: int) -> None:
    """Whether a part of `width` columns of x, if it is one, ends where a block of the layout does.

    Raises:
        PlacementError: it does not: its scales would be others.
    """
    columns = Layout.parse(layout).columns
    if x.placement == Shard(len(x.shape) - 1) and (columns == 0 or width % columns):
        blocks = f"blocks of {columns}" if columns else "whole rows"
        raise PlacementError(
            f"a part of {width} columns is quantised to {layout}, in {blocks}: its scales would differ"
        )


# The operators that run routed experts: how many tensors the input of each has, and each of its two weights.
EXPERTS: Final = {"moe_experts": (1, 1), "moe_experts_quant": (2, 1), "scaled_moe_experts": (2, 2)}


def experts(call: Call) -> tuple[Placement, ...]:
    """Tokens of a rank with whole experts; all tokens with a part of each, or of some; dispatched ones with some."""
    given = [o.placement for o in call.operands() if o is not None]
    x, w = EXPERTS[call.op.split(".")[1]]
    if x == 2:  # a part of an expert rounds what enters its second product in blocks of the part
        layout = str(call.args[x + 2 * w + 4])
        of_w2 = [o for o in call.operands() if o is not None][x + w]
        packed = Layout.parse(str(call.args[-2])).element.packed if w == 2 else 1
        whole_blocks(layout, of_w2, of_w2.shape[-1] * packed)
    *_, indices, weights = given
    groups = {*given[:x], weights}, set(given[x : x + w]), set(given[x + w : x + 2 * w])
    if all(len(group) == 1 for group in groups):
        token, first, second = (group.pop() for group in groups)
        found = _SHARED.get((token, first, second, indices))
        if found is not None:
            return (found,)
    raise PlacementError(f"no way of sharing experts has inputs placed so: {', '.join(map(str, given))}")


_ROWS, _PICKED = Shard(0, by="expert"), Shard(0, by="own")
# (tokens and their weights, w13, w2, choices) -> result.
_SHARED: Final[dict[tuple[Placement, ...], Placement]] = {
    (REPLICATE, REPLICATE, REPLICATE, REPLICATE): REPLICATE,
    (Shard(0), REPLICATE, REPLICATE, Shard(0)): Shard(0),
    (REPLICATE, Shard(1, parts=2), Shard(2), REPLICATE): PARTIAL,
    (REPLICATE, Shard(0), Shard(0), OWN): PARTIAL,
    (_ROWS, Shard(0), Shard(0), Shard(0, by="slot")): _ROWS,
    (_PICKED, Shard(0), Shard(0), Shard(0, by="slot")): _PICKED,
}


def _own_first(call: Call) -> bool:
    """Whether the number of what a rank has first, the last size among the arguments, differs along the axis."""
    return any(isinstance(a, Size) and a.own for a in call.args)


def local_experts(call: Call) -> tuple[Placement, ...]:
    """Numbers of experts as the rank's own; of whole tokens each rank then knows its own choices alone."""
    indices = call.first().placement
    if not _own_first(call):
        return (indices,)
    if indices in (REPLICATE, OWN):
        return (OWN,)
    if indices in (_ROWS, _PICKED):
        return (Shard(0, by="slot"),)
    raise PlacementError(f"choices that are {indices} are no rank's own experts")


def vocabulary(call: Call) -> tuple[Placement, ...]:
    """Rows of a table that is cut by rows: what a rank has not is zero, so that the sum is due."""
    table, ids = (o.placement for o in call.operands() if o is not None)
    if table == REPLICATE and not _own_first(call):
        return (ids,)
    if table == Shard(0) and _own_first(call) and ids == REPLICATE:
        return (PARTIAL,)
    raise PlacementError(f"a table {table} with ids {ids}")


def sorted_rows(call: Call) -> tuple[Placement, ...]:
    """What to send where: rows in order of destination; of whole tokens each rank sorts those for its own experts."""
    indices = call.first().placement
    if not _own_first(call) or indices not in (REPLICATE, Shard(0)):
        raise PlacementError(f"choices that are {indices} cannot be sorted by destination")
    one = Shard(0, by="destination") if indices == Shard(0) else _PICKED
    return (one, one)


def dispatch_rows(call: Call) -> tuple[Placement, ...]:
    """The rows of a message in the order of their destinations."""
    message, order = (o.placement for o in call.operands() if o is not None)
    if (message, order) in ((Shard(0), Shard(0, by="destination")), (REPLICATE, _PICKED)):
        return (order,)
    raise PlacementError(f"rows that are {message} in an order that is {order}")


def combine_rows(call: Call) -> tuple[Placement, ...]:
    """What came back, summed for each token."""
    rows, order, like = (o.placement for o in call.operands() if o is not None)
    if rows == order == _PICKED and like == REPLICATE:
        return (PARTIAL,)
    if rows == order == Shard(0, by="destination") and like == Shard(0):
        return (like,)
    raise PlacementError(f"rows that are {rows} in an order that is {order}, for tokens that are {like}")


def host_sizes(call: Call) -> tuple[Placement, ...]:
    """Numbers of the host, as the counts are."""
    return (call.first().placement,)


def view_message(call: Call) -> tuple[Placement, ...]:
    """The parts of a message, as many as there are results."""
    return (call.first().placement,) * len(call.results)


def join_columns(call: Call) -> tuple[Placement, ...]:
    """Columns that lie by ranks become those of the whole."""
    x = call.first().placement
    if x == Shard(0, by="column"):
        return (REPLICATE,)
    if x == Shard(0, by="block"):
        return (Shard(0),)
    raise PlacementError(f"columns of ranks that are {x}")
