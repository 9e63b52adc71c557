"""Watching a run for `atomc verify`: each step is judged as it runs, and the worst of each is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from atomc.artifact.names import Names
from atomc.artifact.plan import CallPlan, RegionPlan, Slot, Step, slots_in
from atomc.runtime.bind import Environment, Sizes, value_of
from atomc.runtime.executor import Executor
from atomc.runtime.loader import LoadedArtifact
from atomc.runtime.watch import MemoryWatch, PlanMismatchError
from atomc.verify.errors import VerifyError
from atomc.verify.judge import Verdict, broken, worst
from atomc.verify.launched import Launched, alone, device_of, misplaced, moved
from atomc.verify.mirror import Mirror, key_of
from atomc.verify.steps import Observation, copies_of_written, examine, mutates, named_arguments


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

    Of a run on a GPU, what a step reads is copied before it runs, what it gives and writes after it: results are views
    of one arena that later steps write over. It is judged there too: float64 is as exact on any device, and the CPU
    would take hours over the experts of a full-width layer.

    Attributes:
        reports: (region, phase, step) -> the worst so far, in the order of first execution. first: see `Failure`.
        judging: whether an error that comes up now is one of judging, not of the step.
    """

    def __init__(
        self,
        artifact: LoadedArtifact,
        executor: Executor,
        only: str | None,
        skip: frozenset[str],
        seen: Callable[[], None],
    ) -> None:
        """`only`: the region that is judged; None: all. `skip`: operators that are not. `seen`: called at each step."""
        self.reports: dict[tuple[str, str, int], StepReport] = {}
        self.first: Failure | None = None
        self.memory = MemoryWatch()
        self.judging = False
        self._artifact, self._gpu, self._only, self._skip, self._seen = artifact, executor.gpu, only, skip, seen
        self._names = {name: Names(region) for name, region in artifact.regions.items()}
        pools = {prefix + t.name: t.pool for prefix, ts in artifact.program.states.items() for t in ts}
        self._reserved = {name for name, pool in pools.items() if pool != "slots"}
        self._given: dict[str, Any] = {}  # the step's arguments, as they are before it runs
        self._overwritten: list[Verdict] = []
        self._mirror: Mirror | None = None
        if executor.gpu is not None:
            shared = {n: w.clone() if w.device == executor.device else w for n, w in artifact.weights.items()}
            self._mirror = Mirror(artifact.program.calls[0], shared, executor.states)

    def before(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        """Keep what step `at` reads, or is going to change."""
        if self._mirror is not None and at == 0:
            self._mirror.enter(call, region)
        if self._watched(region):
            self._keep_arguments(call, region, region.steps[at], env, sizes)

    def after(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        """Judge step `at`."""
        step = region.steps[at]
        if self._gpu is None:
            self.memory.after(call, region, at, env, sizes)
        elif wrong := misplaced(step, region.slots, env, sizes, self._gpu.arena):
            raise PlanMismatchError(f"region {region.name}, step {at} ({step.op}, {step.source}): {wrong}.")
        if self._watched(region):
            self.judge(call, region, "step", at, step, env, sizes)

    def prepared(self, call: CallPlan, region: RegionPlan, env: Environment) -> None:
        """Judge the steps that have run once, when the artifact was loaded."""
        for at, step in enumerate(region.prepare if self._watched(region) else ()):
            self._keep_arguments(call, region, step, env, {})
            self.judge(call, region, "prepare", at, step, env, {})

    def judge(
        self, call: CallPlan, region: RegionPlan, phase: str, at: int, step: Step, env: Environment, sizes: Sizes
    ) -> None:
        """Examine a step whose results are in `env`, and keep the worst."""
        now, prefix = self._arguments(step, env, sizes), call.prefix
        written = {n: self._fetched(now[n]) for n in mutates(step.op) if isinstance(now.get(n), Tensor)}
        results = tuple(None if slot is None else self._fetched(env[slot]) for slot in step.outputs)
        if self._gpu is not None:
            self._gpu.synchronize()  # an error of a kernel shows here
        self.judging = True
        self._leave(call, region, step, f"{phase} {at} ({step.op})", results, written)
        skipped = step.op in self._skip
        if skipped and not self._overwritten:
            self.judging = False
            return
        states = self._states(region, step)
        reserved = frozenset(name for name in written if prefix + states.get(name, "") in self._reserved)
        launched = self._launched(region, step, sizes)
        seen = Observation(step.op, self._given, results, written, reserved, launched)
        verdicts = [*self._overwritten, *(() if skipped else examine(seen))]
        verdict = worst(verdicts or [Verdict("nothing", 0.0, 0.0, 0.0)])
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

    # -- on a GPU ------------------------------------------------------------------------------------------------------

    def _fetched(self, value: Any) -> Any:
        return value if self._gpu is None else moved(value, self._gpu.device)

    def _keep_arguments(self, call: CallPlan, region: RegionPlan, step: Step, env: Environment, sizes: Sizes) -> None:
        given = self._arguments(step, env, sizes)
        self._overwritten = []
        if self._mirror is None:
            self._given = given | copies_of_written(step.op, given)
            return
        self._given = copied(given)
        for name, slot, value in slots_by_name(step, self._given):
            if why := self._mirror.changed(key_of(call, region, slot), value):
                self._overwritten.append(broken(name, why))

    def _leave(
        self, call: CallPlan, region: RegionPlan, step: Step, who: str, results: tuple[Any, ...],
        written: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """Tell the mirror of a step that has run."""
        if self._mirror is None:
            return
        for name, slot, _ in slots_by_name(step, written):
            owner = _owner(region, slot)
            for other in range(len(region.slots)):
                if _owner(region, other) == owner:  # views of what has been written
                    self._mirror.forget(key_of(call, region, other))
            self._mirror.left(key_of(call, region, slot), written[name], who)
        for made, result in zip(step.outputs, results, strict=True):
            if made is not None:
                self._mirror.left(key_of(call, region, made), result, who)

    def _launched(self, region: RegionPlan, step: Step, sizes: Sizes) -> Launched | None:
        if self._gpu is None or not step.buckets:
            return None
        given = named_arguments(step.op, step.args, step.kwargs)
        plan = alone(step, region.slots, self._gpu.arena.numel())
        return Launched(self._artifact.manifest.target, self._artifact.folder, plan, given, sizes, self._gpu)

    # -- what a step is ------------------------------------------------------------------------------------------------

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


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with copies of their tensors, where they are."""
    return {name: moved(value, device_of([value])) for name, value in arguments.items()}


def slots_by_name(step: Step, values: dict[str, Any]) -> Iterator[tuple[str, int, Tensor]]:
    """Of each tensor in `values`, which are arguments of a step by name: name, slot, tensor."""
    for name, planned in named_arguments(step.op, step.args, step.kwargs).items():
        found = values.get(name)
        tensors = [v for v in (found if isinstance(found, list) else [found]) if isinstance(v, Tensor)]
        yield from ((name, slot, tensor) for slot, tensor in zip(slots_in(planned), tensors, strict=bool(tensors)))


def _owner(region: RegionPlan, slot: int) -> int:
    base = region.slots[slot].base
    return slot if base is None else base


def _copied(seen: Observation) -> Observation:
    """With tensors of its own: what the step read may change, and the step's memory is used again."""

    results = tuple(moved(list(seen.results), device_of(seen.results)))
    return replace(seen, arguments=copied(seen.arguments), results=results, mutated=copied(seen.mutated))


def refuse_region(name: str | None, regions: dict[str, RegionPlan]) -> None:
    """Whether there is a region of that name. Raises `VerifyError`."""
    if name is not None and name not in regions:
        raise VerifyError(f"--region {name}: no such region; choose one of {', '.join(regions)}.")
