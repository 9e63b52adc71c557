"""Cases of copies: views that no other view reshapes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from atomc.codegen.device import Device
from atomc.codegen.kernels import copy
from tests.support.kernel_cases import TORCH, Case

F32, BF16, I32, I64 = torch.float32, torch.bfloat16, torch.int32, torch.int64
View = Callable[[Tensor], Tensor]


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(-(2**30), 2**30, shape).to(dtype)


def reshaped(
    name: str, shape: tuple[int, ...], view: View, into: tuple[int, ...], dtype: torch.dtype = BF16, slow: bool = False
) -> Case:
    """A view of memory of that shape, reshaped. torch's operators are no entries of OPS."""
    host = lambda device, x, into: copy.reshape(device, view(x), into)  # noqa: E731
    known = SimpleNamespace(
        reference=lambda x, into: view(x).reshape(into), overload=torch.ops.aten.reshape.default, mutates=()
    )
    TORCH[f"reshape {name}"] = known
    return Case(name, f"reshape {name}", host, lambda: [values(shape, dtype), list(into)], slow=slow)


def made_whole(name: str, shape: tuple[int, ...], view: View, dtype: torch.dtype = F32) -> Case:
    """A view made contiguous; without one, a tensor cloned."""
    host = lambda device, x: (copy.contiguous if view is not _same else copy.clone)(device, view(x))  # noqa: E731
    known = SimpleNamespace(
        reference=lambda x: view(x).contiguous(), overload=torch.ops.aten.contiguous.default, mutates=()
    )
    TORCH[f"contiguous {name}"] = known
    return Case(name, f"contiguous {name}", host, lambda: [values(shape, dtype)])


def _same(x: Tensor) -> Tensor:
    return x


def _exchanged(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


CASES = [
    *(reshaped(f"groups {g}x{t}x{n} {str(dtype)[6:]}", (g, t, n), _exchanged, (t, g * n), dtype)
      for g, t, n, dtype in [(2, 1, 128, BF16), (3, 5, 7, F32), (8, 16, 1024, BF16), (1, 4, 6, BF16), (4, 70, 33, I32),
                             (2, 3, 5000, BF16)]),
    *(reshaped(f"real {g}x{t}x{n}", (g, t, n), _exchanged, (t, g * n), slow=True)
      for g, t, n in [(8, 64, 1024), (16, 8192, 1024)]),
    made_whole("exchanged", (9, 5), _exchanged),
    made_whole("columns", (6, 50), lambda x: x[:, 7:40], BF16),
    made_whole("every second column", (6, 50), lambda x: x[:, ::2], BF16),
    made_whole("inner exchanged", (5, 3, 17), lambda x: x.transpose(1, 2)),
    made_whole("four dims", (4, 6, 5, 7), lambda x: x.permute(1, 3, 0, 2)),
    made_whole("last to the front", (4, 6, 5, 7), lambda x: x.permute(3, 0, 1, 2), BF16),
    made_whole("first to the end", (4, 6, 5, 7), lambda x: x.permute(1, 2, 3, 0)),
    made_whole("broadcast", (5, 1, 8), lambda x: x.expand(5, 3, 8)),
    made_whole("one dim", (1001, 3), lambda x: x[:, 1], I64),
    made_whole("a part of exchanged", (4, 11, 6), lambda x: x.transpose(0, 1)[:, 1:3]),
    made_whole("cloned", (7, 4099), _same),
]  # fmt: skip


# -- ahead of time -----------------------------------------------------------------------------------------------------


def _groups(device: Device) -> None:
    t = device.tokens
    for groups, dtype in [(8, BF16), (16, BF16), (8, F32)]:
        z: Any = torch.empty(groups, t, 1024, dtype=dtype, device="meta").transpose(0, 1)
        copy.reshape(device, z, (t, groups * 1024))


AOT = [(f"groups {tokens}", _groups) for tokens in (1, 8192)]
