"""The executor: runs the plan of an artifact, one step of the model at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from atomc.artifact.order import SIDE_TOKENS, owners_of
from atomc.artifact.plan import CallPlan, RegionPlan, StateTensor, slots_in
from atomc.artifact.store import ArtifactError
from atomc.ops import Batch
from atomc.parallel.sizes import STEP
from atomc.runtime.batch import idle_batch
from atomc.runtime.bind import BoundStep, Environment, Sizes
from atomc.runtime.errors import BatchError, ServingError
from atomc.runtime.gpu import Gpu, LaunchStep, Values, on_device
from atomc.runtime.graphs import DecodeGraphs, Staging
from atomc.runtime.loader import LoadedArtifact, load


class Watch(Protocol):
    """Sees every step of a run, twice: before it writes anything; with its results, before anything is released."""

    def before(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        """Step `at` of `region` will run next, for `call`."""

    def after(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        """Step `at` of `region` has run, for `call`."""


@dataclass(frozen=True)
class PoolSizes:
    """Sizes of the state pools, page 0 and block 0 (reserved) included."""

    window_pages: int
    blocks: int
    slots: int

    def __post_init__(self) -> None:
        for pool, size in self.symbols().items():
            if size < 1:
                raise ServingError(f"The caches have {size} {pool}; at least 1 is needed.")

    def of(self, pool: str) -> int:
        size: int = getattr(self, pool)
        return size

    def symbols(self) -> Sizes:
        """As sizes of a step."""
        return {name: self.of(name) for name in ("window_pages", "blocks", "slots")}


@dataclass(frozen=True)
class Between:
    """What the calls of several forms of a step share.

    Attributes:
        functions: what runs for the collectives, by operator. prepared: what was made of weights, by how it was made.
    """

    functions: Mapping[str, Callable[..., Any]]
    prepared: dict[str, list[Tensor | None]] = field(default_factory=dict)


class BoundCall:
    """One call of the program: its region's steps, and an environment with weights, state and constants in place."""

    def __init__(
        self,
        call: CallPlan,
        plan: RegionPlan,
        weights: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        gpu: Gpu | None = None,
        memory: Values | None = None,
        between: Between | None = None,
    ) -> None:
        self.call, self.plan = call, plan
        self.fixed: Environment = [None] * len(plan.slots)
        self.fields: list[tuple[int, str]] = []  # slot, field of the batch
        self.values: list[tuple[int, str]] = []  # slot, value of the program
        for item in plan.inputs:
            match item.role:
                case "weight":
                    self.fixed[item.slot] = weights[call.prefix + item.name]
                case "state":
                    self.fixed[item.slot] = states[call.prefix + item.name]
                case "batch":
                    self.fields.append((item.slot, item.name))
                case _:
                    self.values.append((item.slot, call.binds.get(item.name, item.name)))
        self._prepare(call.prefix, {} if between is None else between.prepared)
        self.outputs = list(plan.outputs.items())
        made = {slot for step in plan.steps for slot in step.outputs}
        owner = owners_of(plan.slots)
        written = {owner[slot]: name for name, slot in reversed(self.outputs) if owner[slot] in made}
        buffers = {} if memory is None else {s: memory.take(name, plan.slots[s]) for s, name in written.items()}
        self.steps = [
            LaunchStep(at, plan, gpu, buffers)
            if gpu is not None and step.buckets
            else BoundStep(
                step, self.fixed, None if gpu is None else gpu.device, None if between is None else between.functions
            )
            for at, step in enumerate(plan.steps)
        ]

    def _prepare(self, prefix: str, made: dict[str, list[Tensor | None]]) -> None:
        """Make what the plan makes of the weights, once: what another form of the step has made is taken from there."""
        names = {item.slot: item.name for item in self.plan.inputs if item.role == "weight"}
        for step in self.plan.prepare:
            given = [[f"<{names[i]}>" for i in slots_in(a)] or repr(a) for a in step.args]
            key = f"{prefix}: {step.op} {given} {sorted(step.kwargs.items())}"
            try:
                if key not in made:
                    BoundStep(step, self.fixed).run(self.fixed, {})
                    made[key] = [None if slot is None else self.fixed[slot] for slot in step.outputs]
            except Exception as error:
                where = f"{prefix or self.plan.name}: {step.op} ({step.source})"
                if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
                    raise ServingError(
                        f"No memory to expand the weights of {where}. `atomc inspect` says what they take; close other "
                        "programs, or compile with --scheme bf16 or for a target that multiplies them packed."
                    ) from error
                raise ArtifactError(
                    f"The weights cannot be prepared, at {where}: {error}. Compile the artifact again."
                ) from error
            for index, slot in enumerate(step.outputs):
                if slot is not None:
                    self.fixed[slot], names[slot] = made[key][index], f"{index} of {key}"

    def run(self, batch: Mapping[str, Tensor], values: dict[str, Tensor], sizes: Sizes, watch: Watch | None) -> None:
        """Run the steps; reads and updates `values`."""
        env = self.fixed.copy()
        for slot, name in self.fields:
            env[slot] = batch[name]
        for slot, name in self.values:
            env[slot] = values[name]
        at = 0
        try:
            for at, step in enumerate(self.steps):
                if watch is None:
                    step.run(env, sizes)
                else:
                    self._run_watched(at, env, sizes, watch)
                for slot in step.release:
                    env[slot] = None
        except Exception as error:
            failed = self.plan.steps[at]
            error.add_note(f"in step {at} of region {self.plan.name}: {failed.op} ({failed.source})")
            raise
        for name, slot in self.outputs:
            values[name] = env[slot]

    def _run_watched(self, at: int, env: Environment, sizes: Sizes, watch: Watch) -> None:
        watch.before(self.call, self.plan, at, env, sizes)
        self.steps[at].run(env, sizes)
        watch.after(self.call, self.plan, at, env, sizes)


