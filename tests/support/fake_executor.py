"""A strict machine in the executor's place: it checks every number it is given and computes like a real model would.

It remembers what was written into which physical row, and in each step it looks, through the tables alone, for
everything that a query of the real model may see (spec 4.1): the rows of the last W positions, and the row of every
complete window of both ratios. Each must be there and be that sequence's own. Logits are a function of the sequence's
whole history, so an answer computed in a batch can be compared with one computed alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from atomc.ops.batch import Batch
from atomc.runtime.detokenize import Vocabulary
from atomc.runtime.engine import Engine
from atomc.runtime.request import SamplingParams

MASK = 2**64 - 1


@dataclass(frozen=True)
class FakeServing:
    """A small model's serving facts; the table widths are the smallest legal ones unless given."""

    model_name: str = "fake"
    vocab_size: int = 320
    bos_id: int = 0
    eos_ids: list[int] = field(default_factory=lambda: [1])
    window: int = 8
    window_page: int = 4
    block_tokens: int = 8
    csa_ratio: int = 2
    hca_ratio: int = 4
    max_context: int = 256
    max_batch_tokens: int = 16
    max_requests: int = 4
    max_logit_rows: int = 4
    window_table_width: int = 0
    block_table_width: int = 0

    def __post_init__(self) -> None:
        width = -(-(self.window + self.max_batch_tokens) // self.window_page) + 1
        object.__setattr__(self, "window_table_width", self.window_table_width or width)
        object.__setattr__(
            self, "block_table_width", self.block_table_width or -(-self.max_context // self.block_tokens)
        )

    def but(self, **changes: int) -> FakeServing:
        """A copy with other facts; the table widths follow unless given."""
        return replace(self, **{"window_table_width": 0, "block_table_width": 0, **changes})  # type: ignore[arg-type]


def extend(digest: int, token: int) -> int:
    """The digest of a history one token longer."""
    digest = (digest * 0x9E3779B97F4A7C15 + token + 1) & MASK
    return digest ^ (digest >> 29)


def logits_of(digest: int, vocab: int) -> np.ndarray:
    return np.random.default_rng(digest).standard_normal(vocab, dtype=np.float32) * 3


def digest_of(tokens: Sequence[int]) -> int:
    digest = 7
    for token in tokens:
        digest = extend(digest, token)
    return digest


@dataclass(eq=False)
class _History:
    """What one slot holds: a sequence that began at position 0. Its identity is the object's."""

    tokens: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)

    def append(self, token: int) -> None:
        self.digests.append(extend(self.digests[-1] if self.digests else 7, token))
        self.tokens.append(token)


class FakeExecutor:
    """`before_step(number)` may raise or wait; `script(history)` may name the token that must come next."""

    def __init__(
        self,
        serving: FakeServing,
        *,
        num_blocks: int = 64,
        num_window_pages: int = 64,
        num_slots: int | None = None,
        tokenizer_path: Path = Path("no-tokenizer"),
        before_step: Callable[[int], None] = lambda step: None,
        script: Callable[[list[int]], int | None] = lambda tokens: None,
    ) -> None:
        self.serving = serving
        self.num_blocks, self.num_window_pages = num_blocks, num_window_pages
        self.num_slots = serving.max_requests if num_slots is None else num_slots
        self.tokenizer_path = tokenizer_path
        self.before_step, self.script = before_step, script
        self.steps = 0
        self.step_sizes: list[int] = []
        self.histories: dict[int, _History] = {}
        self.window_rows: dict[tuple[int, int], tuple[_History, int]] = {}
        self.compressed_rows: dict[tuple[int, int, int], tuple[_History, int]] = {}

    def step(self, batch: Batch) -> torch.Tensor:
        self.steps += 1
        self.before_step(self.steps)
        self._check_form(batch)
        self.step_sizes.append(len(batch.ids))
        ranges = list(zip(batch.query_start[:-1].tolist(), batch.query_start[1:].tolist(), strict=True))
        for row, (start, end) in enumerate(ranges):
            self._insert(batch, row, start, end)
        for row, (start, end) in enumerate(ranges):
            self._look(batch, row, start, end)
        rows = []
        for token in batch.logit_rows.tolist():
            history = self.histories[int(batch.slots[batch.requests[token]])]
            position = int(batch.positions[token])
            logits = logits_of(history.digests[position], self.serving.vocab_size)
            chosen = self.script(history.tokens[: position + 1])
            if chosen is not None:
                logits[chosen] = 1000.0
            rows.append(logits)
        return torch.from_numpy(np.stack(rows))

    def _check_form(self, batch: Batch) -> None:
        serving, tokens, rows = self.serving, len(batch.ids), len(batch.slots)
        for name, tensor in batch._asdict().items():
            assert tensor.dtype == torch.int32, name
            assert tensor.is_contiguous(), name
        assert 1 <= tokens <= serving.max_batch_tokens
        assert 1 <= rows <= serving.max_requests
        assert batch.positions.shape == batch.requests.shape == (tokens,)
        assert batch.query_start.shape == (rows + 1,)
        assert batch.window_table.shape == (rows, serving.window_table_width)
        assert batch.block_table.shape == (rows, serving.block_table_width)
        start = batch.query_start.tolist()
        assert start[0] == 0
        assert start[-1] == tokens
        assert all(a < b for a, b in itertools.pairwise(start)), "a request without tokens"
        assert int(batch.ids.min()) >= 0
        assert int(batch.ids.max()) < serving.vocab_size
        assert int(batch.positions.min()) >= 0
        assert int(batch.positions.max()) < serving.max_context
        for row in range(rows):
            part = slice(start[row], start[row + 1])
            assert (batch.requests[part] == row).all()
            assert (batch.positions[part].diff() == 1).all(), "positions of one request are consecutive"
        slots = batch.slots.tolist()
        assert len(set(slots)) == rows, "two requests share a slot"
        assert set(slots) <= set(range(self.num_slots))
        for table, count in ((batch.window_table, self.num_window_pages), (batch.block_table, self.num_blocks)):
            used = table[table != 0].tolist()
            assert len(used) == len(set(used)), "two entries lead to the same page or block"
            assert all(0 < entry < count for entry in used)
        assert batch.csa_ends.tolist() == self._ends(batch, serving.csa_ratio)
        assert batch.hca_ends.tolist() == self._ends(batch, serving.hca_ratio)
        assert 1 <= len(batch.logit_rows) <= serving.max_logit_rows
        assert set(batch.logit_rows.tolist()) <= {end - 1 for end in start[1:]}, "logits of a token that is not a last"

    @staticmethod
    def _ends(batch: Batch, ratio: int) -> list[int]:
        if not ratio:
            return [-1]
        return [t for t, position in enumerate(batch.positions.tolist()) if (position + 1) % ratio == 0] or [-1]

    def _insert(self, batch: Batch, row: int, start: int, end: int) -> None:
        serving, slot = self.serving, int(batch.slots[row])
        first = int(batch.positions[start])
        if first == 0:
            self.histories[slot] = _History()
        history = self.histories[slot]
        assert len(history.tokens) == first, (
            f"slot {slot} holds {len(history.tokens)} tokens, the request is at {first}"
        )
        for token in range(start, end):
            position = int(batch.positions[token])
            history.append(int(batch.ids[token]))
            self.window_rows[self._window_row(batch, row, position)] = (history, position)
            for ratio in (serving.csa_ratio, serving.hca_ratio):
                if ratio and (position + 1) % ratio == 0:
                    window = position // ratio
                    self.compressed_rows[self._compressed_row(batch, row, ratio, window)] = (history, window)

    def _look(self, batch: Batch, row: int, start: int, end: int) -> None:
        serving = self.serving
        history = self.histories[int(batch.slots[row])]
        first, last = int(batch.positions[start]), int(batch.positions[end - 1])
        for position in range(max(0, first - serving.window + 1), last + 1):
            found = self.window_rows.get(self._window_row(batch, row, position))
            assert found == (history, position), f"position {position} of row {row} is not in its window page"
        for ratio in (serving.csa_ratio, serving.hca_ratio):
            for window in range((last + 1) // ratio if ratio else 0):
                found = self.compressed_rows.get(self._compressed_row(batch, row, ratio, window))
                assert found == (history, window), f"window {window} (ratio {ratio}) of row {row} is not in its block"

    def _window_row(self, batch: Batch, row: int, position: int) -> tuple[int, int]:
        logical, offset = divmod(position, self.serving.window_page)
        page = int(batch.window_table[row, logical % self.serving.window_table_width])
        assert page != 0, f"position {position} of row {row} has no window page"
        return page, offset

    def _compressed_row(self, batch: Batch, row: int, ratio: int, window: int) -> tuple[int, int, int]:
        logical, offset = divmod(window, self.serving.block_tokens // ratio)
        block = int(batch.block_table[row, logical])
        assert block != 0, f"window {window} (ratio {ratio}) of row {row} has no block"
        return ratio, block, offset


def alone(vocabulary: Vocabulary, tokens: list[int], params: SamplingParams) -> list[int]:
    """What one rank with no other request answers."""
    engine = Engine(FakeExecutor(FakeServing()), vocabulary=vocabulary)
    engine.add_request(tokens, params)
    found: list[int] = []
    while engine.has_work:
        found += [token for output in engine.step() for token in output.token_ids]
    return found
