"""`Engine`: requests in, outputs out, one step at a time. What it does for a step is in `Engine.plan` and `Engine.run`.

Contract:
    Every request that `submit` took ends with one output that has a `finish_reason`, unless it is aborted. An executor
    that fails leaves caches nobody can vouch for: all requests end in an error and the engine takes no more.
    Not thread-safe, except `prepare`, which touches nothing: `AsyncEngine` runs an engine in a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from atomc.ops.batch import Batch
from atomc.runtime.batch import build_batch
from atomc.runtime.caches import Caches
from atomc.runtime.detokenize import Detokenizer, Vocabulary
from atomc.runtime.errors import EngineError, RequestError, UnavailableError
from atomc.runtime.intake import Intake, Prompt
from atomc.runtime.metrics import Metrics
from atomc.runtime.protocols import Executor
from atomc.runtime.request import FinishReason, Output, Request, SamplingParams
from atomc.runtime.sampler import Sample, sample
from atomc.runtime.scheduler import Chunk, Scheduler


class _Live(NamedTuple):
    request: Request
    text: Detokenizer


class StepPlan(NamedTuple):
    """One step that is scheduled and not yet run. `start` is the clock's time when it was begun."""

    chunks: list[Chunk]
    batch: Batch
    start: float
    preempted: int


