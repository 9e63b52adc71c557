"""What surrounds a collective: messages come apart as they were put together, rows sorted by rank miss no choice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atomc.ops.exchange import (
    combine_rows,
    dispatch_rows,
    drop_padding,
    host_sizes,
    join_columns,
    local_experts,
    pack_message,
    sort_by_rank,
    unpack_message,
    vocabulary_embedding,
)
from atomc.ops.experts import moe_experts

DTYPES = (torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16, torch.float32, torch.int32, torch.int8)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from(DTYPES)), min_size=1, max_size=5),
    st.integers(0, 6),
    st.integers(0, 3),
)
def test_messages_come_apart_as_they_were_put_together(
    parts: list[tuple[int, torch.dtype]], rows: int, padding: int
) -> None:
    sent = [(torch.randn(rows, w).abs() * 9).to(t) for w, t in parts]
    message = pack_message(sent, rows + padding)
    assert message.shape == (rows + padding, sum(w * t.itemsize for w, t in parts))
    assert not message[rows:].any()
    got = unpack_message(message, [w for w, _ in parts], [t for _, t in parts])
    for a, b in zip(sent, got, strict=True):
        assert b.dtype == a.dtype
        assert torch.equal(b[:rows].flatten().view(torch.uint8), a.flatten().view(torch.uint8))
    assert torch.equal(pack_message(sent), message[:rows])
    assert torch.equal(drop_padding(message, sent[0]), message[:rows])


def test_parts_of_more_dims_are_flattened() -> None:
    x = torch.randn(3, 2, 4)
    (got,) = unpack_message(pack_message([x]), [8], [torch.float32])
    assert torch.equal(got.view(3, 2, 4), x)


def test_a_message_has_room_for_all_rows() -> None:
    two = torch.randn(2, 4)
    for rows in (0, 1):
        with pytest.raises(ValueError, match="do not fit into a message"):
            pack_message([two], rows)
    with pytest.raises(ValueError, match=r"parts of \[2, 1\] rows"):
        pack_message([two, two[:1]])
    with pytest.raises(ValueError, match="1 rows came back for 2 tokens"):
        drop_padding(two[:1], two)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_columns_of_ranks_lie_side_by_side(rows: int) -> None:
    whole = torch.randn(rows, 8)
    assert torch.equal(join_columns(torch.cat(whole.split(2, dim=1)), 4), whole)


def test_local_experts() -> None:
    indices = torch.tensor([[0, 5, 3], [4, 2, 7]])
    found = local_experts(indices, 2, 3)
    assert found.tolist() == [[-1, -1, 1], [2, 0, -1]]
    assert found.dtype == torch.int64
    assert local_experts(torch.tensor([[-1, 2]]), 2, 3).tolist() == [[-1, 0]]  # padding of a message has no choice


@given(st.integers(0, 7), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.data())
def test_every_choice_is_sent_to_its_rank_once(
    tokens: int, k: int, ranks: int, columns: int, experts: int, data: st.DataObject
) -> None:
    span, total = columns * experts, ranks * columns * experts
    k = min(k, total)
    chosen = [data.draw(st.permutations(range(total)))[:k] for _ in range(tokens)]
    indices = torch.tensor(chosen, dtype=torch.int64).view(tokens, k)
    sent: set[tuple[int, int, int]] = set()
    for column in range(columns):
        counts, order = sort_by_rank(indices, column * experts, ranks, experts, span)
        assert order.shape == (tokens * min(ranks, k),)
        assert (order[int(counts.sum()) :] == -1).all()
        for rank, part in enumerate(order[: int(counts.sum())].split(host_sizes(counts))):
            assert part.tolist() == sorted(set(part.tolist()))  # each token once, in order
            sent |= {(token, rank, column) for token in part.tolist()}
    assert sent == {(t, e // span, e % span // experts) for t, row in enumerate(chosen) for e in row}


def test_rows_that_come_back_are_summed_for_their_tokens() -> None:
    order, like = torch.tensor([0, 2, 0, 1, -1, -1]), torch.zeros(3, 5)
    rows = torch.arange(8.0).view(4, 2)
    assert combine_rows(rows, order, like, [2, 2]).tolist() == [[4.0, 6.0], [6.0, 7.0], [2.0, 3.0]]
    assert dispatch_rows(rows[:3], order, [2, 1, 1]).tolist() == rows[[0, 2, 0, 1]].tolist()
    assert combine_rows(rows[:0], order[4:], like[:0], [0, 0]).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_a_vocabulary_add_up_exactly(dtype: torch.dtype) -> None:
    table, ids = torch.randn(12, 5).to(dtype), torch.tensor([0, 11, 4, 4, 7])
    parts = [vocabulary_embedding(t, ids, 4 * i) for i, t in enumerate(table.split(4))]
    assert torch.equal(parts[0] + parts[1] + parts[2], table[ids])


@pytest.mark.parametrize("run", [torch.ops.atom.moe_experts, moe_experts])
def test_an_expert_of_another_rank_adds_nothing(run: object) -> None:
    assert callable(run)
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    x, w13, w2, weights = randn(6, 8), randn(4, 10, 8), randn(4, 8, 5), randn(6, 3).abs()
    indices = torch.stack([torch.randperm(4, generator=g)[:3] for _ in range(6)])
    whole = run(x, w13, w2, indices, weights, 7.0)
    halves = [run(x, w13[at : at + 2], w2[at : at + 2], local_experts(indices, at, 2), weights, 7.0) for at in (0, 2)]
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-6, atol=1e-6)
    none = run(x, w13, w2, torch.full_like(indices, -1), weights, 7.0)
    assert not none.any()
    assert none.shape == whole.shape
