"""Predicted times: what a step of the model takes on its target by a roofline of each launch. Nothing is measured.

Contract:
    A launch takes the longest of three: its bytes at the sustained rate of the memory, its FLOPs at the sustained rate
    of the instructions that it has, and the least time of a launch. Launches follow one another; nothing overlaps. Of a
    bucket that a library's call may compute, the plan's own kernels are predicted.

Terms:
    bound      which of the three it is: memory, compute, latency
    scenario   tokens of a step, its requests, and the context of each when the step ends
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from atomc.artifact import facts
from atomc.artifact.kernels import KernelFacts
from atomc.artifact.manifest import Serving
from atomc.artifact.plan import ProgramPlan, RegionPlan, Step
from atomc.costs.launches import LaunchCost, launch_costs, seconds_of
from atomc.costs.work import Work, work_of
from atomc.targets import Target

BOUNDS: Final = ("memory", "compute", "latency")
DECODE, PREFILL, CONTEXT = (1, 16, 64, 128), (1024, 4096, 8192), 4096


@dataclass(frozen=True)
class Scenario:
    """A step: tokens, requests, tokens of context of each at its end."""

    tokens: int
    requests: int
    context: int

    @property
    def name(self) -> str:
        """`decode 16` requests, `prefill 4,096` tokens."""
        if self.tokens == self.requests:
            return f"decode {self.tokens:,}"
        return f"prefill {self.tokens:,}" + (f" of {self.requests:,}" if self.requests > 1 else "")

    def sizes(self, serving: Serving) -> dict[str, float]:
        """Values of a formula's symbols; of windows as many are completed as on average."""
        windows = {
            name: float(max(1, self.tokens // ratio)) if ratio else 1.0
            for name, ratio in (("N4", serving.csa_ratio), ("NH", serving.hca_ratio))
        }
        return {"T": self.tokens, "B": self.requests, "L": self.requests, "C": self.context, **windows}


def scenarios(serving: Serving, requests: int | None = None, context: int | None = None) -> list[Scenario]:
    """Decode of so many requests (several numbers by default) and prefill of one, as far as the artifact goes.

    Without `context` a request that decodes has 4,096 tokens, and a prefill is the whole prompt.
    """
    decodes = [n for n in DECODE if n <= serving.max_requests] if requests is None else [requests]
    most = min(serving.max_batch_tokens, serving.max_context)
    prefills = [n for n in PREFILL if n <= most] or [most]
    found = [Scenario(n, n, context or min(CONTEXT, serving.max_context)) for n in decodes]
    return found + [Scenario(n, 1, max(context or n, n)) for n in prefills]


def bucket_scenario(serving: Serving, tokens: int, context: int | None = None) -> Scenario:
    """The largest step of a bucket: decode where there may be so many requests, else of as few as there can be."""
    requests = tokens if tokens <= serving.max_requests else -(-tokens // serving.max_context)
    return Scenario(tokens, requests, max(-(-tokens // requests), context or min(CONTEXT, serving.max_context)))


@dataclass(frozen=True)
class Timing:
    """Bytes, FLOPs, launches, and predicted seconds by their bound."""

    bytes: float = 0.0
    flops: float = 0.0
    launches: int = 0
    seconds_by: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """All of them."""
        return sum(self.seconds_by.values())

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        return max(BOUNDS, key=lambda bound: self.seconds_by.get(bound, 0.0))

    def __add__(self, other: Timing) -> Timing:
        seconds = {b: self.seconds_by.get(b, 0.0) + other.seconds_by.get(b, 0.0) for b in BOUNDS}
        return Timing(self.bytes + other.bytes, self.flops + other.flops, self.launches + other.launches, seconds)

    def __mul__(self, times: int) -> Timing:
        seconds = {bound: s * times for bound, s in self.seconds_by.items()}
        return Timing(self.bytes * times, self.flops * times, self.launches * times, seconds)


@dataclass(frozen=True)
class Operator:
    """A step of a region that has kernels: its work, and the costs of its launches by the bucket's tokens."""

    region: str
    number: int
    step: Step
    work: Work
    buckets: Mapping[int, list[LaunchCost]]

    def launches(self, tokens: int) -> list[LaunchCost]:
        """Of the first bucket that holds so many tokens, else of the last."""
        return self.buckets[next((most for most in self.buckets if most >= tokens), max(self.buckets))]


@dataclass(frozen=True)
class KernelUse:
    """Launches of a kernel in a bucket that do the same work.

    Attributes:
        tokens: most of the bucket. cost: of one launch. count: launches in a step of the model.
        sources: lines of the model that they compute.
    """

    tokens: int
    cost: LaunchCost
    count: int
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """A step of the model in one scenario.

    Attributes:
        regions: one use of each. uses: of a region in a step. total: of the step.
    """

    scenario: Scenario
    regions: dict[str, Timing]
    uses: Mapping[str, int]
    total: Timing


@dataclass(frozen=True)
class Costs:
    """What a plan for a GPU costs."""

    program: ProgramPlan
    regions: Mapping[str, RegionPlan]
    kernels: Mapping[str, KernelFacts]
    target: Target
    serving: Serving

    @cached_property
    def operators(self) -> list[Operator]:
        """Every step that has kernels."""
        found = []
        for name, region in self.regions.items():
            for number, step in enumerate(region.steps):
                if step.buckets:
                    work = work_of(step, region)
                    by_bucket = {b.tokens: launch_costs(region, b, work) for b in step.buckets}
                    found.append(Operator(name, number, step, work, by_bucket))
        return found

    @cached_property
    def origins(self) -> dict[str, str]:
        """Kernel -> who chose its configuration, for all launches of it; empty where nothing launches it."""
        found: dict[str, set[str]] = {kernel: set() for kernel in self.kernels}
        for region in self.regions.values():
            for bucket in (bucket for step in region.steps for bucket in step.buckets):
                for launch in bucket.every_launch:
                    found.setdefault(launch.kernel, set()).add(launch.origin)
        return {kernel: ", ".join(sorted(origins)) for kernel, origins in found.items()}

    def launch(self, cost: LaunchCost, sizes: dict[str, float]) -> Timing:
        """One launch by the roofline."""
        known = self.kernels[cost.kernel]
        size = cost.bytes.at(sizes)
        times = {
            "memory": size / (self.target.memory_rate * self.target.sustained.memory),
            "compute": sum(seconds_of(f, sizes, known, self.target) for f in cost.flops),
            "latency": self.target.sustained.launch,
        }
        bound = max(BOUNDS, key=lambda name: times[name])
        return Timing(size, sum(f.count.at(sizes) for f in cost.flops), 1, {bound: times[bound]})

    def operator(self, operator: Operator, scenario: Scenario) -> Timing:
        """All launches of an operator."""
        sizes, time = scenario.sizes(self.serving), Timing()
        for cost in operator.launches(scenario.tokens):
            time += self.launch(cost, sizes)
        return time

    def kernel_uses(self) -> list[KernelUse]:
        """What each kernel is launched for: by its name and key, then by bucket."""
        uses, found = facts.uses(self.program), dict[tuple[str, int, str], KernelUse]()
        for operator in self.operators:
            for tokens, launches in operator.buckets.items():
                for cost in launches:
                    key = (cost.kernel, tokens, cost.text)
                    known = found.get(key, KernelUse(tokens, cost, 0, ()))
                    sources = tuple(dict.fromkeys([*known.sources, operator.step.source]))
                    found[key] = KernelUse(tokens, known.cost, known.count + uses[operator.region], sources)
        return [found[key] for key in sorted(found, key=lambda key: (self.kernels[key[0]].name, *key))]

    def predict(self, scenario: Scenario) -> Prediction:
        """Every region and the whole step in a scenario."""
        uses = facts.uses(self.program)
        regions, total = dict.fromkeys(self.regions, Timing()), Timing()
        for operator in self.operators:
            regions[operator.region] += self.operator(operator, scenario)
        for name, time in regions.items():
            total += time * uses[name]
        return Prediction(scenario, regions, uses, total)
