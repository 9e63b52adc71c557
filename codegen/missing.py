"""What a target cannot run: every operator of a program without a kernel, in one error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from atomc.artifact.plan import RegionPlan, Step
from atomc.codegen.hosts import PREPARES, has_kernel
from atomc.errors import AtomcError
from atomc.targets import Target


class MissingKernelsError(AtomcError):
    """Operators for which the target has no kernel; `missing` lists them."""

    exit_code = 6

    def __init__(self, message: str, missing: tuple[Missing, ...]) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True)
class Missing:
    """An operator without a kernel: how many steps of a region need it, and the model's line of the first."""

    op: str
    region: str
    count: int
    source: str


def missing_kernels(plan: RegionPlan, target: Target) -> list[Missing]:
    """Operators of the region that the target cannot run. Views need no kernel; the cpu target runs every reference."""
    if target.name == "cpu":
        return []
    steps = [s for s in plan.prepare if s.op not in PREPARES]
    steps += [s for s in plan.steps if not has_kernel(s.op, target)]
    steps = [s for s in steps if not is_view(s, plan)]
    first = {step.op: step.source for step in reversed(steps)}
    return [Missing(op, plan.name, count, first[op]) for op, count in Counter(s.op for s in steps).items()]


def is_view(step: Step, plan: RegionPlan) -> bool:
    """A step that makes no data: each result has the storage of an older slot."""
    results = [plan.slots[slot] for slot in step.outputs if slot is not None]
    return bool(results) and all(r.base is not None for r in results)


def refuse(missing: Iterable[Missing], target: Target) -> MissingKernelsError:
    """The error that names every operator without a kernel, most used first."""
    by_op: dict[str, list[Missing]] = {}
    for item in missing:
        by_op.setdefault(item.op, []).append(item)
    count = {op: sum(m.count for m in items) for op, items in by_op.items()}
    width = max(len(op) for op in by_op)
    lines = [
        f"  {op:{width}}  {count[op]:3} in {len(items)} region{'s' * (len(items) > 1)}, first in {items[0].region}"
        f" at {items[0].source}"
        for op, items in sorted(by_op.items(), key=lambda item: (-count[item[0]], item[0]))
    ]
    return MissingKernelsError(
        f"target {target.name}: no kernel for {len(by_op)} operators, so nothing was written:\n"
        + "\n".join(lines)
        + "\nThe graphs were captured, fused and lowered; `--target cpu` runs them with the references.",
        tuple(m for items in by_op.values() for m in items),
    )
