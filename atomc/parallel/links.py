"""What collectives cost: seconds from what a rank sends, the links between ranks, and a least time.

Contract:
    All ranks begin together and send equal amounts; a rank sends and receives at a time. Time is the least time of a
    collective plus what is sent over the sustained rate of the links. On a mesh each pair has a link of its own, and
    fewer ranks than devices use fewer links; through a switch a rank has its whole rate to any of them.

Terms:
    sent   bytes that one rank sends to the others together; what it keeps for itself is not sent
"""

from __future__ import annotations

from atomc.errors import AtomcError
from atomc.parallel.kinds import Kind
from atomc.targets import Link

STEPS = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1}


class LinkError(AtomcError):
    """Ranks that the target's links do not connect."""


def sent_bytes(kind: Kind, size: float, ranks: int) -> float:
    """Bytes that a rank sends.

    Args:
        size: of the rank's own part: what it gives to an all-gather, keeps of a reduce-scatter, has of an all-reduce;
            for an all-to-all all that it routes, evenly, its own part included.
    """
    others = ranks - 1
    return {
        "all_gather": size * others,
        "reduce_scatter": size * others,
        "all_reduce": 2 * size * others / ranks,
        "all_to_all": size * others / ranks,
    }[kind]


def collective_seconds(kind: Kind, size: float, ranks: int, link: Link) -> float:
    """Seconds of a collective; `size` as in `sent_bytes`. One rank has none.

    Raises:
        LinkError: the node has fewer devices.
    """
    if ranks == 1:
        return 0.0
    if ranks > link.devices:
        raise LinkError(f"{ranks} ranks: the links of one node connect {link.devices} devices.")
    rate = (ranks - 1) * link.pair_rate if link.topology == "mesh" else link.rate
    return STEPS[kind] * link.latency + sent_bytes(kind, size, ranks) / (rate * link.share)
