"""What torch takes for the operation of a case: eager, by inductor, and the library's FP8 products."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from kernel_cases import Case, size_of
from kernel_inputs import INDEX, MAIN, Inputs
from stack_timing import why
from timing import Call, called, copies, replayed, still_works, trim
from torch import Tensor

import atomc.ops.attention
from atomc.formats import Layout, RowLayout

# References bound what they hold by a core's cache; a GPU's memory bounds it here.
atomc.ops.attention.GATHER_ELEMENTS = 1 << 28
CALLED = 8  # sets of inputs at most where launches bound the time
Result = dict[str, Any]  # seconds, or the reason why there are none


def measured(name: str, make: Callable[[], float]) -> Result:
    """`seconds`, or `reason` where it does not run."""
    start = time.perf_counter()
    try:
        return {"what": name, "seconds": make()}
    except Exception as error:
        if not still_works():
            raise
        return {"what": name, "reason": why(error)}
    finally:
        trim()
        if (taken := time.perf_counter() - start) > 20:
            print(f"    {name}: {taken:.0f} s", flush=True)


def calls_of(case: Case, at: Inputs, wrap: Callable[..., Any], most: int = 24) -> list[Call]:
    """Calls of the peer's function, `wrap`ped, on as many sets of inputs as no cache holds, `most` at most."""
    _, function, make = case.peer
    need = case.plain.bytes if case.plain is not None else 0.0
    # A tenth of the memory stays free, for what is computed.
    free = torch.cuda.mem_get_info()[0]
    if need > 0.9 * free and ("bf16 w13" not in at.names):
        raise MemoryError(f"needs {need / 2**30:.0f} GiB, and {free / 2**30:.0f} are free")
    ready = wrap(function)
    first = make(at)
    count = min(case.rotate or copies(size_of(first)), most)
    sets = [first, *(make(at) for _ in range(count - 1))]
    return [lambda given=given: ready(*given) for given in sets]


def eager(case: Case, at: Inputs) -> Result:
    """torch as it is: launches count."""

    def run() -> float:
        calls = calls_of(case, at, lambda f: f, CALLED)
        return called(lambda: [call() for call in calls], most=0.5) / len(calls)

    return measured(f"torch eager, {case.peer[0]}", run)


@contextmanager
def followed() -> Iterator[None]:
    """In it, dynamo follows row layouts: it stops at a `cached_property`'s lock, and at the cache of `parse`."""
    known = {text: RowLayout.parse(text) for text in (MAIN, INDEX)}
    with ExitStack() as stack:
        for owner in (Layout, RowLayout):
            for name, value in list(vars(owner).items()):
                if isinstance(value, cached_property):
                    stack.enter_context(patch.object(owner, name, property(value.func)))
        stack.enter_context(patch.object(RowLayout, "parse", staticmethod(known.__getitem__)))
        yield


def inductor(case: Case, at: Inputs) -> Result:
    """`torch.compile`: max-autotune where it is one product; replayed as a CUDA graph where that is possible."""
    product = case.plain is not None and case.plain.call is F.linear
    mode = "max-autotune-no-cudagraphs" if product else "default"

    def run() -> float:
        torch._dynamo.reset()
        with followed():
            return timed()

    def timed() -> float:
        sets = 24 if case.graph else CALLED
        calls = calls_of(case, at, lambda f: torch.compile(f, mode=mode, dynamic=False), sets)
        return replayed(calls) if case.graph else called(lambda: [call() for call in calls], most=0.5) / len(calls)

    return measured(f"inductor {mode}, {case.peer[0]}", run)


def cublas(case: Case, at: Inputs) -> Iterator[tuple[str, Result]]:
    """The library's kernels, replayed as CUDA graphs: bf16; of an FP8 product, a scale a tensor, and block scales."""
    yield "cublas bf16", measured("cuBLASLt bf16", lambda: replayed(calls_of(case, at, lambda f: f)))
    if case.gemm is None:
        return
    m, n, k = case.gemm
    yield "cublas fp8", measured("cuBLASLt FP8, a scale a tensor", lambda: replayed(
        [_tensorwise(m, n, k) for _ in range(copies(m * k + n * k + 2 * m * n))]))  # fmt: skip
    yield "cublas fp8 blocks", measured("cuBLASLt FP8, 1x128 by 128x128", lambda: replayed(
        [_blockwise(m, n, k) for _ in range(copies(m * k + n * k + 2 * m * n))]))  # fmt: skip


def _fp8(rows: int, columns: int) -> Tensor:
    return (torch.randn(rows, columns, device="cuda") * 40).clamp(-440, 440).to(torch.float8_e4m3fn)


def _tensorwise(m: int, n: int, k: int) -> Call:
    a, b, one = _fp8(m, k), _fp8(n, k).t(), torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _blockwise(m: int, n: int, k: int) -> Call:
    """With float32 scales; in which order the library wants those of b depends on its version: the first it takes."""
    rows = -(-m // 16) * 16  # it takes no fewer rows than 16
    a, b, kind = _fp8(rows, k), _fp8(n, k).t(), F.ScalingType
    scale_a = torch.rand(k // 128, rows, device="cuda").t()  # outer dim first
    by_k, by_n = torch.rand(k // 128, n // 128, device="cuda"), torch.rand(n // 128, k // 128, device="cuda")

    def call(scale_b: Tensor) -> Tensor:
        return F.scaled_mm(a, b, scale_a, kind.BlockWise1x128, scale_b, kind.BlockWise128x128,
                           output_dtype=torch.bfloat16)  # fmt: skip

    said = ""
    for scale_b in (by_n.t(), by_k, by_n, by_k.t()):
        try:
            call(scale_b)
        except (RuntimeError, ValueError) as error:
            said = said or str(error)
            continue
        return lambda: call(scale_b)
    raise RuntimeError(said)