class Executor:
    """Runs steps of a loaded artifact, on the cpu or on a GPU.

    Attributes:
        serving: what batches must look like. pools: sizes of the state pools.
        states: the caches of all layers by `prefix + name`.
    """

    least = 1  # of tokens, requests and rows of logits in a step
    graphs: DecodeGraphs | None = None

    def __init__(
        self, artifact: LoadedArtifact, pools: PoolSizes, *, side_streams: bool = True, dependent_launches: bool = True
    ) -> None:
        """Bind, rehearse, capture. The flags are there to measure what each brings to a decode step on a GPU.

        Raises:
            ArtifactError: the plan does not run. ServingError: the memory does not suffice.
        """
        with memory_told():
            self._bind(artifact, pools)
            self.rehearse()
            if self.staging is not None and self.gpu is not None:
                self.graphs = self._capture(self.staging, self.gpu, side_streams, dependent_launches)

    def _bind(self, artifact: LoadedArtifact, pools: PoolSizes) -> None:
        """Put weights, state and memory in place."""
        self.folder, self.serving = artifact.folder, artifact.manifest.serving
        self.tokenizer_path = artifact.folder / "tokenizer.json"
        self.pools = pools
        self.num_blocks, self.num_window_pages, self.num_slots = pools.blocks, pools.window_pages, pools.slots
        self.bounds = artifact.program.symbols
        program = artifact.program
        self.gpu = None if artifact.manifest.arch == "" else Gpu(artifact.folder, program.arena_bytes)
        self.device = torch.device("cpu") if self.gpu is None else self.gpu.device
        weights, memory = artifact.weights, None
        if self.gpu is not None:
            weights, memory = on_device(weights, self.device), Values(self.bounds, self.device)
            self.pools = pools = replace(pools, slots=pools.slots + 1)  # the last one is for padding
        with self.device:
            self.states = allocate(program.states, pools)
            self.calls = [
                BoundCall(c, artifact.regions[c.region], weights, self.states, self.gpu, memory) for c in program.calls
            ]
        self.staging = None if self.gpu is None else Staging(self.serving, self.bounds, self.device)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        num_blocks: int,
        num_window_pages: int,
        max_requests: int | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> Executor:
        """Load, verify, bind and rehearse an artifact; pools include the reserved page 0 and block 0.

        Raises:
            ArtifactError: the artifact is damaged, has no weights, is for another target, or its plan fails.
            ServingError: there is no memory for the caches, or a pool is empty.
        """
        artifact = load(path, progress)
        slots = artifact.manifest.serving.max_requests if max_requests is None else max_requests
        return cls(artifact, PoolSizes(num_window_pages, num_blocks, slots))

    @torch.inference_mode()
    def step(self, batch: Batch, watch: Watch | None = None) -> Tensor:
        """Run one step. Returns logits [L, V] float32 of the rows `batch.logit_rows`; updates the state.

        On a GPU they are on the device, and valid until the next step.

        Raises:
            BatchError: the batch is larger than the artifact is compiled for, or its fields do not fit one another.
        """
        sizes = self._sizes(batch)
        if self.graphs is not None and watch is None and (logits := self.graphs.step(batch)) is not None:
            return logits
        return self._run(batch._asdict() if self.staging is None else self.staging.put(batch), sizes, watch)["logits"]

    def _run(self, fields: Mapping[str, Tensor], sizes: Sizes, watch: Watch | None = None) -> Mapping[str, Tensor]:
        """The values that the calls leave."""
        values: dict[str, Tensor] = {}
        for call in self.calls:
            call.run(fields, values, sizes, watch)
            if self.gpu is not None:
                self.gpu.join()
        return values

    @torch.inference_mode()
    def _capture(self, staging: Staging, gpu: Gpu, aside: bool, dependent: bool) -> DecodeGraphs:
        """Graphs of decode steps; what they wrote is padding."""

        def run(fields: Mapping[str, Tensor], requests: int) -> Tensor:
            with gpu.on_streams(aside and requests <= SIDE_TOKENS, dependent):
                return self._run(fields, dict.fromkeys(STEP, requests) | self.pools.symbols())["logits"]

        most = min(self.num_slots, *(self.bounds[name] for name in STEP))
        graphs = DecodeGraphs(staging, most, self.num_slots, run)
        self._forget()
        return graphs

    def rehearse(self) -> None:
        """Run one token in the reserved page and block, and forget it: a first run, and a proof of the plan.

        Raises:
            ArtifactError: names the step that fails; on a GPU, where a kernel fails while it runs, that it does.
        """
        try:
            self.step(idle_batch(self.serving))
            if self.gpu is not None:
                self.gpu.synchronize()  # an error of a kernel shows here
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            where = "; ".join(getattr(error, "__notes__", []))
            raise ArtifactError(
                f"{self.folder}: the plan does not run: {error} ({where}). Compile it again."
            ) from error
        self._forget()

    def _forget(self) -> None:
        """Clear what a rehearsal wrote: the first row of each state, and the last, which padding uses."""
        for state in self.states.values():
            state[0].zero_()
            state[-1].zero_()

    def _sizes(self, batch: Batch) -> Sizes:
        sizes = step_sizes(batch) | self.pools.symbols()
        for symbol in STEP:
            if not self.least <= sizes[symbol] <= self.bounds[symbol]:
                legal = f"{self.least} to {self.bounds[symbol]}"
                raise BatchError(f"a step has {symbol} = {sizes[symbol]}; the artifact is compiled for {legal}.")
        tokens, requests = sizes["T"], sizes["B"]
        if sizes["L"] > tokens:
            raise BatchError(f"a step of {tokens} tokens has {sizes['L']} rows of logits; there is one for each token.")
        expected = (
            (tokens,), (tokens,), (tokens,), (requests + 1,), (requests,),
            (requests, self.serving.window_table_width), (requests, self.serving.block_table_width),
            (sizes["N4"],), (sizes["NH"],), (sizes["L"],),
        )  # fmt: skip
        for name, tensor, shape in zip(Batch._fields, batch, expected, strict=True):
            if tensor.shape != shape or tensor.dtype is not torch.int32:
                raise BatchError(
                    f"batch.{name} is {list(tensor.shape)} {tensor.dtype}; {list(shape)} torch.int32 is needed."
                )
        return sizes


