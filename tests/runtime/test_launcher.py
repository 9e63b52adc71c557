"""The launcher without a GPU: letters of a signature, C values, and where a step's memory is."""

from __future__ import annotations

import ctypes

import pytest
import torch

from atomc.artifact.plan import SlotInfo
from atomc.runtime.gpu import Memory, Values
from atomc.runtime.launcher import LaunchError, _c_value, letters_of


class Arena:
    """What `Memory` needs of a GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.arena = torch.zeros(4096, dtype=torch.uint8)


def test_letters_of_a_signature() -> None:
    assert letters_of(["*fp8e4nv", "*u8", "i32", "fp32", "*i8"]) == "OOifO"
    with pytest.raises(KeyError):
        letters_of(["i64"])


def test_c_values() -> None:
    x = torch.zeros(3)
    assert _c_value("O", x).value == x.data_ptr()
    assert _c_value("O", None).value is None
    assert isinstance(_c_value("i", -7), ctypes.c_int32) and _c_value("i", -7).value == -7
    assert _c_value("f", 0.5).value == 0.5


def test_temporaries_lie_in_the_arena_where_the_plan_says() -> None:
    gpu = Arena()
    info = SlotInfo("x", "temporary", ["T", 4], "bfloat16", None, 0, 1, 512)
    tensor = Memory(info, gpu).tensor({"T": 3})  # type: ignore[arg-type]
    tensor.fill_(1.0)
    assert tensor.shape == (3, 4) and tensor.is_contiguous()
    assert tensor.data_ptr() == gpu.arena.data_ptr() + 512
    assert gpu.arena.nonzero().flatten().tolist()[0] >= 512
    assert int(gpu.arena.nonzero().max()) < 512 + 3 * 4 * 2
    info = SlotInfo("y", "value", ["2*T"], "float8_e8m0fnu", None, 0, 9, None)
    buffer = torch.zeros(64, dtype=torch.uint8)
    value = Memory(info, gpu, buffer).tensor({"T": 3})  # type: ignore[arg-type]
    assert value.shape == (6,) and value.dtype == torch.float8_e8m0fnu and value.data_ptr() == buffer.data_ptr()
    with pytest.raises(LaunchError, match="y is made by a kernel, and the plan gives it no memory"):
        Memory(info, gpu)  # type: ignore[arg-type]


def test_a_value_is_never_written_where_the_call_may_read_it() -> None:
    values = Values({"T": 4}, torch.device("cpu"))
    info = SlotInfo("h", "value", ["T", 2], "float32", None, 0, 1, None)
    first, second, third = (values.take("h", info) for _ in range(3))
    assert first.numel() == second.numel() == 4 * 2 * 4
    assert first.data_ptr() == third.data_ptr() != second.data_ptr()
    assert values.take("y", info).data_ptr() not in (first.data_ptr(), second.data_ptr())
