"""Verifying an artifact: real text through the real scheduler and caches, every step judged, every weight compared.

Pseudo-code:
    load (which checks the plan); compare weights with the checkpoint; judge the steps that ran at load
    a prefill chunk; a chunk that straddles windows beside a new request; three requests in one step; decode steps
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from atomc.artifact.manifest import Serving
from atomc.runtime.batch import build_batch
from atomc.runtime.caches import Caches
from atomc.runtime.capacity import choose
from atomc.runtime.detokenize import Vocabulary
from atomc.runtime.executor import Executor
from atomc.runtime.loader import LoadedArtifact, load
from atomc.runtime.request import Request, SamplingParams
from atomc.runtime.scheduler import Chunk, Scheduler
from atomc.verify.errors import VerifyError
from atomc.verify.watching import Failure, StepReport, StepWatch, refuse_region
from atomc.verify.weights import WeightReport, compare_weights, find_checkpoint

__all__ = ["Options", "StepReport", "Verification", "WeightReport", "bundled_text", "verify_artifact", "verify_steps"]

Progress = Callable[[str, int, int], None]  # what, done, total
TOKENS: Final = 300
SHARES: Final = (0.55, 0.25, 0.2)  # of the tokens: how long the requests are
DECODES: Final = 4  # steps of one token of each request
LOGIT_ROWS: Final = 16


@dataclass(frozen=True)
class Options:
    """What to verify with.

    Attributes:
        tokens: of all requests together. checkpoint: folder or bundled name; None: by the model's name.
        region: judge this one only. skip: operators of the plan that are not judged, for the time that it takes.
    """

    tokens: int = TOKENS
    checkpoint: str | None = None
    region: str | None = None
    skip: frozenset[str] = frozenset()


@dataclass
class Verification:
    """What was found. `weights` is None where no checkpoint was there to compare with. `skipped`: operators that were
    not judged."""

    model: str
    folder: Path
    tokens: int = 0
    model_steps: int = 0
    judged: int = 0
    steps: list[StepReport] = field(default_factory=list)
    weights: list[WeightReport] | None = None
    checkpoint: str = ""
    first: Failure | None = None
    skipped: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Every broken bound in words: weights, then steps in the order of execution."""
        wrong = [f"weight {w.name} ({w.layout}, {w.origin}): {w.why}." for w in self.weights or () if not w.ok]
        return wrong + [s.message() for s in self.steps if not s.ok]

    @property
    def ok(self) -> bool:
        return not self.problems


def bundled_text() -> str:
    """A few paragraphs of English and Python."""
    return (Path(__file__).parent / "text.txt").read_text(encoding="utf-8")


def verify_artifact(
    folder: Path, texts: Sequence[str] = (), options: Options | None = None, progress: Progress = lambda *_: None
) -> Verification:
    """Verify an artifact on texts (none: the bundled one).

    Raises:
        ArtifactError: the artifact is damaged, or its plan is refused. VerifyError: there is too little text, or a step
            does not run. CheckpointError: the checkpoint cannot be read.
    """
    options = options or Options()
    checking = iter(range(1 << 30))
    artifact = load(folder, lambda name: progress(f"check {name}", next(checking), 0))
    found = Verification(artifact.manifest.model, folder)
    refuse_region(options.region, artifact.regions)
    _weights(found, artifact, options, progress)
    ids = _ids(artifact, texts or (bundled_text(),), options.tokens)
    _steps(found, artifact, ids, options, progress)
    return found


def verify_steps(
    artifact: LoadedArtifact, ids: Sequence[int], options: Options, progress: Progress = lambda *_: None
) -> Verification:
    """Judge the steps of an artifact with the weights that it is given, whatever they are, on tokens.

    Raises:
        VerifyError: there are too few tokens, or a step does not run.
    """
    found = Verification(artifact.manifest.model, artifact.folder)
    refuse_region(options.region, artifact.regions)
    _steps(found, artifact, _enough(list(ids)), options, progress)
    return found


def _weights(found: Verification, artifact: LoadedArtifact, options: Options, progress: Progress) -> None:
    source = find_checkpoint(artifact, options.checkpoint)
    if source is None:
        return
    found.checkpoint = options.checkpoint or source.name
    total = sum(i.role == "weight" for c in artifact.program.calls for i in artifact.regions[c.region].inputs)
    counting = iter(range(total + 1))
    found.weights = list(
        compare_weights(artifact, source, lambda name: progress(f"weight {name}", next(counting), total))
    )


def _ids(artifact: LoadedArtifact, texts: Sequence[str], tokens: int) -> list[int]:
    vocabulary = Vocabulary.from_file(artifact.folder / "tokenizer.json")
    ids: list[int] = []
    for text in texts:
        ids += vocabulary.encode(text)
        if len(ids) >= tokens:
            break
    return _enough(ids[:tokens])


