"""`Caches`: what each request holds of the model's state (spec 4.1): a slot, blocks of compressed rows, window pages.

Contract:
    Blocks grow with the context: all blocks of the known tokens are taken at admission, later ones as decode reaches
    them, and when none is left somebody must be preempted. Pages are bounded by the window, so each admitted request
    has its bound promised: a page can always be taken for one more token, and pages never cause a preemption.

Terms:
    bound of a request   most pages its window can touch between two steps: ceil((W - 1) / P) + 1, or fewer if short
    promised             sum over admitted requests of max(0, bound - held); the pool never has fewer free pages
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atomc.runtime.errors import ServingError
from atomc.runtime.pool import BlockPool
from atomc.runtime.protocols import Serving
from atomc.runtime.request import Request


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


class Caches:
    """The pools, and the tables that lead from a request's slot to its physical blocks and pages (int32, 0 = none)."""

    def __init__(self, serving: Serving, num_blocks: int, num_window_pages: int, num_slots: int) -> None:
        self.window, self.page = serving.window, serving.window_page
        self.block_tokens = serving.block_tokens
        self.slots = BlockPool("slot", num_slots, reserved=0)
        self.blocks = BlockPool("block", num_blocks)
        self.pages = BlockPool("window page", num_window_pages)
        self.window_table: npt.NDArray[np.int32] = np.zeros((num_slots, serving.window_table_width), dtype=np.int32)
        self.block_table: npt.NDArray[np.int32] = np.zeros((num_slots, serving.block_table_width), dtype=np.int32)
        self._promised = 0
        self._page_bound = ceil_div(self.window - 1, self.page) + 1
        self._check(serving)

    def _check(self, serving: Serving) -> None:
        """Raises `ServingError` where the tables or the pools could not serve a single request."""
        width = ceil_div(self.window + serving.max_batch_tokens, self.page) + 1
        if serving.window_table_width < width:
            raise ServingError(
                f"The window table has {serving.window_table_width} columns; a window of {self.window} and steps of "
                f"{serving.max_batch_tokens} tokens need {width}. Recompile the artifact."
            )
        if serving.block_table_width * self.block_tokens < serving.max_context:
            raise ServingError(
                f"The block table has {serving.block_table_width} columns of {self.block_tokens} tokens, too few for "
                f"the context of {serving.max_context} tokens. Recompile the artifact."
            )
        if self.pages.capacity < self._page_bound or self.blocks.capacity < 1 or self.slots.capacity < 1:
            raise ServingError(
                f"The caches have {self.slots.capacity} slots, {self.blocks.capacity} blocks and {self.pages.capacity} "
                f"window pages; one request needs 1, 1 and {self._page_bound}. Give the caches more memory."
            )

    @property
    def token_capacity(self) -> int:
        """Most tokens that one request alone can have."""
        return self.blocks.capacity * self.block_tokens

    def fits(self, request: Request, *, spare_blocks: int) -> bool:
        """Whether a slot, the pages' bound and the blocks of all known tokens are free, `spare_blocks` left over."""
        return (
            self.slots.free > 0
            and self.pages.free - self._promised >= self._bound(request)
            and self.blocks.free >= ceil_div(len(request.tokens), self.block_tokens) + spare_blocks
        )

    def admit(self, request: Request) -> None:
        """Takes a slot and the blocks of all known tokens, and promises the pages. Only after `fits`."""
        request.slot = self.slots.take()
        self._promised += self._bound(request)
        self._take_blocks(request, ceil_div(len(request.tokens), self.block_tokens))

    def room(self, request: Request) -> int:
        """How many tokens there are pages for, now, without touching what is promised to others; at least 1."""
        free = self.pages.free - self._promised + self._promise(request)
        return (request.first_page + len(request.pages) + free) * self.page - request.computed

    def reserve(self, request: Request, count: int) -> bool:
        """Takes the pages and blocks of the next `count <= room` tokens; False when the blocks do not suffice."""
        end = request.computed + count
        missing = ceil_div(end, self.block_tokens) - len(request.blocks)
        if missing > self.blocks.free:
            return False
        self._take_blocks(request, missing)
        for logical in range(request.first_page + len(request.pages), ceil_div(end, self.page)):
            self._promised -= self._promise(request)
            request.pages.append(self.pages.take())
            self._promised += self._promise(request)
            self.window_table[request.slot, logical % self.window_table.shape[1]] = request.pages[-1]
        return True

    def retire(self, request: Request) -> None:
        """Gives back the pages that no position from `request.computed` on can see."""
        first = max(0, request.computed - self.window + 1) // self.page
        while request.first_page < first:
            self._promised -= self._promise(request)
            self.pages.give((request.pages.popleft(),))
            self._promised += self._promise(request)
            self.window_table[request.slot, request.first_page % self.window_table.shape[1]] = 0
            request.first_page += 1

    def release(self, request: Request) -> None:
        """Gives everything back; the request must be recomputed from its first token to go on."""
        self._promised -= self._promise(request)
        self.pages.give(request.pages)
        self.blocks.give(request.blocks)
        self.window_table[request.slot] = 0
        self.block_table[request.slot, : len(request.blocks)] = 0
        self.slots.give((request.slot,))
        request.slot, request.first_page, request.computed = -1, 0, 0
        request.pages.clear()
        request.blocks.clear()

    def check_idle(self) -> None:
        """Raises `AssertionError` when something is still held although no request is left."""
        for pool in (self.slots, self.blocks, self.pages):
            pool.check_idle()
        assert self._promised == 0, f"{self._promised} window pages are promised to nobody"
        assert not self.window_table.any(), "the window table of an idle engine is not empty"
        assert not self.block_table.any(), "the block table of an idle engine is not empty"

    def _bound(self, request: Request) -> int:
        return min(self._page_bound, ceil_div(request.limit, self.page))

    def _promise(self, request: Request) -> int:
        return max(0, self._bound(request) - len(request.pages))

    def _take_blocks(self, request: Request, count: int) -> None:
        for _ in range(count):
            block = self.blocks.take()
            self.block_table[request.slot, len(request.blocks)] = block
            request.blocks.append(block)
