"""Ranks as processes: each plays its part of the same steps over gloo; one rank plays them alone, to compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from atomc.artifact.plan import CallPlan, RegionPlan
from atomc.ops import Batch
from atomc.parallel.layout import parse_layout
from atomc.runtime.bind import Environment, Sizes
from atomc.runtime.collectives import Groups
from atomc.runtime.errors import BatchError
from atomc.runtime.executor import Executor
from atomc.runtime.rank_executor import RankExecutor
from tests.support.eager import Step
from tests.support.paged import Paged

Loads = list[list[Step]]  # dp rank -> steps of its requests; a step without any is idle
BLOCKS, PAGES, REQUESTS, LONGEST = 24, 80, 3, 60


class Codes:
    """A watch that keeps the FP8 codes of activations that every rank has whole, by layer and operator."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Tensor]] = []

    def before(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        """Nothing is rounded yet."""

    def after(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        step = region.steps[at]
        if step.op in ("atom.hc_post_pre_norm_quant.default", "atom.rms_norm_pair_quant.default"):
            codes = next(env[s] for s in step.outputs if s is not None and env[s].dtype == torch.float8_e4m3fn)
            self.found.append((call.prefix + step.op, codes.clone()))


class Play(NamedTuple):
    """What the ranks of a layout do. `idle`: what one without tokens runs. `padding`: rows beyond the most tokens."""

    layout: str
    loads: Loads
    idle: Literal["dummy", "empty"] = "dummy"
    padding: int = 0


def run_alone(artifact: Path, loads: Loads, watch: Codes | None = None) -> list[list[Tensor]]:
    """dp rank -> logits of each of its steps, on one rank."""
    found = []
    for index, load in enumerate(loads):
        executor = Executor.load(artifact, num_blocks=BLOCKS, num_window_pages=PAGES)
        found.append(_play(executor, [load], index, 0, lambda _tokens, _prefill: None, watch=watch))
    return found


def run_ranks(artifact: Path, plays: Sequence[Play], folder: Path) -> list[list[list[Tensor]]]:
    """play -> rank -> logits of each step with tokens; all plays have the same number of ranks.

    The codes that rank 0 had are left in the folder.
    """
    (ranks,) = {parse_layout(play.layout).ranks for play in plays}
    folder.mkdir(parents=True)
    mp.start_processes(_rank, (ranks, artifact, list(plays), folder), nprocs=ranks, start_method="spawn")  # type: ignore[no-untyped-call]
    parts = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    return [[part[at] for part in parts] for at in range(len(plays))]


def _rank(rank: int, ranks: int, artifact: Path, plays: list[Play], folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timedelta(seconds=600), ranks, rank)
    found = []
    for play in plays:
        layout = parse_layout(play.layout)
        groups = Groups(layout.mesh)
        executor = RankExecutor.load_rank(artifact, play.layout, groups, num_blocks=BLOCKS, num_window_pages=PAGES)

        def begin(tokens: list[int], prefill: bool, executor: RankExecutor = executor, play: Play = play) -> None:
            along = parse_layout(play.layout).tp
            each = [n for n in tokens for _ in range(along)]
            executor.begin(each, min(max(tokens) + play.padding, executor.serving.max_batch_tokens), prefill)

        _refuses_what_does_not_fit(executor)
        watch = Codes()
        found.append(_play(executor, play.loads, groups.index.get("dp", 0), None, begin, play.idle, watch))
        if rank == 0:
            torch.save(watch.found, folder / f"codes {play.layout}.pt")
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _refuses_what_does_not_fit(executor: RankExecutor) -> None:
    """Every rank refuses the same announcements, before it would wait for another."""
    ranks, most = executor.plan.mesh.ranks, executor.serving.max_batch_tokens
    for tokens, bucket in (([1], 1), ([0] * ranks, 1), ([2] * ranks, 1), ([1] * ranks, most + 1)):
        with pytest.raises(BatchError, match=f"{ranks} ranks have 1 to {most} rows"):
            executor.begin(tokens, bucket, False)
    if executor.plan.mesh.size("tp") > 1:
        with pytest.raises(BatchError, match="ranks each share their requests"):
            executor.begin(list(range(1, ranks + 1)), ranks, False)
    torch.manual_seed(0)
    batch = Paged(executor, 1).batch([(0, 0, torch.zeros(2, dtype=torch.int64))])
    with pytest.raises(BatchError, match="has to be announced by `begin`"):
        executor.step(batch)
    executor.begin([1] * ranks, 1, False)
    with pytest.raises(BatchError, match=f"a step of 2 tokens on rank {executor.rank}; the ranks agreed on 1"):
        executor.step(batch)


def _play(
    executor: Executor, loads: Loads, seed: int, only: int | None, begin: Callable[[list[int], bool], None],
    idle: str = "dummy", watch: Codes | None = None,
) -> list[Tensor]:  # fmt: skip
    """The logits of each step of one dp rank that has tokens; its requests and their ids follow from its number."""
    generator = torch.Generator().manual_seed(100 + seed)
    vocabulary = executor.serving.vocab_size
    sequences = [torch.randint(0, vocabulary, (LONGEST,), generator=generator) for _ in range(REQUESTS)]
    torch.manual_seed(seed)
    paged, done, logits = Paged(executor, REQUESTS), [0] * REQUESTS, []
    mine = loads[seed if only is None else only]
    for at in range(max(map(len, loads))):
        steps = [load[at] if at < len(load) else [] for load in loads]
        tokens = [sum(n for _, n in step) for step in steps]
        if not any(tokens):
            continue
        step = mine[at] if at < len(mine) else []
        begin(tokens, any(n > 1 for step in steps for _, n in step))
        if not step:
            if only is None:
                executor.step(_idle(executor, paged, idle))
            continue
        pieces = [(i, done[i], sequences[i][done[i] : done[i] + n]) for i, n in step]
        logits.append(executor.step(paged.batch(pieces), watch).clone())
        for i, n in step:
            done[i] += n
    return logits


def _idle(executor: Executor, paged: Paged, how: str) -> Batch:
    """A step of a rank that has no request: one token of padding in the reserved page and block, or no token."""
    one = paged.batch([(0, 0, torch.zeros(1, dtype=torch.int64))])
    if how == "dummy":
        free = next(slot for slot in range(executor.num_slots) if slot not in paged.slots.tolist())
        tables = torch.zeros_like(one.window_table), torch.zeros_like(one.block_table)
        return one._replace(slots=torch.full_like(one.slots, free), window_table=tables[0], block_table=tables[1])
    none = torch.zeros(0, dtype=torch.int32)
    names = ("ids", "positions", "requests", "slots", "csa_ends", "hca_ends", "logit_rows")
    tables = {"window_table": one.window_table[:0], "block_table": one.block_table[:0]}
    start = torch.zeros(1, dtype=torch.int32)
    return one._replace(**dict.fromkeys(names, none), **tables, query_start=start)


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference of any logit, relative to the largest; the steps are the same."""
    assert [a.shape for a in ours] == [b.shape for b in theirs]
    assert all(bool(a.isfinite().all()) for a in ours)
    return max((float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)), default=0.0)
