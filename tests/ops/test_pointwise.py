"""Programs of pointwise operations: what they mean, and texts that are none."""

from __future__ import annotations

import pytest
import torch

import atomc.ops  # noqa: F401  defines the operator
from atomc.ops.pointwise import OPERATORS, ProgramError, parse


def test_it_means_what_torch_means() -> None:
    x, y = torch.randn(5, 3), torch.randn(3).bfloat16()
    text = (
        "v0 = aten.to.dtype(a1, float32)\nv1 = aten.clamp.default(a0, None, 0.5)\nv2 = aten.mul.Tensor(v1, v0)\n"
        "v3 = aten.sum.dim_IntList(v2, [-1], True, dtype=float32)\nv4 = aten.full.default([s0, 3], -1.5)\n"
        "return v3, v4,"
    )
    total, full = torch.ops.atom.pointwise([x, y], [7], text)
    assert torch.equal(total, (x.clamp(max=0.5) * y.float()).sum(-1, keepdim=True))
    assert torch.equal(full, torch.full((7, 3), -1.5))


def test_results_are_contiguous_and_have_memory_of_their_own() -> None:
    x = torch.randn(5, 1)
    (out,) = torch.ops.atom.pointwise([x], [], "v0 = aten.expand.default(a0, [-1, 4])\nreturn v0,")
    assert out.is_contiguous() and out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_every_operator_is_one_of_torch() -> None:
    for op in OPERATORS:
        namespace, name, overload = op.split(".")
        assert isinstance(getattr(getattr(getattr(torch.ops, namespace), name), overload), torch._ops.OpOverload)


@pytest.mark.parametrize(
    "text",
    [
        "", "v0 = aten.mul.Tensor(a0, 2)", "return v0", "v0 = aten.mm.default(a0, a1)\nreturn v0,",
        "v0 = __import__('os')\nreturn v0,", "v0 = aten.mul.Tensor(a0, (1, 2))\nreturn v0,", "return v0.x,",
        "v0 = aten.mul.Tensor(a0, 'x')\nreturn v0,", "import os\nreturn v0,", "v0 = (((\nreturn v0,",
        "v0 = a0\nreturn v0,", "v0 = aten.mul.Tensor(a0, 1 + 1)\nreturn v0,",
    ],
)  # fmt: skip
def test_nothing_else_is_a_program(text: str) -> None:
    with pytest.raises(ProgramError):
        parse(text)
