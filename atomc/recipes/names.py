"""Paths of parameters made of several: `attn.wq_a|attn.wkv.weight` is two weights, joined along their rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_JOINT: Final = "|"


def joined(paths: Iterable[str]) -> str:
    """The path of the parameter that is those of `paths` joined; all of them end alike, or in nothing (`attn.wkv`)."""
    *first, last = paths
    return _JOINT.join((*(path.removesuffix(_ending(path)) for path in first), last))


def members(path: str) -> tuple[str, ...]:
    """The paths that are joined in one; a plain path is its own only member."""
    ending = _ending(path)
    return tuple(part + ending for part in path.removesuffix(ending).split(_JOINT))


def _ending(path: str) -> str:
    return next((end for end in (".weight", ".scale") if path.endswith(end)), "")