def _enough(ids: list[int]) -> list[int]:
    if len(ids) < 8:
        raise VerifyError(f"There are {len(ids)} tokens of text; at least 8 are needed.")
    return ids


def _steps(found: Verification, artifact: LoadedArtifact, ids: list[int], options: Options, progress: Progress) -> None:
    texts = _cut(ids, artifact.manifest.serving)
    executor = _executor(artifact, texts)

    def seen() -> None:
        found.judged += 1
        progress(f"steps {found.tokens} tokens", found.judged, 0)

    known = {step.op for region in artifact.regions.values() for step in region.steps}
    if unknown := sorted(options.skip - known):
        raise VerifyError(f"No step of the plan is {unknown[0]}; there are {', '.join(sorted(known))}.")
    found.skipped = sorted(options.skip)
    watch = StepWatch(artifact, executor, options.region, options.skip, seen)
    for bound, call in zip(executor.calls, artifact.program.calls, strict=True):
        watch.prepared(call, bound.plan, bound.fixed)
    run = _Run(executor, texts, watch, found)
    run.all()
    found.steps, found.first = list(watch.reports.values()), watch.first


def _cut(ids: list[int], serving: Serving) -> list[list[int]]:
    """The requests: as long as their shares, within the context; each with a few tokens to decode."""
    shares = SHARES[: max(1, min(len(SHARES), serving.max_requests))]
    texts, start = [], 0
    for share in shares:
        length = max(DECODES + 2, round(len(ids) * share / sum(shares)))
        text = [serving.bos_id, *ids[start : start + length]][: serving.max_context]
        start += length
        if len(text) > DECODES:
            texts.append(text)
    return texts


def _executor(artifact: LoadedArtifact, texts: list[list[int]]) -> Executor:
    serving = artifact.manifest.serving
    blocks = sum(-(-len(t) // serving.block_tokens) for t in texts) + len(texts) + 1
    capacity = choose(serving, artifact.program, max_requests=len(texts), num_blocks=blocks)
    return Executor(artifact, capacity.pools)


class _Run:
    """Feeds the texts through the scheduler: prefill in chunks, requests that join, then decode."""

    def __init__(self, executor: Executor, texts: list[list[int]], watch: StepWatch, found: Verification) -> None:
        serving = executor.serving
        self.executor, self.watch, self.found = executor, watch, found
        self.caches = Caches(serving, executor.num_blocks, executor.num_window_pages, executor.num_slots)
        most = min(serving.max_batch_tokens, serving.max_context)
        self.scheduler = Scheduler(self.caches, max_batch_tokens=most, max_requests=serving.max_requests)
        self.most, self.answers = most, [text[-DECODES:] for text in texts]
        self.requests = [
            Request(str(n), text[:-DECODES], len(text) - DECODES, SamplingParams(seed=0), len(text), frozenset(), 0.0)
            for n, text in enumerate(texts)
        ]

    @torch.inference_mode()
    def all(self) -> None:
        """Every step of the model."""
        for number, request in enumerate(self.requests):
            self.scheduler.add(request)
            # Not all of a prompt at once: the rest of it runs beside the next request's first chunk.
            pending = sum(r.pending for r in self.requests[: number + 1])
            self._step(max(number + 1, pending * 3 // 5))
        while any(r.pending for r in self.requests):
            self._step(self.most)
        for number in range(DECODES):
            for request, answer in zip(self.requests, self.answers, strict=True):
                request.tokens.append(answer[number])
            self._step(self.most)

    def _step(self, budget: int) -> None:
        self.scheduler.max_batch_tokens = min(self.most, max(budget, len(self.requests)))
        chunks: list[Chunk] = self.scheduler.schedule()
        serving = self.executor.serving
        batch = build_batch(chunks, self.caches, csa_ratio=serving.csa_ratio, hca_ratio=serving.hca_ratio)
        rows = min(len(batch.ids), serving.max_logit_rows, LOGIT_ROWS)
        spread = torch.linspace(0, len(batch.ids) - 1, rows).round().int()
        self.found.tokens += len(batch.ids)
        try:
            self.executor.step(batch._replace(logit_rows=spread), self.watch)
        except torch.OutOfMemoryError as error:
            raise VerifyError(
                f"{self.found.folder}: no memory to judge a step: {str(error).partition('. ')[0]}. Give fewer "
                "--tokens, or one --region."
            ) from error
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if self.watch.judging:
                raise
            where = "; ".join(getattr(error, "__notes__", ()))
            raise VerifyError(f"{self.found.folder}: the plan does not run: {error} ({where}).") from error
        self.found.model_steps += 1
        self.scheduler.advance(chunks)
