"""WideLinears: products in fp32 read bf16 operands as they are; others stay."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from atomc.passes.canonicalize import DeadCode
from atomc.passes.wide_linears import WideLinears
from tests.support.graphs import TOKENS, apply, assert_same, by_references, randn, text, traced

BF16 = torch.bfloat16


def test_what_was_widened_is_read_as_it_is_stored() -> None:
    def fn(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float()
        return F.linear(wide, a.float()), F.linear(wide, b)

    inputs = randn(TOKENS, 8, dtype=BF16), randn(5, 8, dtype=BF16), randn(3, 8)
    gm = traced(fn, *inputs)
    rows = apply(gm, WideLinears(), DeadCode())
    assert len(rows[1].report.matches) == 2
    assert (
        text(gm)
        == "linear_fp32_default = atom.linear_fp32(x_1, a_1)\nlinear_fp32_default_1 = atom.linear_fp32(x_1, b_1)"
    )
    assert_same(by_references(gm, *inputs), fn(*inputs))


def test_other_products_stay() -> None:
    def fn(x: Tensor, a: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, a), F.linear(x.float(), a.float(), bias)

    gm = traced(fn, randn(TOKENS, 8, dtype=BF16), randn(5, 8, dtype=BF16), randn(5))
    assert not apply(gm, WideLinears())[-1].report.matches
    assert text(gm).count("aten.linear") == 2


def test_only_bf16_is_stripped() -> None:
    """fp16 is exact in fp32 too, but no kernel takes it; where nothing is stored narrower there is nothing to do."""
    gm = traced(lambda x, a: F.linear(x.float(), a), randn(TOKENS, 8, dtype=torch.float16), randn(5, 8))
    assert not apply(gm, WideLinears(), DeadCode())[1].report.matches
    assert text(gm) == "to = aten.to.dtype(x_1, torch.float32)\nlinear = aten.linear(to, a_1)"
