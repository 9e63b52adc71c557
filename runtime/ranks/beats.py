"""What members of a run say of themselves, what is said of one that is lost, and how long anybody may take.

Terms:
    member     a rank, the front end (`FRONT`), or the store itself where a launcher hosts it (`STORE`)
    beat       what a member last said: how often, its step, its stage in it, its place in that
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from atomc.runtime.errors import RankError

FRONT: Final = -1
STORE: Final = -2
JOINING, LOADING, AGREE, FIRST, RUN, DONE = range(6)
_WHERE: Final = (
    "while joining", "while loading", "in step {} (agreeing on it)", "in step {} (running it)",
    "in step {} (running it)", "in step {} (done)",
)  # fmt: skip
NOBODY: Final = b"-"


class Beat(msgspec.Struct, array_like=True, frozen=True):
    """`stage` is FIRST instead of RUN in the first step that computes anything. `at`: the next collective in it."""

    count: int = 0
    step: int = 0
    stage: int = JOINING
    at: int = 0

    @property
    def progress(self) -> tuple[int, int, int]:
        return self.step, self.stage, self.at


class Fault(msgspec.Struct, array_like=True, frozen=True):
    """The one reason a run ends. `members`: one that is lost, or all that stand at the same place and stay there.

    `why` continues "rank 2 was lost in step 57 (running it): ".
    """

    members: list[int]
    beat: Beat
    why: str
    seen_by: int

    def error(self, size: int) -> RankError:
        """The error that every member raises; `size` is the number of ranks."""
        where = _WHERE[self.beat.stage].format(self.beat.step)
        if self.beat.at and self.beat.stage in (FIRST, RUN):
            where = f"{where[:-1]}, at collective {self.beat.at})"
        lost = "was lost" if len(self.members) == 1 else "do not come on"
        text = f"{names_of(self.members, size)} {lost} {where}: {self.why}"
        if self.seen_by not in self.members:
            text += f" (seen by {names_of([self.seen_by])})"
        return RankError(f"{text[0].upper()}{text[1:]}.", ranks=tuple(self.members), step=self.beat.step)


def names_of(members: Sequence[int], size: int | None = None) -> str:
    """Names in a message: "the front end", "rank 2 of 4", "ranks 0, 1 and 3 of 4"."""
    if members[0] == FRONT:
        return "the front end"
    if members[0] == STORE:
        return "the launcher's store"
    of = "" if size is None else f" of {size}"
    if len(members) == 1:
        return f"rank {members[0]}{of}"
    return f"ranks {', '.join(map(str, members[:-1]))} and {members[-1]}{of}"


@dataclass(frozen=True)
class Bounds:
    """Milliseconds.

    Attributes:
        join_ms, load_ms: until all members have met, until a rank has loaded its part.
        silent_ms: without a sign of life. grace_ms: from a fault to the end of a process that hangs.
        first_ms, late_ms: at one place of the first step, and of any other.
    """

    join_ms: int = 120_000
    load_ms: int = 1_800_000
    silent_ms: int = 4_000
    first_ms: int = 60_000
    late_ms: int = 6_000
    grace_ms: int = 1_500

    @property
    def interval(self) -> float:
        """Seconds between two looks."""
        return min(0.1, self.silent_ms / 20_000)

    def of(self, stage: int) -> int:
        """How long a rank may stand still in a stage."""
        return {JOINING: self.join_ms, LOADING: self.load_ms, FIRST: self.first_ms}.get(stage, self.late_ms)


def key_of(member: int) -> str:
    """Where a member's beat is in the store."""
    return f"beat/{member}"


def text_of(word: Beat | Fault) -> str:
    """A word as it is stored."""
    return msgspec.json.encode(word).decode()


def beat_in(data: bytes) -> Beat | None:
    """The stored beat; None before there is one. Raises `msgspec.DecodeError` on anything else."""
    return None if data in (NOBODY, b"") else msgspec.json.decode(data, type=Beat)


def fault_in(data: bytes) -> Fault | None:
    """The stored fault, if there is one. Raises `msgspec.DecodeError` on anything else."""
    return None if data in (NOBODY, b"") else msgspec.json.decode(data, type=Fault)
