"""One request: what the client asked for (`SamplingParams`) and how far the engine has come with it (`Request`)."""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from atomc.runtime.errors import RequestError

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 20
SEED_BITS = 63


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    legal = f"{'(' if open_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name} is {value!r}; it must be a number in {legal}.", param=name)
    if value < low or value > high or (open_low and value == low):
        raise RequestError(f"{name} is {value:g}; it must be in {legal}.", param=name)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; it must be an integer in [{low}, {high}].", param=name)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises `RequestError` naming the field and its legal range.

    Attributes:
        temperature: 0 is greedy; else logits are divided by it (applied before top_k and top_p).
        top_k: keep the k most likely tokens (ties of the k-th included); 0 or -1 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach top_p (ties of the last included).
        seed: two requests of equal prompt, parameters and seed get equal tokens, whatever else runs; None is random.
        stop: strings that end the answer; neither they nor what follows is emitted.
        max_tokens: most tokens to generate; None is as many as the context and the caches hold.
        stop_token_ids: tokens that end the answer, as the end-of-sentence tokens do; their text is not emitted.
        ignore_eos: do not stop at end-of-sentence tokens (for benchmarks).
        logprobs: report each token's log-probability and that many most likely alternatives; None reports nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    max_tokens: int | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, 2)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("top_p", self.top_p, 0, 1, open_low=True)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**SEED_BITS), 2**SEED_BITS - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; it must be true or false.", param="ignore_eos")
        object.__setattr__(self, "stop", self._stops())
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    def _stops(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stops) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(stops)} strings; at most {MAX_STOP_STRINGS} are allowed.", param="stop")
        for stop in stops:
            if type(stop) is not str or not 0 < len(stop) <= MAX_STOP_LENGTH:
                raise RequestError(
                    f"stop holds {str(stop)[:40]!r}; each stop string must have 1 to {MAX_STOP_LENGTH} characters.",
                    param="stop",
                )
        return stops


class TokenLogprob(NamedTuple):
    """Log-probabilities (natural, of the model's own distribution: before temperature, top_k and top_p) of one token.

    `top` holds (token, logprob) of the most likely alternatives, most likely first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True, eq=False)
class Request:
    """A request inside the engine. `tokens` is prompt and answer; `computed` of them are in the caches.

    A request is in prefill while more than one token is not computed, in decode when exactly one is: the last sampled
    token. A preempted request goes back to `computed == 0` and keeps its tokens, so recomputing repeats nothing.

    Attributes:
        limit: most tokens it may ever have (prompt + max_tokens), so most rows it may ever need.
        slot, blocks, pages, first_page: what it holds of the caches; `pages[i]` is logical page `first_page + i`.
        arrival: seconds on the engine's clock.
    """

    id: str
    tokens: list[int]
    prompt_tokens: int
    params: SamplingParams
    limit: int
    stop_ids: frozenset[int]
    arrival: float
    seed: int = 0
    computed: int = 0
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    pages: deque[int] = field(default_factory=deque)
    first_page: int = 0
    preemptions: int = 0
    first_token_at: float | None = None
    last_token_at: float | None = None

    def __post_init__(self) -> None:
        seed = self.params.seed
        self.seed = secrets.randbits(SEED_BITS) if seed is None else seed % 2**64

    @property
    def pending(self) -> int:
        """Tokens whose rows are not yet in the caches."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one request; `finish_reason` is set on its last output.

    `text` may lag behind `token_ids`: a part of a character, or what may become a stop string, is held back.
    `error` says what went wrong when `finish_reason` is "error".
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason | None = None
    error: str | None = None
