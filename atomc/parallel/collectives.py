"""Collectives as nodes of a graph: which operators they are, and over which group.

Contract: a collective is an operator of `torch.distributed._functional_collectives`; its group is the ranks along one
mesh axis, named by the axis. What it returns may be read after `wait_tensor` only.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.distributed._functional_collectives as _operators  # noqa: F401  defines them
from torch.fx import Node

from atomc.parallel.kinds import KINDS as _BY_NAME
from atomc.parallel.kinds import NAMESPACE, Kind, placed

c10d = getattr(torch.ops, NAMESPACE)
KINDS: Final[dict[Any, Kind]] = {getattr(c10d, name.split(".")[1]).default: kind for name, kind in _BY_NAME.items()}
WAIT: Final = c10d.wait_tensor.default


def is_collective(node: Node) -> bool:
    """Whether a node starts a collective."""
    return node.op == "call_function" and node.target in KINDS


def group_of(node: Node) -> str:
    """The mesh axis along which a collective runs."""
    return str(node.args[-1])


__all__ = ["KINDS", "WAIT", "Kind", "c10d", "group_of", "is_collective", "placed"]
