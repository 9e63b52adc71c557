"""What `quantization.py` measures: one reading of a text by an artifact, and how far it is from another's reading.

Terms:
    row      one predicted token; all readings have the same rows, because the batches of all artifacts are the same
    streams  the residual streams of a token (mHC), as each sublayer finds them and as the head does
    pick     the compressed rows that the indexer of a CSA layer chose for a token, −1 where there was none to choose
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atomc.artifact.plan import CallPlan, RegionPlan
from atomc.ops import Batch
from atomc.runtime.batch import build_batch
from atomc.runtime.bind import Environment, Sizes
from atomc.runtime.caches import Caches
from atomc.runtime.executor import Executor
from atomc.runtime.request import Request, SamplingParams
from atomc.runtime.scheduler import Scheduler

STREAMS_EVERY = 8  # streams of every so many tokens are kept: they are four times as wide as the model
Progress = Callable[[int, int], None]


class Taps:
    """A `Watch` that copies the residual streams and the indexer's picks of one step, in the order of the model."""

    def __init__(self) -> None:
        self.streams: list[Tensor] = []
        self.picks: list[Tensor] = []

    def before(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        """Nothing of interest is there yet."""

    def after(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, _sizes: Sizes) -> None:
        """Keep what step `at` made, if it is one of the two."""
        step = region.steps[at]
        name, made = step.op.split(".")[1], next(iter(step.outputs), None)
        if made is not None and name.startswith("hc_post"):
            self.streams.append(env[made][::STREAMS_EVERY].float().clone())
        elif made is not None and name.startswith("index_") and "topk" in name:
            self.picks.append(env[made].clone())


@dataclass
class Reading:
    """What one artifact made of the text; a list has an entry for each step, a tensor in it a row for each token.

    `seconds`: of processor time spent in steps, which a busy machine stretches less. `documents`, `positions`: where
    each row is. `picks`, `streams`: by layer.
    """

    seconds: float = 0.0
    documents: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    nats: list[Tensor] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    picks: list[list[Tensor]] = field(default_factory=list)
    streams: list[list[Tensor]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(n) for n in self.nats)


@dataclass
class Distance:
    """How far a reading is from the baseline's, by row: KL(baseline || it) in nats, and whether the best token agrees.

    `shares`: by layer, the shares of the baseline's picks that are picked too. `errors`: by place in the model, the
    relative errors of the streams.
    """

    kl: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    shares: list[list[Tensor]] = field(default_factory=list)
    errors: list[list[Tensor]] = field(default_factory=list)


def divergence(baseline: Tensor, other: Tensor) -> Tensor:
    """KL(baseline || other) in nats of each row of log-probabilities [t, V]."""
    return torch.einsum("tv,tv->t", baseline.exp(), baseline - other)


def shared(baseline: Tensor, other: Tensor, visible: Tensor) -> Tensor:
    """Share of the baseline's picks [t, k] that are among the other's, of the tokens that had to choose.

    `visible` [t] counts the rows a token may pick; up to k all of them are picked, and there is no choice.
    """
    chose = visible > baseline.shape[1]
    a, b = baseline[chose], other[chose]
    return (a.unsqueeze(-1) == b.unsqueeze(-2)).any(-1).double().mean(-1)


def relative_error(baseline: Tensor, other: Tensor) -> Tensor:
    """‖other − baseline‖ / ‖baseline‖ of each token's streams [t, n, d]."""
    return (other - baseline).flatten(1).norm(dim=1) / baseline.flatten(1).norm(dim=1)


def read(
    executor: Executor, documents: Sequence[list[int]], baseline: Reading | None, progress: Progress
) -> tuple[Reading, Distance]:
    """Let the artifact predict every token but the first of each document, and compare as it goes.

    Without a baseline the reading keeps everything that later ones are compared with.
    """
    serving = executor.serving
    caches = Caches(serving, executor.num_blocks, executor.num_window_pages, executor.num_slots)
    tokens = min(serving.max_batch_tokens, serving.max_logit_rows)
    scheduler = Scheduler(caches, max_batch_tokens=tokens, max_requests=executor.num_slots)
    for number, ids in enumerate(documents):
        length = len(ids) - 1
        scheduler.add(Request(str(number), ids[:-1], length, SamplingParams(), length, frozenset(), 0.0))
    reading, distance = Reading(), Distance()
    total = sum(len(ids) - 1 for ids in documents)
    while scheduler.has_work:
        chunks = scheduler.schedule()
        batch = build_batch(chunks, caches, csa_ratio=serving.csa_ratio, hca_ratio=serving.hca_ratio)
        owners = torch.tensor([int(c.request.id) for c in chunks])[batch.requests.long()]
        batch = batch._replace(logit_rows=torch.arange(len(batch.ids), dtype=torch.int32))
        targets = [t for c in chunks for t in _targets(documents[int(c.request.id)], c.request.computed, c.length)]
        _step(executor, batch, owners, torch.tensor(targets), reading, distance, baseline)
        scheduler.advance(chunks)
        for chunk in chunks:
            if not chunk.request.pending:
                scheduler.remove(chunk.request)
        progress(reading.tokens, total)
    return reading, distance


def _targets(ids: list[int], computed: int, length: int) -> list[int]:
    return ids[computed + 1 : computed + 1 + length]


@torch.inference_mode()
def _step(
    executor: Executor, batch: Batch, owners: Tensor, targets: Tensor,
    reading: Reading, distance: Distance, baseline: Reading | None,
) -> None:  # fmt: skip
    """One step of the model, its figures, and what it differs from."""
    taps, start = Taps(), time.process_time()
    logits = executor.step(batch, taps)
    reading.seconds += time.process_time() - start
    logprobs = logits.log_softmax(-1)
    reading.nats.append(-logprobs.gather(1, targets[:, None])[:, 0].double())
    reading.documents.append(owners)
    reading.positions.append(batch.positions)
    if baseline is None:
        reading.logprobs.append(logprobs)
        reading.picks.append(taps.picks)
        reading.streams.append(taps.streams)
        return
    at = len(reading.nats) - 1
    if not torch.equal(baseline.documents[at], owners) or not torch.equal(baseline.positions[at], batch.positions):
        raise SystemExit(f"step {at} has other tokens than the baseline's: nothing can be compared")
    expected = baseline.logprobs[at]
    distance.kl.append(divergence(expected, logprobs))
    distance.same.append(expected.argmax(-1) == logprobs.argmax(-1))
    visible = (batch.positions + 1) // executor.serving.csa_ratio
    distance.shares.append([shared(a, b, visible) for a, b in zip(baseline.picks[at], taps.picks, strict=True)])
    pairs = zip(baseline.streams[at], taps.streams, strict=True)
    distance.errors.append([relative_error(a, b) for a, b in pairs])


def by_document(values: Sequence[Tensor], reading: Reading) -> Tensor:
    """Sums of row values over each document, float64 [documents]."""
    owners = torch.cat(reading.documents)
    sums = torch.zeros(int(owners.max()) + 1, dtype=torch.float64)
    return sums.index_add_(0, owners, torch.cat(list(values)).double())


def ratio_error(numerator: Tensor, denominator: Tensor) -> float:
    """Standard error of Σ numerator / Σ denominator over independent documents."""
    n, total = len(numerator), denominator.sum()
    rest = numerator - numerator.sum() / total * denominator
    return float((rest.square().sum() * n / (n - 1)).sqrt() / total)


def bits_per_byte(reading: Reading, sizes: Tensor) -> float:
    """Of documents with these UTF-8 bytes."""
    return float(torch.cat(reading.nats).sum() / math.log(2) / sizes.sum())


def figures(reading: Reading, distance: Distance, baseline: Reading, sizes: Tensor) -> dict[str, Any]:
    """The numbers of one row of the table; `sizes` are the UTF-8 bytes of the documents."""
    kl, same = torch.cat(distance.kl).double(), torch.cat(distance.same).double()
    more = (by_document(reading.nats, reading) - by_document(baseline.nats, baseline)) / math.log(2)
    rows = by_document([torch.ones_like(n) for n in reading.nats], reading)
    shares = [torch.cat(layer) for layer in zip(*distance.shares, strict=True)]
    return {
        "bits_per_byte": bits_per_byte(reading, sizes),
        "loss": float(more.sum() / sizes.sum()),
        "loss_error": ratio_error(more, sizes),
        "kl_mean": float(kl.mean()),
        "kl_error": ratio_error(by_document(distance.kl, reading), rows),
        "kl_p99": float(kl.quantile(0.99)),
        "top1": float(same.mean()),
        "recall": float(torch.cat(shares).mean()),
        "recall_by_layer": [float(layer.mean()) for layer in shares],
        "recall_tokens": len(shares[0]),
        "stream_errors": [float(torch.cat(place).mean()) for place in zip(*distance.errors, strict=True)],
        "tokens_per_cpu_second": reading.tokens / reading.seconds,
    }


def agreement(baseline: Sequence[int], other: Sequence[int]) -> int:
    """Tokens until the first difference; all of them if there is none."""
    different = (i for i, (a, b) in enumerate(zip(baseline, other, strict=True)) if a != b)
    return next(different, len(baseline))