def step_sizes(batch: Batch) -> Sizes:
    """The sizes of a step, by their symbols."""
    fields = batch.ids, batch.slots, batch.csa_ends, batch.hca_ends, batch.logit_rows
    return {name: field.shape[0] for name, field in zip(STEP, fields, strict=True)}


@contextmanager
def memory_told() -> Iterator[None]:
    """Within it, a GPU that has no memory left is an error for who chose the sizes.

    Raises:
        ServingError: says what was asked for.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ServingError(
            f"The GPU's memory does not hold the model with these caches: {str(error).partition('. ')[0]}. Allow fewer "
            "requests or less --memory, close other programs, or compile with a smaller --max-batch-tokens."
        ) from error


def allocate(states: Mapping[str, list[StateTensor]], pools: PoolSizes) -> dict[str, Tensor]:
    """Zeroed state tensors by `prefix + name`.

    Raises:
        ServingError: there is no memory for them.
    """
    tensors: dict[str, Tensor] = {}
    try:
        for prefix, specs in states.items():
            for spec in specs:
                shape = (pools.of(spec.pool), *spec.shape)
                tensors[prefix + spec.name] = torch.zeros(shape, dtype=getattr(torch, spec.dtype))
    except RuntimeError as error:
        raise ServingError(
            f"No memory for caches of {pools.blocks} blocks, {pools.window_pages} window pages and {pools.slots} "
            "slots. Give fewer."
        ) from error
    return tensors
