"""The invariant "index rotation": index rows and the queries they are scored with are rotated both, or neither.

The Hadamard rotation cancels in a product of two rotated vectors. On one side only it scores other rows, and nothing
but the quality of the text would show it (spec 2.7).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from atomc.passes.graph import calls, location, schema_of
from atomc.passes.runner import invariant

atom = torch.ops.atom
INDEX_ROTATION = "index rotation"
READERS = (atom.index_topk.default, atom.index_rope_topk.default)
_THROUGH = (atom.dequantize.default, atom.quantize.default, atom.pack_rows.default)


@invariant(INDEX_ROTATION)
def index_rotation(gm: GraphModule) -> str | None:
    """None, or which writer and which reader differ."""
    for reader in [n for n in calls(gm.graph) if n.target in READERS]:
        rotated, cache = _reads_rotated(reader), argument(reader, "cache")
        for writer in [n for n in cache.users if n is not reader and n.args and cache in n.args]:
            if (other := _writes_rotated(writer)) is not None and other != rotated:
                sides = ("rotated", "not rotated") if other else ("not rotated", "rotated")
                return (
                    f"index rows are written {sides[0]} at {location(writer)} ({writer.name}), and the queries of "
                    f"{reader.name} ({location(reader)}) are {sides[1]}"
                )
    return None


def argument(node: Node, name: str) -> Any:
    """A call's argument by its name in the schema; the default where it is not given."""
    schema = schema_of(node)
    assert schema is not None
    for at, a in enumerate(schema.arguments):
        if a.name == name:
            return node.args[at] if at < len(node.args) else node.kwargs.get(name, a.default_value)
    raise KeyError(name)


def _reads_rotated(reader: Node) -> bool:
    if reader.target is atom.index_rope_topk.default:
        return bool(argument(reader, "layout"))
    return _is_rotated(argument(reader, "q"))


def _writes_rotated(writer: Node) -> bool | None:
    """None for a call that writes no rows."""
    if writer.target is atom.compressor_pool_norm_rope_insert.default:
        return bool(argument(writer, "rotate"))
    if writer.target in (atom.packed_insert.default, atom.compressed_packed_insert.default):
        return _is_rotated(argument(writer, "packed"))
    if writer.target in (atom.cache_insert.default, atom.compressed_insert.default):
        return _is_rotated(argument(writer, "x"))
    return None


def _is_rotated(node: Node) -> bool:
    """Whether a tensor comes out of the rotation, rounded since or not."""
    while node.target in _THROUGH or getattr(node.target, "__name__", "") == "getitem":
        node = node.args[0]  # type: ignore[assignment]
    return node.target is atom.hadamard.default
