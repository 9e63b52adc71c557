"""Where a step's launches go while a decode graph is captured: the plan's streams, forked and joined by events.

Contract:
    A step begins when the step before it on its stream and those it waits for are over. Every region begins after what
    the main stream held before it and ends on the main stream (`join`), so calls follow one another, and so do replays.
    A launch is dependent (`atomc.runtime.launcher`) only if it follows one launch of its own stream and nothing else.
    Outside of a capture there is one stream, the current one, and the order is the plan's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atomc.artifact.order import STREAMS


class Streams:
    """The streams of one capture, which has begun on `main`. `side`: of the plan's; empty: all is launched on main.

    `dependent`: whether launches may be dependent.
    """

    def __init__(self, main: torch.cuda.Stream, side: Sequence[torch.cuda.Stream], dependent: bool) -> None:
        self.main, self.aside, self.dependent = main, bool(side), dependent
        self.all = [main, *(side or [main] * (STREAMS - 1))]
        self._launched: set[int] = set()  # streams whose last node is a launch, and on which nothing waits for more
        self._forked: set[int] = set()  # side streams that are part of this region
        self._over: dict[int, torch.cuda.Event] = {}  # step -> its end
        self._start = self.main.record_event()

    def enter(self, stream: int, waits: Sequence[int]) -> torch.cuda.Stream:
        """The stream of the plan that a step begins on, made to wait for what the step needs of others."""
        found = self.all[stream]
        if self.aside:
            if stream and stream not in self._forked:
                self._forked.add(stream)
                self._wait(stream, self._start)
            for step in waits:
                self._wait(stream, self._over[step])
        return found

    def _wait(self, stream: int, event: torch.cuda.Event) -> None:
        self.all[stream].wait_event(event)
        self._launched.discard(stream)

    def launch(self, stream: int) -> bool:
        """A launch is made on a stream of the plan. Returns whether it may be dependent."""
        place = stream if self.aside else 0
        follows = place in self._launched
        self._launched.add(place)
        return follows and self.dependent

    def foreign(self, stream: int) -> None:
        """Something else than a launch was put on a stream of the plan: what follows waits for its end."""
        self._launched.discard(stream if self.aside else 0)

    def leave(self, step: int, stream: int) -> None:
        """A step of the plan that others wait for has been launched."""
        if self.aside:
            self._over[step] = self.all[stream].record_event()

    def join(self) -> None:
        """End a region: what comes next on the main stream follows all of it."""
        for stream in sorted(self._forked):
            self._wait(0, self.all[stream].record_event())
        self._forked.clear()
        self._over.clear()
        self._start = self.main.record_event()
