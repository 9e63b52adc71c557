"""Canonicalize: each rule, values unchanged bit for bit, and what aliases what kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atomc.passes.canonicalize import DeadCode
from atomc.passes.runner import INVARIANTS, Context
from tests.support.graphs import TOKENS, apply, assert_same, operators, randn, text, traced

Fn = Callable[..., object]

# (what is written, the operators that remain); x is [T, 8] in float32 with a symbolic T, w [4, 8], b [8] in bfloat16
RULES: list[tuple[Fn, str]] = [
    # no-ops
    (lambda x, w, b: x.float() * 2, "aten.mul.Tensor(x_1, 2)"),
    (lambda x, w, b: x.to(torch.float32).contiguous().detach() * 2, "aten.mul.Tensor(x_1, 2)"),
    (lambda x, w, b: x.clone() * 2, "aten.mul.Tensor(x_1, 2)"),
    (lambda x, w, b: x[:, :].expand(-1, 8) * 2, "aten.mul.Tensor(x_1, 2)"),
    (lambda x, w, b: F.dropout(x, 0.5, training=False) * 2, "aten.mul.Tensor(x_1, 2)"),
    # one name for each meaning
    (lambda x, w, b: w.view(2, 16) * 2, "aten.reshape(w_1, [2, 16]) | aten.mul.Tensor(reshape_default, 2)"),
    (lambda x, w, b: w.flatten(), "aten.reshape(w_1, [32])"),
    (lambda x, w, b: x.unflatten(-1, (2, 4)), "aten.reshape(x_1, [-1, 2, 4])"),
    (lambda x, w, b: x.flatten(), "aten.reshape(x_1, [-1])"),
    (lambda x, w, b: b.float(), "aten.to.dtype(b_1, torch.float32)"),
    (lambda x, w, b: b.type_as(w), "aten.to.dtype(b_1, torch.float32)"),
    (lambda x, w, b: x.pow(2), "aten.square(x_1)"),
    (lambda x, w, b: x**3, "aten.pow.Tensor_Scalar(x_1, 3)"),
    (lambda x, w, b: torch.clamp_max(x, 1.5), "aten.clamp(x_1, None, 1.5)"),
    (lambda x, w, b: torch.clamp_min(x, 1.5), "aten.clamp(x_1, 1.5)"),
    (lambda x, w, b: torch.ops.aten.mul.Scalar(x, 3), "aten.mul.Tensor(x_1, 3)"),
    (lambda x, w, b: torch.ops.aten.add.Scalar(x, 3, 2), "aten.add.Tensor(x_1, 3, alpha=2)"),
    # arguments
    (lambda x, w, b: x.sum(dim=1, keepdim=True), "aten.sum.dim_IntList(x_1, [-1], True)"),
    (lambda x, w, b: x.unsqueeze(2), "aten.unsqueeze(x_1, -1)"),
    (lambda x, w, b: torch.stack((w, w), dim=-3), "aten.stack([w_1, w_1])"),
    (lambda x, w, b: w[-3:, :-2], "aten.slice.Tensor(w_1, -2, 1, END) | aten.slice.Tensor(slice_tensor, -1, 0, 6)"),
    (lambda x, w, b: x.chunk(2, dim=-1)[1], "aten.slice.Tensor(x_1, -1, 4, END)"),
    (lambda x, w, b: x.split([3, 5], dim=1)[0], "aten.slice.Tensor(x_1, -1, 0, 3)"),
    (lambda x, w, b: w.unbind(0)[2], "aten.select.int(w_1, -2, 2)"),
    # equal calls
    (lambda x, w, b: x.relu() * x.relu(), "aten.relu(x_1) | aten.mul.Tensor(relu, relu)"),
]  # fmt: skip


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    return randn(TOKENS, 8), randn(4, 8), randn(8, dtype=torch.bfloat16)


@pytest.mark.parametrize(("fn", "want"), RULES, ids=[want for _, want in RULES])
def test_rule(fn: Fn, want: str) -> None:
    inputs = tensors()
    gm = traced(fn, *inputs)
    apply(gm)
    assert " | ".join(line.split(" = ", 1)[1] for line in text(gm).splitlines()) == want
    for n in (TOKENS, 1, 5):
        x = randn(n, 8)
        assert_same(gm(x, *inputs[1:]), fn(x, *inputs[1:]))


# -- what must stay ----------------------------------------------------------------------------------------------------


def test_an_int_to_the_power_of_a_float_stays_a_float() -> None:
    def fn(x: Tensor) -> Tensor:
        return x.pow(2.0)

    gm = traced(fn, torch.arange(4))
    apply(gm)
    assert operators(gm) == ["aten.pow.Tensor_Scalar"]
    assert_same(gm(torch.arange(4)), fn(torch.arange(4)))


def test_a_copy_that_changes_the_layout_stays() -> None:
    gm = traced(lambda x: x.T.contiguous().view(-1, 2), randn(4, 6))
    apply(gm)
    assert "aten.contiguous" in operators(gm)


def written_copy(x: Tensor) -> Tensor:
    y = x.clone()
    y.add_(1)
    return x * y


def written_source(x: Tensor) -> Tensor:
    y = x.clone()
    x.add_(1)
    return x * y


@pytest.mark.parametrize("fn", [written_copy, written_source, lambda x: x.clone(), lambda x: x.clone()[1:]])
def test_a_copy_that_can_be_told_from_its_source_stays(fn: Fn) -> None:
    x, y = randn(4), None
    gm = traced(fn, x.clone())
    apply(gm)
    assert "aten.clone" in operators(gm)
    y = x.clone()
    assert_same(gm(x), fn(y))
    assert_same(x, y)  # and the input was written alike


def test_a_result_does_not_become_an_input() -> None:
    gm = traced(lambda x: (x.detach(), x[:]), randn(4))
    apply(gm)
    assert operators(gm) == ["aten.detach", "aten.slice.Tensor"]


def zeros_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = torch.zeros_like(x), torch.zeros_like(x)
    a.add_(x)
    return a * 1, b * 1


def read_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    before = x.relu()
    x.mul_(-1)
    return before * 1, x.relu() * 1


def returned_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.relu(), x.relu()


def random_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.rand_like(x) * 1, torch.rand_like(x) * 1


def signed_zeros(x: Tensor) -> tuple[Tensor, Tensor]:
    return 1 / (x * 0.0), 1 / (x * -0.0)


@pytest.mark.parametrize("fn", [zeros_twice, read_twice, returned_twice, random_twice, signed_zeros])
def test_equal_calls_with_unequal_fates_are_not_merged(fn: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    x = randn(4)
    gm = traced(fn, x.clone())
    count = len(operators(gm))
    apply(gm)
    assert len(operators(gm)) == count
    torch.manual_seed(1)
    want = fn(x.clone())
    torch.manual_seed(1)
    got = gm(x.clone())
    assert_same(got, want)
    assert got[0].data_ptr() != got[1].data_ptr()


def test_a_dead_random_call_stays() -> None:
    def fn(x: Tensor) -> Tensor:
        torch.rand_like(x)
        x.relu()
        return torch.rand_like(x)

    gm = traced(fn, randn(4))
    apply(gm)
    assert operators(gm) == ["aten.rand_like", "aten.rand_like"]


# -- symbolic sizes ----------------------------------------------------------------------------------------------------


def test_sizes_are_read_off_the_inputs() -> None:
    """A reshape of something computed asks an input for T, so that the something may be fused away."""

    def fn(x: Tensor) -> object:
        y = torch.stack((-x, x), dim=-1)
        return y.unflatten(1, (4, 2)).flatten(2)

    def two_symbols(x: Tensor, y: Tensor) -> Tensor:
        both = x.unsqueeze(1) * y.unsqueeze(0)
        return both.flatten(-2)

    gm = traced(fn, randn(TOKENS, 8))
    apply(gm)
    assert_same(gm(randn(0, 8)), torch.empty(0, 4, 4))
    gm = traced(two_symbols, randn(TOKENS, 4, 2), randn(TOKENS, 4, 2))
    apply(gm)
    (size,) = [n for n in gm.graph.nodes if n.op == "call_function" and "sym_size" in str(n.target)]
    assert size.args[0].op == "placeholder"
    inputs = randn(5, 4, 2), randn(5, 4, 2)
    assert_same(gm(*inputs), two_symbols(*inputs))


# -- the pass ----------------------------------------------------------------------------------------------------------


def test_exports_assertions_are_dropped_and_the_invariant_holds() -> None:
    program = torch.export.export(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Flatten(0)), (randn(3, 4).bfloat16().float(),), strict=False
    )
    gm = program.graph_module
    with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op == "call_function")):
        x = next(n for n in gm.graph.nodes if n.name == "input")
        gm.graph.call_function(torch.ops.aten._assert_tensor_metadata.default, (x, None, None, torch.float32))
    apply(gm)
    assert operators(gm) == ["aten.linear", "aten.reshape"]


def test_the_invariant_names_what_is_not_canonical() -> None:
    gm = traced(lambda x: x.detach() * 2, randn(4))
    assert "detach" in str(INVARIANTS["canonical"](gm))
    apply(gm)
    assert INVARIANTS["canonical"](gm) is None


def test_dead_code_reports_what_it_erased() -> None:
    gm = traced(lambda x: (x.relu(), x * 2)[1], randn(4))
    (match,) = DeadCode().run(gm, Context("test")).matches
    assert match.module == "aten.relu relu"
    assert operators(gm) == ["aten.mul.Tensor"]
