"""Streams: which launched steps of a region run beside which, when the step of the model has few tokens.

Contract:
    `assign` gives each launched step a stream and the earlier steps of other streams that it waits for, and changes
    nothing else: the plan keeps its order and stays right when run in it. Waits are the fewest that keep every
    dependency (`atomc.artifact.order`). Nothing goes aside in a region where torch computes a step, whose memory the
    plan does not place. The same steps always give the same streams.

Terms:
    cost     what a step is taken to last at one token, ns: its launches, and the weights that it reads.
    aside    on a stream other than 0.

Pseudo-code (list scheduling in the plan's order):
    for step in plan: for each stream: it may begin when the stream is free and its dependencies are over, later by
        CROSSING for each that crosses streams; aside, it is also CROSSING late for whoever joins it
    the step goes where that is least; if that is in several places, to where most of what it needs is
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

from atomc.artifact.order import STREAMS, before, dependencies, is_work
from atomc.artifact.plan import DTYPE_BYTES, Role, Step, slots_of

# Of one H100 at one token; only their relation matters, and it is much the same on its relatives.
LAUNCH: Final = 4000  # ns of a kernel that does little: it starts, it waits for memory once or twice, it drains
CROSSING: Final = 2000  # ns that an edge between streams costs over one within a stream
BYTES: Final = 2000  # of weights read in one ns, by a kernel that does not fill the device
ROUTED: Final = 8  # experts of a stack that a token is given to, about


class Stored(Protocol):
    """A slot, as far as a cost needs it."""

    @property
    def role(self) -> Role: ...
    @property
    def shape(self) -> list[int | str]: ...
    @property
    def dtype(self) -> str: ...


def assign(steps: Sequence[Step], slots: Sequence[Stored], owner: Sequence[int]) -> list[Step]:
    """The steps with their streams and waits. `owner`: the slot whose storage each slot has."""
    if not all(step.buckets for step in steps if is_work(step, owner)):
        return list(steps)
    needed = dependencies(steps, owner)
    free, over = [0] + [CROSSING] * (STREAMS - 1), [0] * len(steps)
    chosen: list[Step] = []
    for at, step in enumerate(steps):
        if not step.buckets:
            chosen.append(step)
            continue
        crossing = [[j for j in needed[at] if chosen[j].stream != s] for s in range(STREAMS)]
        starts = [max([free[s], *(over[j] + CROSSING * (j in crossing[s]) for j in needed[at])])
                  for s in range(STREAMS)]  # fmt: skip
        stream = min(range(STREAMS), key=lambda s: (starts[s] + CROSSING * (s != 0), len(crossing[s]), s))
        free[stream] = over[at] = starts[stream] + cost(step, slots)
        chosen.append(msgspec.structs.replace(step, stream=stream))
    return waiting(chosen, needed, owner)


def cost(step: Step, slots: Sequence[Stored]) -> int:
    """What a step is taken to last at one token, ns."""
    weights = [slots[s] for s in set(slots_of(step)) if slots[s].role in ("weight", "prepared")]
    products = [w for w in weights if len(w.shape) > 1] if "pointwise" not in step.op else []  # it reads rows
    return LAUNCH * len(step.buckets[0].launches) + sum(_bytes(w) for w in products) // BYTES


def _bytes(weight: Stored) -> int:
    """Bytes of a weight that one token reads."""
    shape = [n for n in weight.shape if isinstance(n, int)]
    first = min(shape[0], ROUTED) if len(shape) > 2 else shape[0]
    return first * math.prod(shape[1:]) * DTYPE_BYTES[weight.dtype]


def waiting(steps: Sequence[Step], needed: Sequence[Sequence[int]], owner: Sequence[int]) -> list[Step]:
    """Steps on their streams, with the fewest waits that keep the dependencies."""
    done = [msgspec.structs.replace(step, waits=[]) for step in steps]
    for at in range(len(done)):
        waits: list[int] = []
        for earlier in sorted(needed[at], reverse=True):  # a later step has more before it, and is never before it
            if not before(done[: at + 1], owner)[at] >> earlier & 1:
                waits = sorted([*waits, earlier])
                done[at] = msgspec.structs.replace(done[at], waits=waits)
    return done
