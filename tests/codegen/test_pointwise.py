"""The generator: the text of a kernel, what it refuses, and that a kernel made of a text can be made again."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")

from atomc.codegen.aot import _portable, _worker, build, key
from atomc.codegen.device import Recorder, Variant
from atomc.codegen.pointwise import pointwise
from atomc.codegen.source import kernel_of, source_of
from atomc.ops.pointwise import ProgramError
from atomc.targets import get_target
from tests.support.toy_kernels import add

ADD = "v0 = aten.to.dtype(a1, float32)\nv1 = aten.add.Tensor(a0, v0)\nv2 = aten.to.dtype(v1, bfloat16)\nreturn v2,"
KERNEL = '''"""pointwise to add, generated from:

    v0 = aten.to.dtype(a1, float32)
    v1 = aten.add.Tensor(a0, v0)
    v2 = aten.to.dtype(v1, bfloat16)
    return v2,
"""

import triton
import triton.language as tl


@triton.jit
def pointwise_to_add(a0, a1, out0, M, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """v2 of shape [M, 100]: ROWS rows, BLOCK columns of each."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    live, inside = row < M, (row < M) & (column < 100)
    i0 = row
    a0_0 = tl.load(a0 + i0 * 100 + column, mask=inside, other=0)
    a1_1 = tl.load(a1 + i0 * 300 + column, mask=inside, other=0)
    v0_2 = a1_1.to(tl.float32)
    v1_3 = (a0_0 + v0_2).to(tl.float32)
    v2_4 = v1_3.to(tl.bfloat16)
    tl.store(out0 + row * 100 + column, v2_4, mask=inside)
'''


def launched(program: str, *inputs: torch.Tensor, tokens: int = 16, sizes: tuple[int, ...] = ()) -> Variant:
    recorder = Recorder(get_target("h100"), tokens)
    pointwise(recorder, inputs, sizes, program)
    (variant,) = recorder.variants
    return variant


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def adding() -> Variant:
    return launched(ADD, meta(7, 100), meta(7, 300, dtype=torch.bfloat16)[:, :100])


def test_the_text_of_a_kernel() -> None:
    assert source_of(adding().kernel) == KERNEL
    assert source_of(add) == ""


def test_a_generated_kernel_compiles_and_is_made_again_elsewhere() -> None:
    variant, h100 = adding(), get_target("h100")
    found = build(variant, h100)
    assert found.facts.name == "pointwise_to_add" and found.facts.spills == 0
    again: Any = pickle.loads(pickle.dumps(_portable(variant)))
    assert _worker(again, "h100").data == found.data
    assert kernel_of(KERNEL, "pointwise_to_add") is variant.kernel
    assert key(adding(), h100) == key(variant, h100)


@pytest.mark.parametrize(
    ("program", "shapes", "words"),
    [
        (("v0 = aten.amax.default(a0, [-1], True)\nv1 = aten.amax.default(a1, [-1], True)\n"
         "v2 = aten.add.Tensor(v0, v1)\nreturn v2,"), [(5, 7), (5, 9)], "rows of one length"),
    ],
)  # fmt: skip
def test_what_is_refused(program: str, shapes: list[tuple[int, ...]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        launched(program, *(meta(*shape) for shape in shapes))
    with pytest.raises(ProgramError):
        launched("v0 = aten.tan.default(a0)\nreturn v0,", meta(3, 4))


def test_a_row_that_is_reduced_is_whole() -> None:
    norm = "v0 = aten.mean.dim(a0, [-1], True)\nv1 = aten.mul.Tensor(a0, v0)\nreturn v1,"
    assert dict(launched(norm, meta(5, 3000)).constants) == {"ROWS": 1, "BLOCK": 4096, "LANES": 4096}
    text = source_of(launched(norm, meta(5, 3000)).kernel)
    assert text.count("tl.load") == 1 and "tl.where(column < 3000" in text