class Engine:
    """Continuous batching over one executor. Raises `ServingError` when its caches cannot hold even one request."""

    def __init__(
        self,
        executor: Executor,
        *,
        vocabulary: Vocabulary | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.executor = executor
        self.serving = serving = executor.serving
        self.vocabulary = vocabulary or Vocabulary.from_file(executor.tokenizer_path)
        self.metrics = metrics or Metrics()
        self.clock = clock
        self.caches = Caches(serving, executor.num_blocks, executor.num_window_pages, executor.num_slots)
        self.scheduler = Scheduler(
            self.caches,
            max_batch_tokens=serving.max_batch_tokens,
            # A step may complete every request in it, and then it wants a row of logits for each.
            max_requests=min(serving.max_requests, serving.max_logit_rows),
        )
        self.intake = Intake(serving, self.vocabulary, self.caches.token_capacity, clock)
        self.failure: EngineError | None = None
        self._live: dict[str, _Live] = {}
        self.metrics.state(self.scheduler, self.caches)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def prepare(self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None) -> Request:
        """Encodes and checks a request without taking it in: see `Intake.prepare`."""
        return self.intake.prepare(prompt, params, request_id)

    def submit(self, request: Request) -> None:
        """Takes a prepared request in. Raises `UnavailableError` after a failure, `RequestError` on a used id."""
        if self.failure is not None:
            raise UnavailableError(f"The engine has failed and must be restarted: {self.failure}")
        if request.id in self._live:
            raise RequestError(f"A request with the id {request.id!r} is already running.", param="request_id")
        self._live[request.id] = _Live(request, Detokenizer(self.vocabulary, request.params.stop))
        self.scheduler.add(request)
        self.metrics.accepted(request)

    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> str:
        """Prepares and submits; returns the request's id."""
        request = self.prepare(prompt, params, request_id)
        self.submit(request)
        return request.id

    def abort(self, request_id: str) -> bool:
        """Ends a request at once and frees what it holds, with no output; False when it has already ended."""
        live = self._live.pop(request_id, None)
        if live is None:
            return False
        self.scheduler.remove(live.request)
        self.metrics.ended(live.request, "abort", self.clock())
        self.metrics.state(self.scheduler, self.caches)
        return True

    def abort_all(self, message: str) -> list[Output]:
        """Ends every request with an error output that says `message`."""
        outputs = [self._output(live.request, finish_reason="error", error=message) for live in self._live.values()]
        for request_id in list(self._live):
            self.abort(request_id)
        return outputs

    def step(self) -> list[Output]:
        """Runs one step; returns what it added to the requests that got a token. Nothing when there is no work.

        Never raises for a failing executor: then every request gets an error output, see `failure`.
        """
        try:
            plan = self.plan()
            return [] if plan is None else self.run(plan)
        except Exception as error:  # noqa: BLE001 - whatever it was, no client may be left waiting
            return self.fail(error)

    def plan(self) -> StepPlan | None:
        """What the next step computes, its memory taken; None: nothing. The next call must be `run`, with it.

        Where several engines step together, what each will do is known to all before any of them runs.
        """
        if not self.has_work:
            return None
        start, preempted = self.clock(), self.scheduler.preemptions
        chunks = self.scheduler.schedule()
        batch = build_batch(chunks, self.caches, csa_ratio=self.serving.csa_ratio, hca_ratio=self.serving.hca_ratio)
        return StepPlan(chunks, batch, start, self.scheduler.preemptions - preempted)

    def run(self, plan: StepPlan) -> list[Output]:
        """Runs a planned step, as `step` does, but raises what the executor raises: then call `fail`."""
        logits = self._checked(self.executor.step(plan.batch), len(plan.batch.logit_rows))
        requests = [chunk.request for chunk in plan.chunks if chunk.completes]
        samples = sample(logits, requests) if requests else []
        self.scheduler.advance(plan.chunks)
        now = self.clock()
        outputs = [self._take(request, choice, now) for request, choice in zip(requests, samples, strict=True)]
        self._count(plan.chunks, outputs, now - plan.start, plan.preempted)
        return outputs

    def _take(self, request: Request, choice: Sample, now: float) -> Output:
        """Adds the sampled token to its request, and takes the request out when it has ended."""
        if choice.broken:
            error = f"The model's logits at position {request.computed - 1} are not finite."
            return self._finish(request, self._output(request, finish_reason="error", error=error), now)
        request.tokens.append(choice.token)
        self.metrics.token(request, now)
        detokenizer = self._live[request.id].text
        reason: FinishReason | None = None
        text = ""
        if choice.token in request.stop_ids:
            reason = "stop"
        else:
            text = detokenizer.push(choice.token)
            if detokenizer.stopped:
                reason = "stop"
            elif len(request.tokens) >= request.limit:
                reason = "length"
        if reason is None:
            return self._output(request, text, choice)
        return self._finish(request, self._output(request, text + detokenizer.finish(), choice, reason), now)

    def _finish(self, request: Request, output: Output, now: float) -> Output:
        del self._live[request.id]
        self.scheduler.remove(request)
        self.metrics.ended(request, output.finish_reason or "error", now)
        return output

    def _output(
        self,
        request: Request,
        text: str = "",
        choice: Sample | None = None,
        finish_reason: FinishReason | None = None,
        error: str | None = None,
    ) -> Output:
        return Output(
            request_id=request.id,
            text=text,
            token_ids=() if choice is None else (choice.token,),
            logprobs=() if choice is None or choice.logprob is None else (choice.logprob,),
            prompt_tokens=request.prompt_tokens,
            completion_tokens=request.generated,
            finish_reason=finish_reason,
            error=error,
        )

    def fail(self, error: Exception) -> list[Output]:
        """Ends everything without touching the caches, whose state is unknown."""
        self.failure = EngineError(f"A step of the engine failed: {type(error).__name__}: {error}")
        self.failure.__cause__ = error
        now = self.clock()
        outputs = []
        for live in self._live.values():
            outputs.append(self._output(live.request, finish_reason="error", error=str(self.failure)))
            self.metrics.ended(live.request, "error", now)
        self._live.clear()
        self.scheduler.running.clear()
        self.scheduler.waiting.clear()
        return outputs

    def _checked(self, logits: torch.Tensor, rows: int) -> torch.Tensor:
        if logits.shape != (rows, self.serving.vocab_size):
            raise EngineError(f"The executor returned logits {list(logits.shape)} for {rows} rows.")
        return logits

    def _count(self, chunks: list[Chunk], outputs: list[Output], seconds: float, preempted: int) -> None:
        self.metrics.step(sum(chunk.length for chunk in chunks), seconds, outputs)
        self.metrics.preemptions.inc(preempted)
        self.metrics.state(self.scheduler, self.caches)
