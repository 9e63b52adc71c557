"""`Scheduler`: which requests run in the next step, and how many tokens of each (continuous batching).

Contract:
    `schedule` returns chunks for one step of at most `max_batch_tokens` tokens; prefill, chunked prefill and decode
    mix freely, because a decode is a chunk of one token. Every running request moves in every step, so neither side
    starves the other; what is left of the budget goes to prompts, the oldest first. Requests join in order of arrival,
    and when blocks run out the youngest running request is preempted: the oldest always gets on, so no set of requests
    that fit the caches one by one can hang.

Terms:
    running   holds a slot, ordered by arrival; all of it arrived before anything in waiting
    waiting   holds nothing; a preempted request returns to the front and is recomputed when it joins again
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from atomc.runtime.caches import Caches
from atomc.runtime.request import Request


class Chunk(NamedTuple):
    """`length` tokens of a request from position `request.computed` on; its logits are wanted if it `completes`.

    A chunk completes its request when no known token is left to compute: then the next one can be sampled.
    """

    request: Request
    length: int

    @property
    def completes(self) -> bool:
        return self.length == self.request.pending


class Scheduler:
    """Queues of requests over the caches. It never looks at tokens, logits or text."""

    def __init__(self, caches: Caches, *, max_batch_tokens: int, max_requests: int) -> None:
        self.caches = caches
        self.max_batch_tokens = max_batch_tokens
        # With one token of the budget for each running request, all of them can move in every step.
        self.max_running = min(max_requests, max_batch_tokens)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, ordered by arrival; their pages and blocks are taken."""
        preemptions = self.preemptions
        chunks = self._continue()
        if self.preemptions == preemptions:
            self._join(chunks)
        assert chunks or not self.has_work, "the scheduler found nothing to run although requests are left"
        return chunks

    def advance(self, chunks: list[Chunk]) -> None:
        """After the step ran: its tokens are in the caches, and pages that left the window are free."""
        for request, length in chunks:
            request.computed += length
            self.caches.retire(request)

    def remove(self, request: Request) -> None:
        """Takes a finished or aborted request out, wherever it is."""
        if request.slot >= 0:
            self.running.remove(request)
            self.caches.release(request)
        else:
            self.waiting.remove(request)
        if not self.has_work:
            self.caches.check_idle()

    def _continue(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        spare = self.max_batch_tokens - len(self.running)
        while len(chunks) < len(self.running):
            request = self.running[len(chunks)]
            count = min(request.pending, 1 + spare, self.caches.room(request))
            if self.caches.reserve(request, count):
                chunks.append(Chunk(request, count))
                spare -= count - 1
            else:
                self._preempt(self.running.pop())
        return chunks

    def _join(self, chunks: list[Chunk]) -> None:
        budget = self.max_batch_tokens - sum(chunk.length for chunk in chunks)
        while self.waiting and budget > 0 and len(self.running) < self.max_running:
            request = self.waiting[0]
            # A spare block for each running request: else a newcomer's first act is to have somebody preempted.
            if not self.caches.fits(request, spare_blocks=len(self.running)):
                return
            self.waiting.popleft()
            self.caches.admit(request)
            self.running.append(request)
            count = min(request.pending, budget, self.caches.room(request))
            taken = self.caches.reserve(request, count)
            assert taken, "admission took the blocks of all known tokens"
            chunks.append(Chunk(request, count))
            budget -= count

    def _preempt(self, request: Request) -> None:
        self.caches.release(request)
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)
