"""Cutting a step in two: the halves' metadata is that of the two steps that feed the same tokens one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atomc.ops import Batch
from atomc.ops.batch import middle, split_batch
from atomc.parallel.sizes import half_rows

RATIOS = (4, 32)


def batch_of(pieces: list[tuple[int, int, int]], logits: list[int]) -> Batch:
    """A step over (request, first position, tokens), each request with tables of its own; some logits are wanted."""
    lengths = torch.tensor([n for _, _, n in pieces])
    who = torch.tensor([r for r, _, _ in pieces])
    positions = torch.cat([torch.arange(first, first + n) for _, first, n in pieces])
    ids = torch.cat([1000 * r + torch.arange(first, first + n) for r, first, n in pieces])

    def ends(ratio: int) -> torch.Tensor:
        found = ((positions + 1) % ratio == 0).nonzero()[:, 0]
        return found if len(found) else torch.tensor([-1])

    fields = Batch(
        ids, positions, torch.repeat_interleave(lengths), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        who + 7, who[:, None] * 10 + torch.arange(3), who[:, None] * 10 + torch.arange(2), ends(4), ends(32),
        torch.tensor(logits),
    )  # fmt: skip
    return Batch(*(field.int() for field in fields))


@given(st.data())
def test_the_halves_are_two_steps(data: Any) -> None:
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    tokens = sum(lengths)
    if tokens < 2:
        return
    starts = [data.draw(st.integers(0, 100)) for _ in lengths]
    pieces = [(i, first, n) for i, (first, n) in enumerate(zip(starts, lengths, strict=True))]
    logits = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=6, unique=True))
    cut = data.draw(st.integers(1, tokens - 1))
    halves = split_batch(batch_of(pieces, logits), cut)
    left, sides, at = cut, ([], []), 0  # type: tuple[int, tuple[list[Any], list[Any]], int]
    for request, first, n in pieces:
        mine = min(n, max(0, left))
        left -= mine
        sides[0].extend([(request, first, mine)] * bool(mine))
        sides[1].extend([(request, first + mine, n - mine)] * bool(n - mine))
        at += n
    for got, side, low, high in ((halves.first, sides[0], 0, cut), (halves.second, sides[1], cut, tokens)):
        wanted = [row - low for row in logits if low <= row < high] or [high - low - 1]
        for name, a, b in zip(Batch._fields, got, batch_of(side, wanted), strict=True):
            assert torch.equal(a, b), name
            assert a.dtype is torch.int32, name
    rows = torch.cat((halves.first.logit_rows, halves.second.logit_rows + cut))
    assert rows[halves.logit_rows].tolist() == logits


def test_requests_without_tokens_are_in_no_half_they_do_not_touch() -> None:
    batch = batch_of([(0, 0, 3), (1, 5, 0), (2, 0, 3)], [5])
    halves = split_batch(batch, 3)
    assert halves.first.slots.tolist() == [7]
    assert halves.second.slots.tolist() == [9]
    assert halves.second.requests.tolist() == [0, 0, 0]


def test_the_middle() -> None:
    batch = batch_of([(0, 0, 7003), (1, 0, 6928), (2, 0, 2453)], [0])
    assert middle(batch.query_start, by_requests=False) == 8192  # of 16384, in the second request
    assert middle(batch.query_start, by_requests=True) == 7003 + 6928
    one = batch_of([(0, 4, 1)], [0])
    assert middle(one.query_start, by_requests=False) == middle(one.query_start, by_requests=True) == 1
    assert middle(batch_of([(0, 0, 9)], [0]).query_start, by_requests=True) == 9
    assert middle(torch.tensor([0]), by_requests=False) == middle(torch.tensor([0]), by_requests=True) == 0


@pytest.mark.parametrize(
    ("starts", "cut"), [([0, 0, 0, 1, 2], 1), ([0, 1, 2, 2, 2], 1), ([0, 0, 1, 1, 2, 3], 2), ([0, 0, 0], 0)]
)
def test_requests_without_tokens_do_not_move_the_middle(starts: list[int], cut: int) -> None:
    assert middle(torch.tensor(starts), by_requests=True) == cut


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_ranks_agree_on_halves_that_hold_what_each_has(loads: list[int]) -> None:
    """By the fullest rank alone: a rank of one token or none takes part, and no half is longer than its messages."""
    most = max(loads)
    for tokens in loads:
        cut = middle(torch.tensor([0, tokens]), by_requests=False)
        assert cut <= half_rows(most)[0]
        assert tokens - cut <= half_rows(most)[1] or most < 2


def test_a_half_may_be_empty() -> None:
    batch = batch_of([(0, 4, 3)], [2])
    for cut, empty in ((0, 0), (3, 1)):
        halves = split_batch(batch, cut)
        part, other = (halves.first, halves.second)[empty], (halves.first, halves.second)[1 - empty]
        assert (part.ids.shape[0], part.slots.shape[0], part.logit_rows.shape[0]) == (0, 0, 0)
        assert part.query_start.tolist() == [0]
        assert part.csa_ends.shape[0] == part.hca_ends.shape[0] == 0
        assert all(torch.equal(a, b) for a, b in zip(other, batch, strict=True))
        assert halves.logit_rows.tolist() == [0]


@pytest.mark.parametrize("cut", [7, -1])
def test_a_cut_outside_of_the_step_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match=f"cannot be cut at token {cut}"):
        split_batch(batch_of([(0, 0, 3), (1, 0, 3)], [5]), cut)
