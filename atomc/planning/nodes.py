"""Seconds of the nodes of a graph: by the formulas that `atomc inspect` predicts with, of collectives by the links.

Contract:
    What the schedule pass is given. A call's work is `atomc.costs.work` on its tensors' sizes; its seconds are the
    roofline's, its products at the shares that plans reckon with (`Target.product_rate`). Views, sizes and items of
    tuples take nothing; torch's own operators and those around collectives move their tensors once. An operator of
    ours that nothing describes is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from atomc.artifact.plan import DTYPE_BYTES, RegionPlan, Slot, SlotInfo, Step
from atomc.costs.formula import hit
from atomc.costs.launches import PARTS
from atomc.costs.work import COSTS, CostError, Work, work_of
from atomc.ops.exchange import EXCHANGES
from atomc.ops.registry import OPS
from atomc.parallel.collectives import KINDS, WAIT, group_of, is_collective
from atomc.parallel.tasks import Cost
from atomc.passes.graph import base_of, bytes_of, location, size_of
from atomc.planning.operators import padded, roofline, sending
from atomc.targets import Format, Target

PRODUCTS: Final = (
    ("moe_experts", "experts"), ("sparse_attention", "attention"), ("scaled_linear", "linear"),
    ("grouped", "grouped"), ("index", "index"),
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What a micro-batch has: requests, and the context of each when the step ends."""

    requests: float
    context: float


@dataclass(frozen=True)
class NodeCosts:
    """What each node takes.

    Attributes:
        sizes: value of every size symbol of the graph. axes: ranks along each mesh axis. loads: of the halves, or of
            the whole. experts: routed ones of a layer, of all ranks. weights: placeholders; what is made of them alone
            is made once, when the artifact is loaded. lenient: operators of ours that nothing describes, for no GPU
            runs them, move their tensors once; else they are an error.
    """

    target: Target
    sizes: Mapping[str, int]
    axes: Mapping[str, int]
    loads: Sequence[Load]
    experts: int
    weights: frozenset[str] = frozenset()
    lenient: bool = False

    def __call__(self, node: Node) -> Cost:
        """Raises `CostError`: nothing says what the operator does."""
        if is_collective(node):
            return self._collective(node)
        if not isinstance(node.target, torch._ops.OpOverload) or node.target is WAIT or base_of(node) is not node:
            return Cost(0.0)
        if self._prepared(node):
            return Cost(0.0)
        name = str(node.target).split(".")[1]
        moved, flops = self.work(node)
        waste = padded(self._rows_each(node)) if _product(name) == "experts" else 1.0
        found = roofline(self.target, moved, flops, _product(name), waste=waste)
        return found._replace(seconds=found.seconds + (name == "host_sizes") * self.target.sustained.host)

    def work(self, node: Node) -> tuple[float, dict[Any, float]]:
        """Bytes between a call and memory; FLOPs by the format of their operands, or `vector`."""
        namespace, name, _ = str(node.target).split(".")
        call = _Call(self, node)
        if name not in COSTS:
            if namespace == "atom" and name not in EXCHANGES and not self.lenient:
                raise CostError(f"{node.target} ({location(node)}): nothing says what it costs.")
            return float(sum(call.bytes)), {}
        work = work_of(call.step, call.region)
        at, product = self._symbols(node), _product(name)
        flops: dict[Any, float] = {}
        for part in work.flops:
            kind, factor = _kind(part.kind, product, call.region.slots[part.of].dtype, part.wide)
            flops[kind] = flops.get(kind, 0.0) + factor * part.count.at(at)
        if product != "experts":
            return _traffic(work, at), flops
        mine, chosen = self.size(_named(node, "w13").meta["val"].shape[0]), _named(node, "indices").meta["val"].shape[1]
        read = hit(self.experts, chosen).at(at) / self.experts * mine  # own experts that some token chooses
        weights = sum(size.at(at) for slot, size in work.traffic.items() if slot in work.partly)
        scale = mine / self.experts  # of all pairs of a token and an expert, those of its own experts
        return _traffic(work, at) + weights * (read / hit(mine, chosen).at(at) - 1), {
            k: v * scale for k, v in flops.items()
        }

    def _rows_each(self, node: Node) -> float:
        """Rows of an expert, all chosen alike."""
        chosen = _named(node, "indices").meta["val"].shape[1]
        return float(self._symbols(node)["T"] * chosen / self.experts)

    def _prepared(self, node: Node) -> bool:
        """Whether it reads weights alone."""
        inputs = node.all_input_nodes
        return bool(inputs) and all(
            n.name in self.weights or (n.op == "call_function" and self._prepared(n)) for n in inputs
        )

    def size(self, size: Any) -> int:
        """A size as a number."""
        return size_of(size, self.sizes)

    def _symbols(self, node: Node) -> dict[str, float]:
        """What the formulas' symbols are for a call: its own rows are T."""
        load = self.loads[min(int(node.meta.get("half", 0)), len(self.loads) - 1)]
        known = OPS.get(str(node.target).split(".")[1])
        rows = node.args[0] if known is None else _named(node, known.tokens)
        tensors = [n for n in pytree.tree_leaves(rows) if isinstance(n, Node)]
        value = tensors[0].meta["val"] if tensors else None
        tokens = self.size(value.shape[0]) if isinstance(value, torch.Tensor) and value.dim() else 1
        return {"T": tokens, "B": load.requests, "C": load.context, "L": load.requests, "N4": 1.0, "NH": 1.0}

    def _collective(self, node: Node) -> Cost:
        kind = KINDS[node.target]
        read = node.args[0]
        assert isinstance(read, Node)
        value = node.meta["val"] if kind == "reduce_scatter" else read.meta["val"]
        return sending(self.target, kind, self.bytes_of(value), self.axes.get(group_of(node), 1))

    def bytes_of(self, value: torch.Tensor) -> int:
        """Bytes of a fake tensor."""
        return bytes_of(value, self.sizes)


