"""The launcher without a GPU: letters of a signature, C values, and where a step's memory is."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from atomc.artifact.kernels import KernelFacts
from atomc.artifact.plan import SlotInfo
from atomc.runtime import launcher
from atomc.runtime.gpu import BoundBucket, Memory, Values
from atomc.runtime.launcher import LaunchError, _c_value, letters_of

FACTS = KernelFacts(
    name="k", target="h100", signature=["*fp32", "i32", "fp32"], warps=8, stages=3, wavefront=32, shared=1024,
    registers=1, spills=0, scalar_spills=0, matrix={}, loads=0, wide_loads=0, constants={}, dependent=True,
)  # fmt: skip


class Driver:
    """Takes what cuLaunchKernelEx is given, by the layout that cuda.h states."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.given: dict[str, Any] = {}

    def cuLaunchKernelEx(self, config: Any, function: ctypes.c_void_p, pointers: Any, extra: None) -> int:
        raw = ctypes.string_at(ctypes.addressof(config._obj), 56)
        stream, attributes, count = struct.unpack_from("QQI", raw, 32)
        identity, _, value = struct.unpack("iii", ctypes.string_at(attributes, 12))
        kinds = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_float, ctypes.c_uint64, ctypes.c_uint64)
        self.given |= {
            "sizes": struct.unpack_from("7I", raw), "stream": stream, "count": count, "attribute": (identity, value),
            "function": function.value, "extra": extra,
            "values": tuple(kind.from_address(at).value for kind, at in zip(kinds, pointers, strict=True)),
        }  # fmt: skip
        return self.code


def test_a_dependent_launch_is_what_the_driver_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(launcher, "driver", lambda: (driver, "cu"))
    x = torch.zeros(4)
    launcher.DependentLaunch(FACTS, 77).launch([5, 6], [x, -3, 0.5], 99)
    assert driver.given == {
        "sizes": (5, 6, 1, 256, 1, 1, 1024), "stream": 99, "count": 1, "function": 77, "extra": None,
        "attribute": (6, 1), "values": (x.data_ptr(), -3, 0.5, 0, 0),
    }  # fmt: skip
    assert ctypes.sizeof(launcher._Config) == 56 and ctypes.sizeof(launcher._Attribute) == 72
    monkeypatch.setattr(launcher, "driver", lambda: (Driver(1), "cu"))
    with pytest.raises(LaunchError, match="kernel k: cuLaunchKernelEx failed with code 1"):
        launcher.DependentLaunch(FACTS, 77).launch([1], [x, 0, 0.0], 0)


@pytest.mark.parametrize("dependent", [True, False])
def test_only_a_kernel_that_waits_is_launched_dependently(monkeypatch: pytest.MonkeyPatch, dependent: bool) -> None:
    driver, plain = Driver(), list[Any]()
    static = SimpleNamespace(_load_kernel=lambda *_: (77, 1, 0), _launch_kernel=lambda *given: plain.append(given))
    monkeypatch.setattr(torch._C, "_StaticCudaLauncher", static, raising=False)
    monkeypatch.setattr(launcher, "driver", lambda: (driver, "cu"))
    kernel = launcher.StaticKernel(Path("k.bin"), msgspec.structs.replace(FACTS, dependent=dependent), 0)
    kernel.launch([1], [None, 0, 0.0], 5)
    assert len(plain) == 1 and driver.given == {}
    kernel.launch([1], [None, 0, 0.0], 5, dependent=True)
    assert len(plain) == 2 - dependent and bool(driver.given) == dependent


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


class Runs:
    """What runs, in order."""

    def __init__(self, name: str, seen: list[str], fits: bool = True) -> None:
        self.name, self.seen, self.is_fit = name, seen, fits

    def fits(self, env: object, sizes: object) -> bool:
        return self.is_fit

    def run(self, *_: object) -> None:
        self.seen.append(self.name)


@pytest.mark.parametrize(("library", "expected"), [(None, "own"), (True, "library"), (False, "own")])
def test_a_library_runs_where_it_fits_and_the_plans_own_kernels_else(library: bool | None, expected: str) -> None:
    seen: list[str] = []
    call = None if library is None else Runs("library", seen, library)
    bucket = BoundBucket(16, [], [Runs("own", seen)], call)  # type: ignore[list-item, arg-type]
    assert bucket.run([], {}, 0) is (expected == "own") and seen == [expected]
