"""Launching precompiled kernels without Triton or a compiler: torch's static launcher, else the driver itself.

Contract:
    A kernel is a code object and its facts, by key. `Kernel.launch` takes a grid and the run-time arguments in the
    order of its signature; tensors pass their address. Triton adds two scratch pointers, which are null here. Nothing
    is allocated, nothing is synchronised, and a launch may be captured into a graph. A *dependent* launch may begin
    before the launch before it on its stream has ended, and its kernel waits for that itself; of a kernel that does not
    (`KernelFacts.dependent`) it is a launch like any other.

Terms:
    letters   one of each argument: O a tensor or null, i a 32-bit integer, f a 32-bit float.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomc.artifact.kernels import KernelFacts
from atomc.errors import AtomcError

LETTERS = {"i32": "i", "fp32": "f"}
C_TYPES = {"i": ctypes.c_int32, "f": ctypes.c_float}


class LaunchError(AtomcError):
    """A kernel that the device refuses to load or to run; the message names kernel and device."""


def letters_of(signature: Sequence[str]) -> str:
    """Of Triton's types: `*bf16` -> O, `i32` -> i, `fp32` -> f."""
    return "".join("O" if kind.startswith("*") else LETTERS[kind] for kind in signature)


class StaticKernel:
    """A kernel of torch's static launcher (CUDA and HIP builds of torch have it)."""

    def __init__(self, path: Path, facts: KernelFacts, device: int) -> None:
        launcher = getattr(torch._C, "_StaticCudaLauncher", None)
        if launcher is None:
            raise LaunchError("this build of torch has no static launcher")
        loaded = launcher._load_kernel(str(path), facts.name, facts.shared, device)
        # torch 2.11 gives (function, registers, spills), 2.13 the module before them.
        self._function, self._launch = loaded[-3], launcher._launch_kernel
        self._letters = letters_of(facts.signature) + "OO"
        self._warps, self._shared = facts.warps, facts.shared
        self._dependent = DependentLaunch(facts, self._function) if facts.dependent else None

    def launch(self, grid: Sequence[int], arguments: Sequence[Any], stream: int, dependent: bool = False) -> None:
        """Launch on a stream (its handle)."""
        if dependent and self._dependent is not None:
            self._dependent.launch(grid, arguments, stream)
            return
        x, y, z = (*grid, 1, 1)[:3]
        given = (*arguments, None, None)
        self._launch(self._function, x, y, z, self._warps, self._shared, self._letters, given, stream)


class DriverKernel:
    """A kernel through the driver's own interface, by ctypes: needs no part of torch that may change."""

    def __init__(self, path: Path, facts: KernelFacts, device: int) -> None:
        self._driver, self._prefix = driver()
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._name, self._shared = facts.name, facts.shared
        self._lanes = facts.warps * facts.wavefront
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # the context exists from here on
            self._call("ModuleLoadData", ctypes.byref(self._module), path.read_bytes())
            self._call("ModuleGetFunction", ctypes.byref(self._function), self._module, facts.name.encode())
            if facts.shared > 48 * 1024 and self._prefix == "cu":
                dynamic_shared = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._call("FuncSetAttribute", self._function, dynamic_shared, facts.shared)
        self._letters = letters_of(facts.signature)
        self._dependent = DependentLaunch(facts, self._function.value or 0) if facts.dependent else None

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, self._prefix + name)(*arguments)
        if code != 0:
            raise LaunchError(f"kernel {self._name}: {self._prefix}{name} failed with code {code}.")

    def launch(self, grid: Sequence[int], arguments: Sequence[Any], stream: int, dependent: bool = False) -> None:
        """Launch on a stream (its handle)."""
        if dependent and self._dependent is not None:
            self._dependent.launch(grid, arguments, stream)
            return
        values = _c_values(self._letters, arguments)
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        x, y, z = (*grid, 1, 1)[:3]
        name = "LaunchKernel" if self._prefix == "cu" else "ModuleLaunchKernel"
        self._call(
            name, self._function, x, y, z, self._lanes, 1, 1, self._shared, ctypes.c_void_p(stream), pointers, None
        )


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of the kinds whose value is an int."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class DependentLaunch:
    """Dependent launches of a loaded kernel, by CUDA's driver: torch's launcher passes no attributes."""

    def __init__(self, facts: KernelFacts, function: int) -> None:
        self._launch = driver()[0].cuLaunchKernelEx
        self._name, self._function = facts.name, ctypes.c_void_p(function)
        self._letters = letters_of(facts.signature)
        self._block, self._shared = (ctypes.c_uint * 3)(facts.warps * facts.wavefront, 1, 1), facts.shared
        self._attribute = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)

    def launch(self, grid: Sequence[int], arguments: Sequence[Any], stream: int) -> None:
        """Launch on a stream (its handle)."""
        values = _c_values(self._letters, arguments)
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        sizes = (ctypes.c_uint * 3)(*(*grid, 1, 1)[:3])
        config = _Config(sizes, self._block, self._shared, stream, ctypes.pointer(self._attribute), 1)
        if code := self._launch(ctypes.byref(config), self._function, pointers, None):
            raise LaunchError(f"kernel {self._name}: cuLaunchKernelEx failed with code {code}.")


def _c_values(letters: str, arguments: Sequence[Any]) -> list[Any]:
    """Arguments as C values, and the two scratch pointers."""
    values = [_c_value(letter, value) for letter, value in zip(letters, arguments, strict=True)]
    return [*values, ctypes.c_void_p(0), ctypes.c_void_p(0)]


def _c_value(letter: str, value: Any) -> Any:
    if letter == "O":
        return ctypes.c_void_p(0 if value is None else value.data_ptr() if isinstance(value, Tensor) else int(value))
    return C_TYPES[letter](value)


def driver() -> tuple[Any, str]:
    """The driver's library and the prefix of its functions: CUDA's, or HIP's where torch is built for ROCm."""
    library, prefix = ("libamdhip64.so", "hip") if torch.version.hip else ("libcuda.so.1", "cu")
    try:
        return ctypes.CDLL(library), prefix
    except OSError as error:
        raise LaunchError(f"the driver's library {library} cannot be loaded: {error}.") from error


Kernel = StaticKernel | DriverKernel


def load_kernel(path: Path, facts: KernelFacts, device: int) -> Kernel:
    """A kernel on a device: by torch's static launcher, else by the driver.

    Raises:
        LaunchError: neither loads it.
    """
    try:
        return StaticKernel(path, facts, device)
    except (LaunchError, RuntimeError, AttributeError, TypeError) as first:
        try:
            return DriverKernel(path, facts, device)
        except (LaunchError, RuntimeError, AttributeError) as second:
            why = f"{first}; {second}"
            raise LaunchError(f"kernel {facts.name} ({facts.target}) cannot be loaded: {why}.") from second
