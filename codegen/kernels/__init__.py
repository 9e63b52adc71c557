"""The kernel families. None is written yet: no operator has a kernel for a GPU target."""

from __future__ import annotations

import torch

from atomc.targets import Target

# operator name -> names of the targets it has a kernel for
KERNELS: dict[str, frozenset[str]] = {}


def has_kernel(op: torch._ops.OpOverload, target: Target) -> bool:
    """Whether `target` has a kernel for the operator."""
    return target.name in KERNELS.get(str(op), frozenset())
