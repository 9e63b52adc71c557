"""The order of a region's steps: what the data demand, what streams and waits promise, and whether that is enough.

Contract:
    A plan is right when its steps run one after the other. On a GPU the launched steps of a small decode step may also
    run on several streams: a step begins when the step before it on its stream and those that it waits for are over.
    After `check_streams` that order has every true dependency in it, and a region begins and ends on stream 0: its
    steps begin after the calls before it, and the calls after it begin after its steps.

Terms:
    work         a step that computes something; a view only names bytes, and runs nowhere.
    dependency   two steps touch one storage, and one of them writes it: a result read later, a state written in place
                 before or after somebody reads it.
    before       the steps that are over when a step begins, as the bits of an integer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch

import atomc.ops  # noqa: F401  defines torch.ops.atom
from atomc.artifact.check_layouts import Adds
from atomc.artifact.plan import Bucket, Slot, SlotInfo, Step, slots_in, slots_of
from atomc.parallel.kinds import KINDS, WAIT

# The main one and four at its sides: a CSA layer's queries, its rows, and the rows, queries and weights of its index.
STREAMS: Final = 5
# The most tokens of a step that runs on side streams. With few tokens most kernels use a few of the processors and
# wait for memory; from the second bucket of tokens on, a kernel fills the device, and streams only take turns at it.
SIDE_TOKENS: Final = 16


def owners_of(slots: Sequence[SlotInfo]) -> list[int]:
    """The slot whose storage each slot has."""
    return [at if info.base is None else info.base for at, info in enumerate(slots)]


def is_work(step: Step, owner: Sequence[int]) -> bool:
    """Whether a step computes something: launches, a result with bytes of its own, or a write in place."""
    return bool(step.buckets) or any(s is not None and owner[s] == s for s in step.outputs) or bool(mutated(step))


def mutated(step: Step) -> list[int]:
    """Slots that a step writes in place, by its operator's schema."""
    found: Any = torch.ops
    for part in step.op.split("."):
        found = getattr(found, part)
    written = []
    for at, argument in enumerate(found._schema.arguments):
        value = step.args[at] if at < len(step.args) else step.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += [part.id for part in (value if isinstance(value, list) else [value]) if isinstance(part, Slot)]
    return written


def touches(step: Step, owner: Sequence[int]) -> tuple[set[int], set[int]]:
    """Storages that a step reads or writes, and those of them that it writes."""
    given = [argument for bucket in step.buckets for argument in bucket.every_argument]
    launched = [argument.id for argument in given if isinstance(argument, Slot)]
    scratch = [slot for bucket in step.buckets for slot in bucket.scratch]
    written = {owner[s] for s in (*step.outputs, *mutated(step), *scratch) if s is not None}
    return {owner[s] for s in (*slots_of(step), *launched)} | written, written


def held_until(steps: Sequence[Step]) -> Iterator[tuple[int, int]]:
    """(the step that waits for a collective, the slot that it was given): until then its memory is in use."""
    given: dict[int, int] = {}  # what a collective gives -> what it was given
    for at, step in enumerate(steps):
        first = next((slot for arg in step.args[:1] for slot in slots_in(arg)), None)
        if step.op in KINDS and first is not None:
            given |= {slot: first for slot in step.outputs if slot is not None}
        elif step.op == WAIT and first in given:
            yield at, given[first]


def dependencies(steps: Sequence[Step], owner: Sequence[int]) -> list[list[int]]:
    """Of each step, earlier steps that it must follow; those that they follow are left out where a write covers them.

    Complete as a partial order: whoever follows all of a step's dependencies follows every step that it conflicts with.
    """
    wrote: dict[int, int] = {}  # storage -> its last writer
    read: dict[int, list[int]] = {}  # storage -> who read it since
    found: list[list[int]] = []
    for at, step in enumerate(steps):
        needed: set[int] = set()
        if is_work(step, owner):
            touched, written = touches(step, owner)
            for storage in touched:
                needed |= {wrote[storage]} if storage in wrote else set()
                if storage in written:
                    needed.update(read.pop(storage, ()))
                    wrote[storage] = at
                else:
                    read.setdefault(storage, []).append(at)
        found.append(sorted(needed))
    return found