class _Call:
    """A node as a step of a plan, its sizes numbers."""

    def __init__(self, costs: NodeCosts, node: Node) -> None:
        self.costs = costs
        self.slots: list[SlotInfo] = []
        self.bytes: list[int] = []
        args = [self._argument(a) for a in node.args]
        kwargs = {k: self._argument(v) for k, v in node.kwargs.items()}
        results = [self._slot(v).id for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
        self.step = Step(str(node.target), args, kwargs, list(results), [], location(node))
        self.region = RegionPlan("", [], {}, self.slots, [], [self.step], 0)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._argument(v) for v in value]
        if not isinstance(value, Node):
            return value
        found = value.meta.get("val")
        return self._slot(found) if isinstance(found, torch.Tensor) else 0

    def _slot(self, value: torch.Tensor) -> Slot:
        shape: list[int | str] = [self.costs.size(s) for s in value.shape]
        dtype = str(value.dtype).removeprefix("torch.")
        self.slots.append(SlotInfo("", "temporary", shape, dtype, None, 0, 0, None))
        self.bytes.append(self.costs.bytes_of(value))
        return Slot(len(self.slots) - 1)


def _named(node: Node, name: str) -> Any:
    """The argument of that name."""
    assert isinstance(node.target, torch._ops.OpOverload)
    at = next(i for i, argument in enumerate(node.target._schema.arguments) if argument.name == name)
    return node.args[at] if at < len(node.args) else node.kwargs.get(name)


def _traffic(work: Work, at: Mapping[str, float]) -> float:
    return float(sum(size.at(at) for size in work.traffic.values()))


def _product(name: str) -> str:
    """Which product an operator is (`targets.Product.kind`, or `index`)."""
    return next((product for part, product in PRODUCTS if part in name), "")


def _kind(kind: str, product: str, dtype: str, wide: int) -> tuple[Format | str, float]:
    """The format whose rate a product runs at, and how many products of it it takes."""
    if kind == "vector":
        return "vector", 1.0
    if product in ("attention", "index"):  # rows of codes, expanded
        return "bf16", 1.0
    if DTYPE_BYTES[dtype] == 1:  # packed codes too: e2m1 expands to e4m3
        return "fp8", 1.0
    return "bf16", float(PARTS["bf16"][wide])
