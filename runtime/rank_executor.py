"""The executor of one rank of a layout, on the cpu: every rank runs every step, with its own batch or one of padding.

Terms:
    form    one way to run a step (`atomc.artifact.ranks`), whole or in two micro-batches; the kind of a step and its
            rows, on which all ranks agree, choose it.
    P       rows of the messages of a step, on which all ranks agree: at least the most tokens of any rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from atomc.artifact.plan import of_batch
from atomc.ops import Batch
from atomc.ops.batch import middle, split_batch
from atomc.parallel.sizes import AGREED, HALVES, INDEX, half_rows, of_half
from atomc.runtime.collectives import Groups
from atomc.runtime.errors import BatchError, ServingError
from atomc.runtime.executor import Between, BoundCall, Executor, PoolSizes, Watch, allocate, memory_told, step_sizes
from atomc.runtime.loader import LoadedRank, load_rank


@dataclass(frozen=True)
class Agreement:
    """What all ranks know of the next step."""

    tokens: tuple[int, ...]
    rows: int
    form: str
    prefill: bool


class RankExecutor(Executor):
    """Runs steps of a loaded artifact as one rank of a layout. `begin` says what the next step is, on all ranks alike.

    A rank without tokens runs a batch of one token of padding, or of none.
    """

    least = 0

    def __init__(self, artifact: LoadedRank, pools: PoolSizes, groups: Groups) -> None:
        """Bind and rehearse, on all ranks at one time.

        Raises:
            ArtifactError: the plan does not run. ServingError: the memory does not suffice, or this is another rank.
        """
        if groups.rank != artifact.rank or groups.mesh != artifact.plan.mesh:
            raise ServingError(
                f"This process is rank {groups.rank} of {groups.mesh.axes}, and has the weights of rank "
                f"{artifact.rank} of {artifact.plan.layout}."
            )
        self._agreed: Agreement | None = None
        self._groups = groups
        with memory_told():
            self._bind_rank(artifact, pools)
            self.rehearse()

    def _bind_rank(self, artifact: LoadedRank, pools: PoolSizes) -> None:
        """Put weights and state in place, for every form."""
        self.folder, self.serving = artifact.folder, artifact.manifest.serving
        self.tokenizer_path = artifact.folder / "tokenizer.json"
        self.pools, self.plan, self.rank = pools, artifact.plan, artifact.rank
        self.num_blocks, self.num_window_pages, self.num_slots = pools.blocks, pools.window_pages, pools.slots
        self.bounds = artifact.plan.symbols
        self.gpu = self.staging = self.graphs = None
        self.device = torch.device("cpu")
        self.index = {INDEX[axis]: at for axis, at in self._groups.index.items()}
        self.states = allocate(artifact.program.states, pools)
        shared = Between(self._groups.functions())
        self.forms = {
            name: [
                BoundCall(c, artifact.regions[c.region], artifact.weights, self.states, between=shared)
                for c in form.calls
            ]
            for name, form in self.plan.forms.items()
        }

    @classmethod
    def load_rank(
        cls, path: Path, layout: str, groups: Groups, *, num_blocks: int, num_window_pages: int,
        max_requests: int | None = None, progress: Callable[[str], None] = lambda _: None,
    ) -> RankExecutor:  # fmt: skip
        """Load, verify, prove, bind and rehearse; all ranks at one time, for the rehearsal is a step of all of them.

        Raises:
            ArtifactError, CollectivesError, ServingError: as `atomc.runtime.loader.load_rank`.
        """
        artifact = load_rank(path, layout, groups.rank, progress)
        slots = artifact.manifest.serving.max_requests if max_requests is None else max_requests
        return cls(artifact, PoolSizes(num_window_pages, num_blocks, slots), groups)

    def begin(self, tokens: Sequence[int], bucket: int, prefill: bool) -> None:
        """What the next `step` is, on all ranks: called with equal arguments on each of them, before each step.

        Args:
            tokens: of each rank, 0 where it has none of its own. bucket: rows of messages, at least the most of them.
            prefill: some rank computes a part of a prompt.
        Raises:
            BatchError: they do not fit one another or the artifact. All ranks raise it, as they are given the same.
        """
        ranks, most = self.plan.mesh.ranks, self.bounds[AGREED]
        if len(tokens) != ranks or not 1 <= max(tokens) <= bucket <= most:
            raise BatchError(f"a step of {list(tokens)} tokens in {bucket} rows; {ranks} ranks have 1 to {most} rows.")
        along = self.plan.mesh.size("tp")
        if any(len(set(tokens[at : at + along])) > 1 for at in range(0, ranks, along)):
            raise BatchError(f"a step of {list(tokens)} tokens; {along} ranks each share their requests.")
        self._groups.restart()
        form = self.plan.form("prefill" if prefill else "decode", bucket)
        self._agreed = Agreement(tuple(tokens), bucket, form, prefill)

    @torch.inference_mode()
    def step(self, batch: Batch, watch: Watch | None = None) -> Tensor:
        """Run one step. Returns logits [L, V] float32 of the rows `batch.logit_rows`; updates the state.

        Raises:
            BatchError: the batch is not what `begin` said. The other ranks wait for this one then.
        """
        agreed, self._agreed = self._agreed, None
        if agreed is None:
            raise BatchError("a step of a rank has to be announced by `begin`.")
        sizes, said = self._sizes(batch), agreed.tokens[self.rank]
        if sizes["T"] != said and (said or sizes["T"] > 1):
            raise BatchError(f"a step of {sizes['T']} tokens on rank {self.rank}; the ranks agreed on {said}.")
        sizes |= {AGREED: agreed.rows, **self.index}
        self.calls = self.forms[agreed.form]
        if not self.plan.forms[agreed.form].halves:
            return self._run(batch._asdict(), sizes, watch)["logits"]
        halves = split_batch(batch, middle(batch.query_start, by_requests=not agreed.prefill))
        fields: dict[str, Tensor] = {}
        for half, part in enumerate((halves.first, halves.second)):
            fields |= {of_batch(name, half): tensor for name, tensor in part._asdict().items()}
            sizes |= {of_half(name, half): size for name, size in step_sizes(part).items()}
            sizes[of_half(AGREED, half)] = half_rows(agreed.rows)[half]
        values = self._run(fields, sizes, watch)
        return torch.cat([values[of_batch("logits", half)] for half in HALVES])[halves.logit_rows]

    def rehearse(self) -> None:
        """One token on every rank, in a step of each form; collectives are counted through, for it is one stage."""
        for form in self.forms:
            self._agreed = Agreement((1,) * self.plan.mesh.ranks, min(2, self.bounds[AGREED]), form, False)
            super().rehearse()
