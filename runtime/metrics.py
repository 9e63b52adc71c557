"""What the engine counts, for Prometheus. One registry per engine, so that several engines can live in one process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from atomc.runtime.caches import Caches
from atomc.runtime.request import Output, Request
from atomc.runtime.scheduler import Scheduler

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """Counters (monotonic), gauges (now) and histograms (seconds or tokens), named `atomc_*`."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("atomc_requests", "Requests ended, by reason", ["reason"], registry=registry)
        self.prompt_tokens = Counter("atomc_prompt_tokens", "Prompt tokens of accepted requests", registry=registry)
        self.generated_tokens = Counter("atomc_generated_tokens", "Tokens generated", registry=registry)
        self.preemptions = Counter("atomc_preemptions", "Requests preempted, to be recomputed", registry=registry)
        self.steps = Counter("atomc_steps", "Steps of the engine", registry=registry)
        self.waiting = Gauge("atomc_requests_waiting", "Requests that hold no slot yet", registry=registry)
        self.running = Gauge("atomc_requests_running", "Requests that hold a slot", registry=registry)
        self.pool_used = Gauge("atomc_pool_used", "Pieces of a cache pool in use", ["pool"], registry=registry)
        self.pool_capacity = Gauge("atomc_pool_capacity", "Pieces of a cache pool", ["pool"], registry=registry)
        self.step_tokens = Histogram("atomc_step_tokens", "Tokens in a step", buckets=_TOKENS, registry=registry)
        self.step_seconds = Histogram("atomc_step_seconds", "A step, end to end", buckets=_SECONDS, registry=registry)
        self.first_token = Histogram(
            "atomc_time_to_first_token_seconds", "Arrival to first token", buckets=_SECONDS, registry=registry
        )
        self.inter_token = Histogram(
            "atomc_inter_token_seconds", "Between two tokens of a request", buckets=_SECONDS, registry=registry
        )
        self.latency = Histogram("atomc_request_seconds", "Arrival to last token", buckets=_SECONDS, registry=registry)

    def accepted(self, request: Request) -> None:
        self.prompt_tokens.inc(request.prompt_tokens)

    def token(self, request: Request, now: float) -> None:
        """One token was generated; keeps the request's time stamps."""
        if request.first_token_at is None or request.last_token_at is None:
            request.first_token_at = now
            self.first_token.observe(now - request.arrival)
        else:
            self.inter_token.observe(now - request.last_token_at)
        request.last_token_at = now

    def ended(self, request: Request, reason: str, now: float) -> None:
        self.requests.labels(reason).inc()
        self.latency.observe(now - request.arrival)

    def step(self, tokens: int, seconds: float, outputs: list[Output]) -> None:
        self.steps.inc()
        self.step_tokens.observe(tokens)
        self.step_seconds.observe(seconds)
        self.generated_tokens.inc(sum(len(output.token_ids) for output in outputs))

    def state(self, scheduler: Scheduler, caches: Caches) -> None:
        """Queue lengths and pool use, as they are now."""
        self.waiting.set(len(scheduler.waiting))
        self.running.set(len(scheduler.running))
        for pool in (caches.slots, caches.blocks, caches.pages):
            self.pool_used.labels(pool.name).set(pool.used)
            self.pool_capacity.labels(pool.name).set(pool.capacity)

    def render(self) -> bytes:
        """The text that `/metrics` answers with."""
        return generate_latest(self.registry)
