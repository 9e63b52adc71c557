"""Bits per byte of texts under the compiled model: −Σ log2 p(token | tokens before) / UTF-8 bytes.

Contract:
    Every token of a document is scored exactly once, given tokens of its own document only. A document longer than the
    context is read in windows; all but the first begin `overlap` tokens before what they score, so each scored token
    has at least `overlap` tokens before it, where the document has them.

Terms:
    BOS   put before a document, never scored; without it nothing predicts the first token, which then costs
          log2(vocabulary), as much as a guess
    EOS   put behind a document and scored like any token, if wanted: the price of saying where the text ends
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from atomc.runtime.batch import build_batch
from atomc.runtime.caches import Caches
from atomc.runtime.detokenize import Vocabulary
from atomc.runtime.errors import EngineError, ServingError
from atomc.runtime.protocols import Executor
from atomc.runtime.request import Request, SamplingParams
from atomc.runtime.scheduler import Chunk, Scheduler

Progress = Callable[[int, int], None]  # tokens computed, tokens to compute


@dataclass
class Score:
    """The sums over all documents."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    nats: float = 0.0
    computed: int = 0  # tokens the model read, overlaps included

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens


@dataclass(frozen=True)
class Window:
    """Tokens to read, of which the model predicts `targets[i]` after `tokens[i]`; scored from index `first` on."""

    tokens: list[int]
    targets: list[int]
    first: int


def windows(ids: list[int], context: int, overlap: int) -> Iterator[Window]:
    """Cuts a document of two tokens or more so that each token but the first is scored once."""
    last = len(ids) - 1
    begin = scored = 0
    while scored < last:
        end = min(begin + context, last)
        yield Window(ids[begin:end], ids[begin + 1 : end + 1], scored - begin)
        begin, scored = end - overlap, end


def evaluate(
    executor: Executor,
    documents: Iterable[str],
    *,
    bos: bool = True,
    eos: bool = False,
    context: int | None = None,
    overlap: int | None = None,
    progress: Progress = lambda *_: None,
) -> Score:
    """Scores documents one after the other, several windows in each step.

    Args:
        context: tokens of a window (None: as many as the artifact and its caches hold).
        overlap: of two windows of one document (None: half the context).
    Raises:
        ServingError: the context or overlap is out of range, or there is nothing to score.
        EngineError: the model's logits are not finite.
    """
    evaluator = _Evaluator(executor, progress)
    most = min(executor.serving.max_context, evaluator.caches.token_capacity)
    context = most if context is None else context
    overlap = context // 2 if overlap is None else overlap
    if not 1 <= context <= most:
        raise ServingError(f"A context of {context} tokens is asked for; artifact and caches hold 1 to {most}.")
    if not 0 <= overlap < context:
        raise ServingError(f"An overlap of {overlap} tokens is asked for; it must be 0 to {context - 1}.")
    score = evaluator.score
    evaluator.run(
        [
            window
            for text in documents
            for window in windows(_ids(executor, evaluator.vocabulary, text, bos, eos, score), context, overlap)
        ]
    )
    if not score.bytes or not score.tokens:
        raise ServingError("There is no text to score: the documents are empty.")
    return score


def _ids(executor: Executor, vocabulary: Vocabulary, text: str, bos: bool, eos: bool, score: Score) -> list[int]:
    serving = executor.serving
    ids = vocabulary.encode(text)
    if eos:
        ids.append(serving.eos_ids[0])
    score.documents += 1
    score.bytes += len(text.encode())
    if bos and serving.bos_id is not None:
        ids.insert(0, serving.bos_id)
    elif ids:
        score.tokens += 1
        score.nats += math.log(serving.vocab_size)
    return ids


class _Evaluator:
    """Runs windows through the runtime's scheduler and caches; a request is a window whose prompt is all there is."""

    def __init__(self, executor: Executor, progress: Progress) -> None:
        serving = executor.serving
        self.executor, self.progress, self.score = executor, progress, Score()
        self.vocabulary = Vocabulary.from_file(executor.tokenizer_path)
        self.caches = Caches(serving, executor.num_blocks, executor.num_window_pages, executor.num_slots)
        # Any token of a step may be scored, and then it needs a row of logits.
        tokens = min(serving.max_batch_tokens, serving.max_logit_rows)
        self.scheduler = Scheduler(self.caches, max_batch_tokens=tokens, max_requests=serving.max_requests)
        self.windows: dict[str, Window] = {}

    @torch.inference_mode()
    def run(self, windows: Sequence[Window]) -> None:
        """Keeps as many windows in the queue as may run together, until none is left."""
        total, source = sum(len(window.tokens) for window in windows), enumerate(windows)
        while True:
            for number, window in islice(source, self.scheduler.max_running - len(self.windows)):
                self._add(str(number), window)
            if not self.windows:
                return
            self._step()
            self.progress(self.score.computed, total)

    def _add(self, name: str, window: Window) -> None:
        length = len(window.tokens)
        self.windows[name] = window
        self.scheduler.add(Request(name, window.tokens, length, SamplingParams(), length, frozenset(), 0.0))

    def _step(self) -> None:
        chunks = self.scheduler.schedule()
        serving = self.executor.serving
        batch = build_batch(chunks, self.caches, csa_ratio=serving.csa_ratio, hca_ratio=serving.hca_ratio)
        rows, targets = self._scored(chunks)
        # A step has one row of logits at least, whether anything of it is scored or not.
        logits = self.executor.step(batch._replace(logit_rows=torch.tensor(rows or [0], dtype=torch.int32)))
        if rows:
            self._take(logits, targets)
        self.scheduler.advance(chunks)
        for chunk in chunks:
            if not chunk.request.pending:
                self.scheduler.remove(chunk.request)
                del self.windows[chunk.request.id]
        self.score.computed += sum(chunk.length for chunk in chunks)

    def _scored(self, chunks: list[Chunk]) -> tuple[list[int], list[int]]:
        """Rows of the batch whose next token counts, and these next tokens."""
        rows: list[int] = []
        targets: list[int] = []
        start = 0
        for request, length in chunks:
            window = self.windows[request.id]
            skipped = max(0, window.first - request.computed)
            rows += range(start + min(skipped, length), start + length)
            targets += window.targets[request.computed + min(skipped, length) : request.computed + length]
            start += length
        return rows, targets

    def _take(self, logits: torch.Tensor, targets: list[int]) -> None:
        chosen = logits.gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0]
        nats = float((logits.logsumexp(dim=-1) - chosen).double().sum())
        if not math.isfinite(nats):
            raise EngineError("The model's logits are not finite.")
        self.score.nats += nats
        self.score.tokens += len(targets)
