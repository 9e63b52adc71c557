"""The executor: runs the plan of an artifact, one step of the model at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import atomc.ops  # noqa: F401  defines torch.ops.atom
from atomc.artifact.expr import Evaluate, parse
from atomc.artifact.plan import Arg, DType, RegionPlan, Size, Slot, StateTensor
from atomc.artifact.plan import Step as PlanStep
from atomc.ops import Batch
from atomc.runtime.errors import BatchError
from atomc.runtime.loader import LoadedArtifact, load

Environment = list[Any]
Sizes = dict[str, int]


@dataclass(frozen=True)
class PoolSizes:
    """Sizes of the state pools, page 0 and block 0 (reserved) included."""

    window_pages: int
    blocks: int
    slots: int

    def of(self, pool: str) -> int:
        size: int = getattr(self, pool)
        return size


class BoundStep:
    """One step with its arguments resolved as far as they can be before it runs."""

    def __init__(self, step: PlanStep) -> None:
        self.function = resolve(step.op)
        self.args = [_constant(a) for a in step.args]
        self.slots = [(i, a.id) for i, a in enumerate(step.args) if isinstance(a, Slot)]
        # Lists and sizes are few; a function of (environment, sizes) each.
        self.computed = [(i, _getter(a)) for i, a in enumerate(step.args) if isinstance(a, (Size, list))]
        self.kwargs = {k: _getter(v) for k, v in step.kwargs.items()}
        self.outputs, self.release = step.outputs, step.release

    def __call__(self, env: Environment, sizes: Sizes) -> None:
        args = self.args.copy()
        for position, slot in self.slots:
            args[position] = env[slot]
        for position, getter in self.computed:
            args[position] = getter(env, sizes)
        kwargs = {k: getter(env, sizes) for k, getter in self.kwargs.items()} if self.kwargs else {}
        result = self.function(*args, **kwargs)
        outputs = self.outputs
        if len(outputs) == 1 and not isinstance(result, (tuple, list)):
            env[outputs[0]] = result  # type: ignore[index]
        else:
            for slot, value in zip(outputs, result or (), strict=True):
                if slot is not None:
                    env[slot] = value
        for slot in self.release:
            env[slot] = None


class BoundRegion:
    """A region's steps, bound once and shared by all its calls."""

    def __init__(self, plan: RegionPlan) -> None:
        self.plan = plan
        self.steps = [BoundStep(step) for step in plan.steps]

    def fixed(self, prefix: str, weights: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Environment:
        """An environment with the weights and states of one call in place."""
        env: Environment = [None] * len(self.plan.slots)
        for item in self.plan.inputs:
            if item.role == "weight":
                env[item.slot] = weights[prefix + item.name]
            elif item.role == "state":
                env[item.slot] = states[prefix + item.name]
        return env


def resolve(op: str) -> Callable[..., Any]:
    """`aten.mul.Tensor` -> torch.ops.aten.mul.Tensor."""
    namespace, name, overload = op.split(".")
    function: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return function


def _constant(arg: Arg) -> Any:
    return getattr(torch, arg.name) if isinstance(arg, DType) else arg


def _getter(arg: Arg) -> Callable[[Environment, Sizes], Any]:
    if isinstance(arg, Slot):
        return lambda env, _: env[arg.id]
    if isinstance(arg, Size):
        size: Evaluate = parse(arg.expr)
        return lambda _, sizes: size(sizes)
    if isinstance(arg, list):
        getters = [_getter(a) for a in arg]
        return lambda env, sizes: [g(env, sizes) for g in getters]
    value = _constant(arg)
    return lambda _env, _sizes: value


class Executor:
    """Runs steps of a loaded artifact on the cpu target.

    Attributes:
        serving: what batches must look like. pools: sizes of the state pools.
    """

    def __init__(self, artifact: LoadedArtifact, pools: PoolSizes) -> None:
        self.serving = artifact.manifest.serving
        self.tokenizer_path = artifact.folder / "tokenizer.json"
        self.pools = pools
        self.num_blocks, self.num_window_pages, self.num_slots = pools.blocks, pools.window_pages, pools.slots
        self.states = {
            prefix + tensor.name: _allocate(tensor, pools)
            for prefix, tensors in artifact.program.states.items()
            for tensor in tensors
        }
        regions = {name: BoundRegion(plan) for name, plan in artifact.regions.items()}
        self.calls = [
            (regions[c.region], regions[c.region].fixed(c.prefix, artifact.weights, self.states), c.binds)
            for c in artifact.program.calls
        ]

    @classmethod
    def load(cls, path: Path, *, num_blocks: int, num_window_pages: int, max_requests: int | None = None) -> Executor:
        """Load, verify and bind an artifact; pools include the reserved page 0 and block 0.

        Raises:
            ArtifactError: the artifact is damaged, has no weights, or is for another target.
        """
        artifact = load(path)
        slots = max_requests or artifact.manifest.serving.max_requests
        return cls(artifact, PoolSizes(num_window_pages, num_blocks, slots))

    @torch.inference_mode()
    def step(self, batch: Batch) -> Tensor:
        """Run one step. Returns logits [L, V] float32 of the rows `batch.logit_rows`; updates the state."""
        sizes = self._sizes(batch)
        fields = batch._asdict()
        values: dict[str, Tensor] = {}
        for region, fixed, binds in self.calls:
            env = fixed.copy()
            for item in region.plan.inputs:
                if item.role == "batch":
                    env[item.slot] = fields[item.name]
                elif item.role == "value":
                    env[item.slot] = values[binds.get(item.name, item.name)]
            for step in region.steps:
                step(env, sizes)
            for name, slot in region.plan.outputs.items():
                values[name] = env[slot]
        return values["logits"]

    def _sizes(self, batch: Batch) -> Sizes:
        sizes = {
            "T": batch.ids.shape[0], "B": batch.slots.shape[0], "N4": batch.csa_ends.shape[0],
            "NH": batch.hca_ends.shape[0], "L": batch.logit_rows.shape[0], "window_pages": self.pools.window_pages,
            "blocks": self.pools.blocks, "slots": self.pools.slots,
        }  # fmt: skip
        limits = self.serving
        for symbol, limit in (("T", limits.max_batch_tokens), ("B", limits.max_requests), ("L", limits.max_logit_rows)):
            if not 1 <= sizes[symbol] <= limit:
                raise BatchError(f"a step has {symbol} = {sizes[symbol]}; the artifact is compiled for 1 to {limit}.")
        return sizes


def _allocate(tensor: StateTensor, pools: PoolSizes) -> Tensor:
    return torch.zeros((pools.of(tensor.pool), *tensor.shape), dtype=getattr(torch, tensor.dtype))