def before(steps: Sequence[Step], owner: Sequence[int]) -> list[int]:
    """Of each step, the steps that are over when it begins: those before it on its stream, and before its waits."""
    found: list[int] = []
    latest: dict[int, int] = {}  # stream -> its last step
    for at, step in enumerate(steps):
        over = 0
        if is_work(step, owner):
            previous = [latest[step.stream]] if step.stream in latest else []
            for earlier in (*previous, *step.waits):
                over |= found[earlier] | 1 << earlier
            latest[step.stream] = at
        found.append(over)
    return found


def apart(steps: Sequence[Step], owner: Sequence[int]) -> Callable[[int, int], bool]:
    """Whether two storages are never in use at one time, whatever the streams do: may they have the same bytes?

    Lifetimes in the order of the plan are another matter, and must not meet either. The scratch of a bucket that runs
    on one stream only is bound by those alone.
    """
    over = before(steps, owner)
    users: dict[int, list[int]] = {}
    for at, step in enumerate(steps):
        for storage in touches(step, owner)[0] if is_work(step, owner) else ():
            users.setdefault(storage, []).append(at)
    all_of = {storage: sum(1 << at for at in used) for storage, used in users.items()}
    alone = {slot for step in steps for bucket in _alone(step) for slot in bucket.scratch}

    def precedes(a: int, b: int) -> bool:
        wanted = all_of.get(a, 0)
        return all(over[later] & wanted == wanted for later in users.get(b, ()))

    return lambda a, b: a in alone or b in alone or precedes(a, b) or precedes(b, a)


def _alone(step: Step) -> list[Bucket]:
    """The buckets of a step that have more tokens than ever run on side streams."""
    least = [0, *(bucket.tokens for bucket in step.buckets)]
    return [bucket for low, bucket in zip(least, step.buckets, strict=False) if low >= SIDE_TOKENS]


def check_streams(problems: Adds, steps: Sequence[Step], slots: Sequence[SlotInfo]) -> None:
    """Add what is wrong with the streams and the waits of a region's steps."""
    owner = owners_of(slots)
    aside = any(step.stream for step in steps)
    sound = True
    for at, step in enumerate(steps):
        for problem in _misplaced(at, steps, owner, aside):
            problems.add(f"step {at} ({step.op}, {step.source})", problem)
            sound = False
    if not sound:
        return
    over = before(steps, owner)
    for at, needed in enumerate(dependencies(steps, owner)):
        step = steps[at]
        for earlier in (j for j in needed if not over[at] >> j & 1):
            what = f"step {earlier} ({steps[earlier].op}) on stream {steps[earlier].stream}"
            problems.add(
                f"step {at} ({step.op}, {step.source})",
                f"on stream {step.stream} waits for {step.waits}, so it may begin before {what} ends, and it needs it",
            )


def _misplaced(at: int, steps: Sequence[Step], owner: Sequence[int], aside: bool) -> list[str]:
    """What is wrong with the stream and the waits of one step in themselves."""
    step, found = steps[at], []
    if not 0 <= step.stream < STREAMS:
        found.append(f"stream {step.stream} is out of range: 0 to {STREAMS - 1}")
    if not step.buckets and (step.stream or step.waits):
        found.append(f"stream {step.stream}, waits {step.waits}, but it launches nothing")
    if aside and not step.buckets and is_work(step, owner):
        found.append("torch computes it, on memory that the plan does not place, in a region with side streams")
    if aside and any(b.library for b in step.buckets if b not in _alone(step)):
        found.append("a library computes it, on the current stream, in a bucket that may run on a side stream")
    found += [
        f"waits for {earlier}, which is no earlier launched step of another stream"
        for earlier in step.waits
        if not (0 <= earlier < at and steps[earlier].buckets) or steps[earlier].stream == step.stream
    ]
    if step.waits != sorted(set(step.waits)):
        found.append(f"waits for {step.waits}, out of order or twice")
    return found


def buckets_of(most: int) -> tuple[int, ...]:
    """Upper bounds of tokens for which kernels are configured: decode of a few requests, of many, prefill."""
    return (*(n for n in (SIDE_TOKENS, 64, 256, 1024) if n < most), most)
