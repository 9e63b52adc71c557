"""The kernel families. None is written yet: no operator has a kernel for a GPU target."""

from __future__ import annotations

from atomc.targets import Target

# operator of a plan's step (`atom.rope.default`) -> names of the targets it has a kernel for
KERNELS: dict[str, frozenset[str]] = {}


def has_kernel(op: str, target: Target) -> bool:
    """Whether `target` has a kernel for an operator, named as in a plan's step."""
    return target.name in KERNELS.get(op, frozenset())
