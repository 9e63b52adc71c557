"""`Engine`: requests in, outputs out, one step at a time. Everything it does for a step is in `Engine._step`.

Contract:
    Every request that `submit` took ends with one output that has a `finish_reason`, unless it is aborted. An executor
    that fails leaves caches nobody can vouch for: all requests end in an error and the engine takes no more.
    Not thread-safe, except `prepare`, which touches nothing: `AsyncEngine` runs an engine in a thread of its own.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from atomc.runtime.batch import build_batch
from atomc.runtime.caches import Caches
from atomc.runtime.detokenize import Detokenizer, Vocabulary
from atomc.runtime.errors import EngineError, RequestError, UnavailableError
from atomc.runtime.metrics import Metrics
from atomc.runtime.protocols import Executor
from atomc.runtime.request import FinishReason, Output, Request, SamplingParams
from atomc.runtime.sampler import Sample, sample
from atomc.runtime.scheduler import Chunk, Scheduler

Prompt = str | Sequence[int]


class _Live(NamedTuple):
    request: Request
    text: Detokenizer


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
        self.failure: EngineError | None = None
        self._live: dict[str, _Live] = {}
        self._numbers = itertools.count()
        self.metrics.state(self.scheduler, self.caches)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def prepare(self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None) -> Request:
        """Encodes and checks a request without taking it in.

        A text prompt gets the model's BOS in front unless it spells it itself; a list of ids is taken as it is.
        Raises `RequestError` when the prompt is empty, holds an unknown id, or leaves no room for an answer.
        """
        params = params or SamplingParams()
        tokens = self._encode(prompt)
        stop_ids = frozenset(params.stop_token_ids)
        return Request(
            id=request_id or f"request-{next(self._numbers)}",
            tokens=tokens,
            prompt_tokens=len(tokens),
            params=params,
            limit=self._limit(len(tokens), params),
            stop_ids=stop_ids if params.ignore_eos else stop_ids | frozenset(self.serving.eos_ids),
            arrival=self.clock(),
        )

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
        if not self.has_work:
            return []
        try:
            return self._step()
        except Exception as error:  # noqa: BLE001 - whatever it was, no client may be left waiting
            return self.fail(error)

    def _step(self) -> list[Output]:
        start, preempted = self.clock(), self.scheduler.preemptions
        chunks = self.scheduler.schedule()
        batch = build_batch(chunks, self.caches, csa_ratio=self.serving.csa_ratio, hca_ratio=self.serving.hca_ratio)
        logits = self._checked(self.executor.step(batch), len(batch.logit_rows))
        requests = [chunk.request for chunk in chunks if chunk.completes]
        samples = sample(logits, requests) if requests else []
        self.scheduler.advance(chunks)
        now = self.clock()
        outputs = [self._take(request, choice, now) for request, choice in zip(requests, samples, strict=True)]
        self._count(chunks, outputs, now - start, self.scheduler.preemptions - preempted)
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

    def _encode(self, prompt: Prompt) -> list[int]:
        bos, vocab = self.serving.bos_id, self.serving.vocab_size
        if isinstance(prompt, str):
            tokens = self.vocabulary.encode(prompt)
            if bos is not None and tokens[:1] != [bos]:
                tokens.insert(0, bos)
        else:
            tokens = list(prompt)
        for token in tokens:
            if type(token) is not int or not 0 <= token < vocab:
                raise RequestError(
                    f"The prompt holds the token {token!r}; ids are integers in [0, {vocab - 1}].", param="prompt"
                )
        if not tokens:
            raise RequestError("The prompt is empty; it needs at least one token.", param="prompt")
        return tokens

    def _limit(self, prompt_tokens: int, params: SamplingParams) -> int:
        """Most tokens the request may have; refuses what could not be finished even if it ran alone."""
        for most, what in (
            (self.serving.max_context, "the model's context"),
            (self.caches.token_capacity, "this server's cache memory"),
        ):
            total = prompt_tokens + (params.max_tokens or 1)
            if total > most:
                asked = "at least 1" if params.max_tokens is None else str(params.max_tokens)
                raise RequestError(
                    f"The prompt has {prompt_tokens} tokens and {asked} to generate makes {total}, but {what} holds "
                    f"{most} tokens. Shorten the prompt or lower max_tokens.",
                    param="prompt" if prompt_tokens >= most else "max_tokens",
                    code="context_length_exceeded",
                )
        if params.max_tokens is not None:
            return prompt_tokens + params.max_tokens
        return min(self.serving.max_context, self.caches.token_capacity)
