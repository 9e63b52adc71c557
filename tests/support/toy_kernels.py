"""Small kernels for the tests of compiling and launching."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """out = x + y over n elements."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(x + at, inside) + tl.load(y + at, inside), inside)


@triton.jit
def rowwise_dot(a, b, out, N: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """out = a bᵀ of [N, N] matrices."""
    i = tl.arange(0, N)
    where = i[:, None] * N + i[None, :]
    tl.store(out + where, tl.dot(tl.load(a + where), tl.trans(tl.load(b + where))))


@triton.jit
def broken(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """A block that is no power of two."""
    tl.store(x + tl.arange(0, BLOCK), 0.0)


@triton.jit
def empty(x, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Loads and adds, and stores nothing."""
    at = tl.arange(0, BLOCK)
    tl.load(x + at, at < n) + 1.0


@triton.jit
def crowded(x, out, N: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """More values at once than a lane has registers: they spill."""
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tile = tl.load(x + at)
    tl.store(out + at, tile * tl.sum(tl.sum(tile, 1), 0))


@triton.jit
def divide(x, y, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """An exact division, whose slow path has a frame that nothing uses."""
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.math.div_rn(tl.load(x + at, at < n), tl.load(y + at, at < n)), at < n)
