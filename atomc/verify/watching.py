"""Watching a run for `atomc verify`: each step is judged as it runs, and the worst of each is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from atomc.artifact.names import Names
from atomc.artifact.plan import CallPlan, ProgramPlan, RegionPlan, Slot, Step
from atomc.runtime.bind import Environment, Sizes, value_of
from atomc.runtime.watch import MemoryWatch
from atomc.verify.errors import VerifyError
from atomc.verify.judge import Verdict, worst
from atomc.verify.steps import Observation, copies_of_written, examine, named_arguments


@dataclass(frozen=True)
class StepReport:
    """One step of a region over all its calls and steps of the model: how often it ran, and its worst result.

    Attributes:
        at: its number among the region's steps, or among those that run once, `phase` says which.
        prefix: of the call where the worst was found. tensor: what it is about, by name. reads: the weights and the
            state that the step reads there, by name.
    """

    region: str
    phase: str
    at: int
    op: str
    source: str
    runs: int
    prefix: str
    tensor: str
    reads: tuple[str, ...]
    worst: Verdict

    @property
    def ok(self) -> bool:
        return self.worst.ok

    def message(self) -> str:
        """The broken bound in words."""
        reads = f", reads {', '.join(self.reads)}" if self.reads else ""
        where = f"{self.phase} {self.at} of {self.region} ({self.op.removesuffix('.default')}, {self.source}{reads})"
        v = self.worst
        if v.why:
            return f"{where}: {self.tensor}: {v.what} {v.why}."
        index = f"[{', '.join(map(str, v.index))}]"
        times = f"{v.use:.3g} times its bound" if v.use < 1e300 else "where no error is allowed"
        return (
            f"{where}: {self.tensor}: {v.what} at {index} is {v.found:.9g}, in float64 {v.expected:.9g} "
            f"({v.spacings:.3g} spacings of its format apart), {times}; "
            f"relative error {v.error:.2e} of at most {v.bound:.2e}."
        )


@dataclass(frozen=True)
class Failure:
    """The first step that broke its bound, with everything it read."""

    report: StepReport
    seen: Observation
    tokens: frozenset[str]  # arguments that may be cut along dim 0: neither weights nor state


class StepWatch:
    """Judges every step of the regions it is told of.

    Attributes:
        reports: (region, phase, step) -> the worst so far, in the order of first execution. first: see `Failure`.
        judging: whether an error that comes up now is one of judging, not of the step.
    """

    def __init__(
        self, program: ProgramPlan, regions: dict[str, RegionPlan], only: str | None, seen: Callable[[], None]
    ) -> None:
        self.reports: dict[tuple[str, str, int], StepReport] = {}
        self.first: Failure | None = None
        self.memory = MemoryWatch()
        self.judging = False
        self._only, self._seen = only, seen
        self._names = {name: Names(region) for name, region in regions.items()}
        pools = {prefix + t.name: t.pool for prefix, ts in program.states.items() for t in ts}
        self._reserved = {name for name, pool in pools.items() if pool != "slots"}
        self._before: dict[str, Tensor] = {}

    def before(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        """Keep what step `at` is going to change."""
        if self._watched(region):
            step = region.steps[at]
            self._before = copies_of_written(step.op, self._arguments(step, env, sizes))

    def after(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        """Judge step `at`."""
        self.memory.after(call, region, at, env, sizes)
        if self._watched(region):
            self.judge(region, "step", at, region.steps[at], call.prefix, env, sizes)

    def prepared(self, call: CallPlan, region: RegionPlan, env: Environment) -> None:
        """Judge the steps that have run once, when the artifact was loaded."""
        for at, step in enumerate(region.prepare if self._watched(region) else ()):
            self._before = {}
            self.judge(region, "prepare", at, step, call.prefix, env, {})

    def judge(
        self, region: RegionPlan, phase: str, at: int, step: Step, prefix: str, env: Environment, sizes: Sizes
    ) -> None:
        """Examine a step whose results are in `env`, and keep the worst."""
        self.judging = True
        now = self._arguments(step, env, sizes)
        written = {name: now[name] for name in self._before}
        results = tuple(None if slot is None else env[slot] for slot in step.outputs)
        states = self._states(region, step)
        reserved = frozenset(name for name in written if prefix + states.get(name, "") in self._reserved)
        seen = Observation(step.op, now | self._before, results, written, reserved)
        verdict = worst(examine(seen) or [Verdict("nothing", 0.0, 0.0, 0.0)])
        names = self._names[region.name]
        subject, reads = names.subject(step, prefix, states.get(verdict.what)), [prefix + n for n in names.reads(step)]
        report = StepReport(region.name, phase, at, step.op, step.source, 1, prefix, subject, tuple(reads), verdict)
        self._keep(report, region, step, seen)
        self.judging = False
        self._seen()

    def _keep(self, report: StepReport, region: RegionPlan, step: Step, seen: Observation) -> None:
        key = report.region, report.phase, report.at
        known = self.reports.get(key)
        runs = 1 + (known.runs if known else 0)
        kept = report if known is None or worst([known.worst, report.worst]) is report.worst else known
        self.reports[key] = StepReport(**(vars(kept) | {"runs": runs}))
        if not report.ok and self.first is None:
            self.first = Failure(report, _copied(seen), self._per_token(region, step))

    def _watched(self, region: RegionPlan) -> bool:
        return self._only in (None, region.name)

    @staticmethod
    def _arguments(step: Step, env: Environment, sizes: Sizes) -> dict[str, Any]:
        args = [value_of(a, env, sizes) for a in step.args]
        return named_arguments(step.op, args, {k: value_of(v, env, sizes) for k, v in step.kwargs.items()})

    def _states(self, region: RegionPlan, step: Step) -> dict[str, str]:
        """Argument -> name of the state that it is."""
        names = self._names[region.name]
        given = named_arguments(step.op, step.args, step.kwargs)
        return {
            a: names.name[v.id] for a, v in given.items() if isinstance(v, Slot) and names.role.get(v.id) == "state"
        }

    def _per_token(self, region: RegionPlan, step: Step) -> frozenset[str]:
        given = named_arguments(step.op, step.args, step.kwargs)
        roles = {name: region.slots[v.id].role for name, v in given.items() if isinstance(v, Slot)}
        return frozenset(name for name, role in roles.items() if role not in ("weight", "prepared", "state"))


def _copied(seen: Observation) -> Observation:
    """With tensors of its own: what the step read may change, and the step's memory is used again."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        return [copy(v) for v in value] if isinstance(value, list) else value

    arguments = {name: copy(value) for name, value in seen.arguments.items()}
    mutated = {name: copy(value) for name, value in seen.mutated.items()}
    return Observation(seen.op, arguments, tuple(copy(r) for r in seen.results), mutated, seen.reserved)


def refuse_region(name: str | None, regions: dict[str, RegionPlan]) -> None:
    """Whether there is a region of that name. Raises `VerifyError`."""
    if name is not None and name not in regions:
        raise VerifyError(f"--region {name}: no such region; choose one of {', '.join(regions)}.")
