"""The matcher: what it accepts, and what it says of a near miss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atomc.passes.fuse import prove
from atomc.passes.match import Binding, Matcher
from atomc.passes.pattern import Example, Of, Spelling, general
from tests.support.graphs import TOKENS, apply, randn, traced

F32 = torch.float32
EPS = 0.00123


def search(spelling: Spelling, fn: Callable[..., object], *inputs: Tensor) -> tuple[list[Binding], Matcher]:
    """All places of the spelling in the canonical graph of fn, proven, and the matcher that looked for them."""
    gm = traced(fn, *inputs)
    apply(gm)
    (fixed,) = spelling.choices(gm.graph)
    pattern = general(spelling, fixed, F32)
    matcher = Matcher(pattern)
    found = []
    for ways in matcher.search(gm.graph):
        for way in ways:
            proof, miss = prove(spelling, fixed, pattern, way)
            matcher.miss = max(matcher.miss, miss, key=lambda m: m.depth)
            if proof is not None:
                found.append(Binding({n: proof[1].nodes[n] for n in proof[0].inputs}, proof[1].numbers))
                break
    return found, matcher


def names(binding: Binding) -> list[str]:
    return [node.name for node in binding.nodes.values()]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


NORM = Spelling(norm, {"x": Of((7, 22)), "weight": Of((22,), F32), "eps": EPS})


# -- what is read off --------------------------------------------------------------------------------------------------


def test_a_number_is_read_off_the_graph() -> None:
    (found,), _ = search(NORM, lambda x, w: norm(x, w, 0.5), randn(TOKENS, 8), randn(8))
    assert found.numbers == {"eps": 0.5}
    assert names(found) == ["x_1", "w_1"]


def clamp(x: Tensor, limit: float) -> Tensor:
    return x.clamp(min=-limit, max=limit) * 2


def test_a_number_that_occurs_twice_must_be_the_same() -> None:
    spelling = Spelling(clamp, {"x": Of((7, 22)), "limit": 3.21})
    (found,), _ = search(spelling, lambda x: x.clamp(-4, 4) * 2, randn(TOKENS, 8))
    assert found.numbers == {"limit": 4.0}
    none, matcher = search(spelling, lambda x: x.clamp(-4, 5) * 2, randn(TOKENS, 8))
    assert not none
    assert matcher.miss.reason == "at clamp: limit is 4.0 and 5.0"


def test_other_numbers_must_be_the_patterns_own() -> None:
    none, matcher = search(Spelling(clamp, {"x": Of((7, 22)), "limit": 3.21}), lambda x: x.clamp(-4, 4) * 3, randn(4))
    assert not none
    assert matcher.miss.reason == "at mul: expected 2, found 3"


def test_the_nearest_miss_names_the_operation_and_the_models_line() -> None:
    def eps_outside(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * w + 0.5

    none, matcher = search(NORM, eps_outside, randn(TOKENS, 8), randn(8))
    assert not none
    assert matcher.miss.reason == "at mean: expected aten.add.Tensor, found aten.mean.dim"
    assert matcher.miss.where.startswith("passes/test_match.py:")


# -- commutativity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: w * (torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.5) * x),
        lambda x, w: torch.rsqrt(0.5 + x.square().mean(-1, keepdim=True)) * x * w,
    ],
)
def test_factors_and_terms_may_be_exchanged(fn: Callable[..., object]) -> None:
    (found,), _ = search(NORM, fn, randn(TOKENS, 8), randn(8))
    assert names(found) == ["x_1", "w_1"]


def rotation(a: Tensor, b: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return torch.stack((a * c + b * s, b - c, a / s), dim=-1)


def test_an_exchange_is_taken_back_if_what_follows_contradicts_it() -> None:
    """`b*s + a*c` may be read in two ways; only one agrees with the other results, which have no freedom."""
    spelling = Spelling(rotation, {name: Of((7, 22)) for name in "abcs"})

    def exchanged(a: Tensor, b: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return torch.stack((s * b + c * a, b - c, a / s), dim=-1)

    (found,), _ = search(spelling, exchanged, *(randn(TOKENS, 8) for _ in range(4)))
    assert names(found) == ["a_1", "b_1", "c_1", "s_1"]


def test_differences_and_quotients_may_not_be_exchanged() -> None:
    spelling = Spelling(lambda x, y: x.relu() - y.sigmoid(), {"x": Of((7, 22)), "y": Of((7, 22))})
    none, _ = search(spelling, lambda x, y: y.sigmoid() - x.relu(), randn(TOKENS, 8), randn(TOKENS, 8))
    assert not none


# -- structure and proof -----------------------------------------------------------------------------------------------


def halves(x: Tensor) -> Tensor:
    return x[..., :11].relu() * x[..., 11:]


def test_sizes_are_ignored_by_the_search_and_checked_by_the_proof() -> None:
    spelling = Spelling(lambda x: x[..., : x.shape[-1] // 2].relu() * x[..., x.shape[-1] // 2 :], {"x": Of((7, 22))})
    found, _ = search(spelling, lambda x: x[..., :4].relu() * x[..., 4:], randn(TOKENS, 8))
    assert len(found) == 1
    crooked, _ = search(spelling, lambda x: x[..., :3].relu() * x[..., 5:], randn(TOKENS, 8))
    assert not crooked  # it looks the same, and is not


def test_a_reduction_over_another_dim_is_no_match() -> None:
    none, _ = search(NORM, lambda x, w: x * torch.rsqrt(x.square().mean(0, True) + 0.5) * w, randn(8, 8), randn(8))
    assert not none


def test_shapes_the_reference_rejects_are_no_match() -> None:
    def two(x: Tensor) -> object:
        a, b = x.unflatten(-1, (2, -1)).unbind(-2)
        return a.relu() * b

    def odd(x: Tensor) -> object:
        y = x.unflatten(-1, (3, -1))
        return y[..., 0, :].relu() * y[..., 1, :]

    assert len(search(Spelling(two, {"x": Of((7, 22))}), two, randn(TOKENS, 8))[0]) == 1
    assert not search(Spelling(two, {"x": Of((7, 22))}), odd, randn(TOKENS, 9))[0]


def test_the_number_of_dims_is_free() -> None:
    (found,), _ = search(NORM, lambda x, w: norm(x, w, 0.5), randn(2, TOKENS, 3, 8), randn(8))
    assert names(found) == ["x_1", "w_1"]


# -- several results ---------------------------------------------------------------------------------------------------


def pair(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :11].relu() * a, x[..., 11:].relu() * b


PAIR_EXAMPLES: Mapping[str, Example] = {"x": Of((7, 22)), "a": Of((11,), F32), "b": Of((11,), F32)}


def test_siblings_that_look_alike_are_told_apart() -> None:
    """Both results fit both halves of the pattern; the proof accepts only the assignment with the right bounds."""
    spelling = Spelling(
        lambda x, a, b: (x[..., : x.shape[-1] // 2].relu() * a, x[..., x.shape[-1] // 2 :].relu() * b), PAIR_EXAMPLES
    )

    def decoys(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        other = x[..., 2:6].relu() * a
        second = x[..., 4:].relu() * b
        first = x[..., :4].relu() * a
        return first, second, other

    (found,), _ = search(spelling, decoys, randn(TOKENS, 8), randn(4), randn(4))
    assert names(found) == ["x_1", "a_1", "b_1"]


def test_the_same_tensor_may_serve_two_parameters() -> None:
    spelling = Spelling(lambda gate, up: F.silu(gate) * up.sigmoid(), {"gate": Of((7, 22)), "up": Of((7, 22))})
    both, _ = search(spelling, lambda x: F.silu(x) * x.sigmoid(), randn(TOKENS, 8))
    two, _ = search(spelling, lambda x, y: F.silu(x) * y.sigmoid(), randn(TOKENS, 8), randn(TOKENS, 8))
    assert [names(b) for b in both] == [["x_1", "x_1"]]
    assert [names(b) for b in two] == [["x_1", "y_1"]]
