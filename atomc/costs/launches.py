"""An operator's work spread over the launches of a bucket, and how fast a kernel's instructions do it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Final

from atomc.artifact.kernels import KernelFacts
from atomc.artifact.plan import DTYPE_BYTES, Bucket, RegionPlan, Slot
from atomc.costs.formula import Formula, formula
from atomc.costs.work import Flops, Work
from atomc.targets import Target

# In a matrix instruction's name -> the rate that it runs at; the first that fits.
KINDS: Final = (
    (r"mxf4|_f4", "fp4"), (r"f8f6f4|e4m3|e5m2|fp8|bf8", "fp8"), (r"bf16|f16", "bf16"), (r"tf32|xf32", "tf32"),
)  # fmt: skip
# Products that one of float32 operands takes, by how many are float32: they are three bf16 each, or three tf32 in all.
PARTS: Final = {"bf16": (1, 3, 6), "tf32": (3, 3, 3)}


@dataclass(frozen=True)
class LaunchCost:
    """One launch: its kernel, and its part of the operator's work, scratch included."""

    kernel: str
    bytes: Formula
    flops: tuple[Flops, ...]

    @property
    def count(self) -> Formula:
        """FLOPs of all parts."""
        return sum((f.count for f in self.flops), formula(0))

    @property
    def text(self) -> str:
        """Its work in words: two launches with the same text take the same time."""
        return f"{self.bytes}; {', '.join(f'{f.kind} {f.wide} {f.count}' for f in self.flops)}"


def launch_costs(region: RegionPlan, bucket: Bucket, work: Work) -> list[LaunchCost]:
    """The work of an operator over the launches of a bucket.

    A launch reads or writes every tensor that it takes. Launches of one kernel that take one tensor of tokens share it,
    as they share the tokens; a table, a cache or a weight each reads for itself. FLOPs are of the launches that take
    the slot they belong to.
    """
    taken = [{arg.id for arg in launch.args if isinstance(arg, Slot)} for launch in bucket.launches]
    scores = _scores(region, bucket, work, taken)
    size = {slot: _bytes(region, slot) for slot in bucket.scratch} | work.traffic | scores
    takers = Counter(slot for slots in taken for slot in slots)
    alike = Counter((launch.kernel, s) for launch, slots in zip(bucket.launches, taken, strict=True) for s in slots)
    costs = []
    for launch, slots in zip(bucket.launches, taken, strict=True):
        moved = formula(0)
        for slot in sorted(slots & size.keys()):
            shape = region.slots[slot].shape
            shared = slot in scores or (slot not in work.partly and bool(shape) and isinstance(shape[0], str))
            moved += size[slot] * (1 / alike[launch.kernel, slot] if shared else 1)
        done = tuple(Flops(f.of, f.count * (1 / takers[f.of]), f.kind, f.wide) for f in work.flops if f.of in slots)
        costs.append(LaunchCost(launch.kernel, moved, done))
    return costs


def _scores(region: RegionPlan, bucket: Bucket, work: Work, taken: list[set[int]]) -> dict[int, Formula]:
    """float32 scratch of the launches that score rows: the memory is for the largest context, little of it is used."""
    return {
        slot: size
        for of, size in work.scores.items()
        for slots in taken
        if of in slots
        for slot in slots & set(bucket.scratch)
        if region.slots[slot].dtype == "float32"
    }


def _bytes(region: RegionPlan, slot: int) -> Formula:
    size = formula(DTYPE_BYTES[region.slots[slot].dtype])
    for dim in region.slots[slot].shape:
        size *= formula(dim)
    return size


def matrix_kind(facts: KernelFacts) -> str:
    """What the kernel's matrix instructions multiply, the most frequent: bf16, fp8, fp4, tf32; empty without any."""
    found = Counter[str]()
    for name, count in facts.matrix.items():
        found[next((kind for pattern, kind in KINDS if re.search(pattern, name)), "")] += count
    return found.most_common(1)[0][0] if found else ""


def seconds_of(flops: Flops, sizes: dict[str, float], facts: KernelFacts, target: Target) -> float:
    """What the instructions of a kernel take for its FLOPs, at the rates that long kernels sustain."""
    kind = matrix_kind(facts) if flops.kind == "matrix" else ""
    count = flops.count.at(sizes)
    if kind in ("fp8", "fp4"):
        return count / target.sustained_matrix("fp8" if kind == "fp8" else "fp4")
    if kind in PARTS:
        rate = target.sustained_matrix("bf16") * (0.5 if kind == "tf32" else 1.0)
        return count * PARTS[kind][flops.wide] / rate
    return count / target.peaks.vector
