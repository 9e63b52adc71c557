"""`Intake`: makes a request of what a client asked for, or refuses it. It needs no model, only the size of caches."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

from atomc.runtime.detokenize import Vocabulary
from atomc.runtime.errors import RequestError
from atomc.runtime.protocols import Serving
from atomc.runtime.request import Request, SamplingParams

Prompt = str | Sequence[int]


class Intake:
    """`token_capacity`: most tokens that the caches hold of one request alone."""

    def __init__(
        self,
        serving: Serving,
        vocabulary: Vocabulary,
        token_capacity: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.serving, self.vocabulary = serving, vocabulary
        self.token_capacity, self.clock = token_capacity, clock
        self._numbers = itertools.count()

    def prepare(self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None) -> Request:
        """Encodes and checks a request.

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
            (self.token_capacity, "this server's cache memory"),
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
        return min(self.serving.max_context, self.token_capacity)
