"""Collectives of a plan through torch.distributed: one process group for each mesh axis, what is under way as a value.

Contract: a start returns what is under way, `wait_tensor` its result; in between, other steps may run. A sum over ranks
is in their order on every one of them, whatever the library's own order is, so that a step's numbers do not depend on
who runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from atomc.ops.placement import Mesh
from atomc.parallel.kinds import KINDS, WAIT, Kind


@dataclass(frozen=True)
class Pending:
    """A collective under way, and what makes its result of what it brought; `held` lives until then."""

    work: dist.Work
    finish: Callable[[], Tensor]
    held: Tensor

    def wait(self) -> Tensor:
        """The result. Raises `RuntimeError` if a rank was lost."""
        self.work.wait()
        return self.finish()


class Groups:
    """The process groups of one rank, by axis; built on all ranks of the mesh in the same order.

    Args:
        ranks: of the whole process group, those of the mesh in its order; all of them where it is left out.
    """

    def __init__(self, mesh: Mesh, ranks: Sequence[int] | None = None) -> None:
        members = list(range(mesh.ranks)) if ranks is None else list(ranks)
        mine = members.index(dist.get_rank())
        self.mesh, self.rank, self.index = mesh, mine, dict(zip(mesh.names, mesh.coordinate(mine), strict=True))
        self._groups: dict[str, dist.ProcessGroup] = {}
        for axis in mesh.names:
            for group in mesh.groups(axis):
                made = dist.new_group([members[r] for r in group])
                if mine in group:
                    self._groups[axis] = made

    def functions(self) -> Mapping[str, Callable[..., Any]]:
        """What runs for each operator that a plan has for collectives."""
        starts: dict[Kind, Callable[..., Pending]] = {
            "all_gather": self.all_gather, "reduce_scatter": self.reduce_scatter, "all_reduce": self.all_reduce,
            "all_to_all": self.all_to_all,
        }  # fmt: skip
        return {op: starts[kind] for op, kind in KINDS.items()} | {WAIT: Pending.wait}

    def all_gather(self, x: Tensor, ranks: int, axis: str) -> Pending:
        """[R, ...] -> [ranks R, ...], in order of ranks."""
        out = x.new_empty((ranks * x.shape[0], *x.shape[1:]))
        return Pending(self._groups[axis]._allgather_base(out, x), lambda: out, x)

    def reduce_scatter(self, x: Tensor, _op: str, ranks: int, axis: str) -> Pending:
        """[ranks R, ...] -> [R, ...]: each rank its rows of the sum, in order of ranks."""
        parts = torch.empty_like(x)
        work = self._groups[axis].alltoall_base(parts, x, [], [])
        return Pending(work, lambda: _sum(parts.chunk(ranks)), x)

    def all_reduce(self, x: Tensor, _op: str, axis: str) -> Pending:
        """The sum, in order of ranks, on all of them."""
        ranks = self.mesh.size(axis)
        every = x.new_empty((ranks, *x.shape))
        work = self._groups[axis]._allgather_base(every.flatten(0, 1), x)
        return Pending(work, lambda: _sum(every.unbind()), x)

    def all_to_all(self, x: Tensor, receive: list[int], send: list[int], axis: str) -> Pending:
        """Rows in order of destination -> rows in order of source: `send` of x to each rank, `receive` from each."""
        out = x.new_empty((sum(receive), *x.shape[1:]))
        work = self._groups[axis].alltoall_base(out, x, receive, send)
        return Pending(work, lambda: out, x)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
