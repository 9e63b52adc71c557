"""The sampler: right distributions, the right support, and tokens that depend on nothing else in the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atomc.runtime.request import Request, SamplingParams
from atomc.runtime.sampler import sample, uniform


def request(generated: int = 0, **params: Any) -> Request:
    """A request that has generated so many tokens already."""
    return Request("r", [0] * (1 + generated), 1, SamplingParams(**params), 100, frozenset(), 0.0)


def tokens_of(logits: torch.Tensor, requests: list[Request]) -> list[int]:
    return [choice.token for choice in sample(logits, requests)]


def draws(logits: list[float], count: int, **params: Any) -> torch.Tensor:
    """Relative frequencies [V] of `count` tokens of many seeds, computed in one batch."""
    rows = torch.tensor([logits]).expand(count, -1)
    tokens = tokens_of(rows, [request(index % 8, seed=index // 8, **params) for index in range(count)])
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


def test_temperature_zero_is_the_maximum() -> None:
    logits = torch.randn(5, 100)
    assert tokens_of(logits, [request(temperature=0) for _ in range(5)]) == logits.argmax(-1).tolist()


def test_frequencies_are_the_softmax() -> None:
    logits = [0.0, 1.0, 2.0, -1.0, 0.5]
    for temperature in (0.7, 1.0, 2.0):
        expected = (torch.tensor(logits) / temperature).softmax(-1)
        assert torch.allclose(draws(logits, 40_000, temperature=temperature), expected, atol=0.01)


def test_top_k_keeps_k_and_renormalises() -> None:
    logits = [0.0, 1.0, 2.0, -1.0, 0.5]
    kept = torch.tensor([-math.inf, 1.0, 2.0, -math.inf, -math.inf]).softmax(-1)
    assert torch.allclose(draws(logits, 20_000, top_k=2), kept, atol=0.015)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    probabilities = [0.5, 0.05, 0.3, 0.15]
    logits = [math.log(p) for p in probabilities]
    assert draws(logits, 2000, top_p=0.5).nonzero().flatten().tolist() == [0]
    assert draws(logits, 2000, top_p=0.51).nonzero().flatten().tolist() == [0, 2]
    assert draws(logits, 2000, top_p=0.9).nonzero().flatten().tolist() == [0, 2, 3]
    assert torch.allclose(draws(logits, 20_000, top_p=0.75), torch.tensor([0.625, 0, 0.375, 0]), atol=0.015)


def test_top_p_applies_after_top_k() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    # Of the two that top_k leaves, the first has 4/7 = 0.571.
    assert draws(logits, 2000, top_k=2, top_p=0.57).nonzero().flatten().tolist() == [0]
    assert draws(logits, 2000, top_k=2, top_p=0.58).nonzero().flatten().tolist() == [0, 1]


def test_a_wide_nucleus_is_drawn_from_as_a_narrow_one() -> None:
    """500 tokens whose nucleus is no narrow one: the support is exact, and the frequencies are the softmax of it."""
    logits = torch.linspace(3, 0, 500)
    probabilities = logits.softmax(-1)
    size = int((probabilities.cumsum(-1) < 0.7).sum()) + 1
    assert size > 100
    tokens = torch.tensor(tokens_of(logits.expand(20_000, -1), [request(seed=i, top_p=0.7) for i in range(20_000)]))
    assert int(tokens.max()) == size - 1
    tenths = torch.histc(tokens.float(), 10, 0, size) / len(tokens)
    kept = probabilities[:size] / probabilities[:size].sum()
    expected = torch.zeros(10).index_add_(0, (torch.arange(size) * 10 / size).long(), kept)
    assert torch.allclose(tenths, expected, atol=0.012)


def test_a_nucleus_of_nearly_everything() -> None:
    tokens = tokens_of(torch.zeros(500, 300), [request(seed=i, top_p=1 - 1e-12) for i in range(500)])
    assert len(set(tokens)) > 200


@pytest.mark.parametrize("temperature", [1e-20, 1e-6])
def test_a_tiny_temperature_is_greedy_not_nan(temperature: float) -> None:
    logits = torch.randn(4, 50) * 1e4
    assert tokens_of(logits, [request(temperature=temperature) for _ in range(4)]) == logits.argmax(-1).tolist()


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((500, 8), -math.inf)
    logits[:, 5] = 0
    assert set(tokens_of(logits, [request(i, seed=2) for i in range(500)])) == {5}


def test_rows_without_a_finite_maximum_are_broken() -> None:
    logits = torch.zeros(4, 8)
    logits[0, 3], logits[1, 3] = math.nan, math.inf
    logits[2] = -math.inf
    for params in ({"temperature": 0}, {"temperature": 1.0}, {"top_k": 2}, {"top_p": 0.5}):
        choices = sample(logits, [request(**params) for _ in range(4)])
        assert [choice.broken for choice in choices] == [True, True, True, False]
        assert all(0 <= choice.token < 8 for choice in choices)


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 70, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    seed=st.integers(-(2**63), 2**63 - 1),
    logprobs=st.none() | st.integers(0, 3),
)


@given(
    st.lists(st.tuples(params_strategy, st.integers(0, 50)), min_size=1, max_size=8), st.integers(0, 2**31), st.data()
)
def test_a_token_depends_on_its_own_request_only(
    each: list[tuple[SamplingParams, int]], noise: int, data: st.DataObject
) -> None:
    logits = torch.randn(len(each), 600, generator=torch.Generator().manual_seed(noise % 2**31)) * 3
    requests = [Request("r", [0] * (1 + n), 1, params, 100, frozenset(), 0.0) for params, n in each]
    together = sample(logits, requests)
    order = data.draw(st.permutations(range(len(each))))
    shuffled = sample(logits[order], [requests[row] for row in order])
    for row, choice in enumerate(together):
        assert choice == sample(logits[row : row + 1], [requests[row]])[0]
        assert choice == shuffled[order.index(row)]


def test_logits_are_left_alone() -> None:
    logits = torch.randn(3, 50)
    before = logits.clone()
    sample(logits, [request(top_k=3), request(top_p=0.3, logprobs=2), request(temperature=0)])
    assert torch.equal(logits, before)


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(2, 50)
    choice, other = sample(logits, [request(temperature=0.5, top_k=3, logprobs=4), request()])
    expected = logits[0].log_softmax(-1)
    assert choice.logprob is not None
    assert choice.logprob.token == choice.token
    assert choice.logprob.logprob == pytest.approx(expected[choice.token].item())
    assert [token for token, _ in choice.logprob.top] == expected.topk(4).indices.tolist()
    assert other.logprob is None


def test_uniform_numbers_are_uniform_and_differ() -> None:
    values = torch.tensor([uniform(seed, counter) for seed in range(100) for counter in range(100)])
    assert 0 <= values.min() < values.max() < 1
    assert len(values.unique()) > 9990
    assert torch.allclose(torch.histc(values, 10, 0, 1) / 10_000, torch.full((10,), 0.1), atol=0.01)
    # Neighbouring seeds and neighbouring counters must not look alike.
    grid = values.reshape(100, 100)
    assert abs(torch.corrcoef(torch.stack([grid[:-1].flatten(), grid[1:].flatten()]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack([grid[:, :-1].flatten(), grid[:, 1:].flatten()]))[0, 1]) < 0.05
