"""What a step gives: shapes and dtypes of its results for values of the sizes, without a compiler of torch.

A server waits for what its checks import. On the meta device torch decomposes some operators, or asks symbolic shapes
about them, for which it imports its compiler. So products, lookups and collectives are described here; other
steps of torch's run on zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import torch

from atomc.artifact.expr import evaluate
from atomc.artifact.plan import DType, RegionPlan, Size, Slot, SlotInfo, Step
from atomc.ops import OPS
from atomc.parallel.kinds import KINDS, WAIT

Like: TypeAlias = tuple[tuple[int, ...], torch.dtype]
PRODUCTS: Final = frozenset({"aten.linear.default", "aten.bmm.default", "aten.embedding.default"})
# What C++ describes on the meta device: views and copies, of weights too.
COPIES: Final = frozenset(
    f"aten.{op}" for op in ("contiguous.default", "reshape.default", "slice.Tensor", "to.dtype", "transpose.int")
)


def like(info: SlotInfo, sizes: Mapping[str, int]) -> Like:
    """The shape and dtype of a slot."""
    return tuple(evaluate(n, sizes) for n in info.shape), getattr(torch, info.dtype)


def results_of(op: torch._ops.OpOverload, step: Step, region: RegionPlan, sizes: Mapping[str, int]) -> list[Like]:
    """The shape and dtype of each result of a step, whose operator is `op`.

    Raises:
        Exception: whatever the operator says to arguments that do not fit.
    """
    if step.op in KINDS or step.op == WAIT:
        return [_sent(step, region, sizes)]
    if step.op in PRODUCTS:
        return [_product(step, region, sizes)]
    device = _device(step)
    kwargs = {name: _example(arg, region, sizes, device) for name, arg in step.kwargs.items()}
    if any(a.name == "device" and a.kwarg_only for a in op._schema.arguments):
        kwargs["device"] = device
    made = op(*(_example(arg, region, sizes, device) for arg in step.args), **kwargs)
    every = [] if made is None else list(made) if isinstance(made, (tuple, list)) else [made]
    return [(tuple(one.shape), one.dtype) for one in every if isinstance(one, torch.Tensor)]


def _device(step: Step) -> str:
    """Where a step costs least: where it is described, else on zeros."""
    namespace, name, _ = step.op.split(".")
    return "meta" if step.op in COPIES or (namespace == "atom" and OPS[name].described) else "cpu"


def _flat(arg: Any) -> list[Any]:
    return arg if isinstance(arg, list) else [arg]


def _sent(step: Step, region: RegionPlan, sizes: Mapping[str, int]) -> Like:
    """What a collective gives, by the contract of torch's."""
    (rows, *rest), dtype = _like(step.args[0], region, sizes)
    match KINDS.get(step.op):
        case "all_gather":
            rows *= _number(step.args[-2], sizes)
        case "reduce_scatter":
            rows //= _number(step.args[-2], sizes)
        case "all_to_all":
            rows = sum(_number(n, sizes) for n in _flat(step.args[1]))
    return (rows, *rest), dtype


def _product(step: Step, region: RegionPlan, sizes: Mapping[str, int]) -> Like:
    """What `linear` without a bias, `bmm` and `embedding` give."""
    if len(step.args) != 2:
        raise TypeError(f"takes {len(step.args)} arguments, not two tensors")
    (x, dtype), (y, other) = (_like(arg, region, sizes) for arg in step.args)
    match step.op:
        case "aten.linear.default":
            fits, made = len(y) == 2 and x[-1:] == y[1:] and dtype == other, (*x[:-1], *y[:1])
        case "aten.bmm.default":
            fits, made = len(x) == len(y) == 3 and (x[0], x[2]) == y[:2] and dtype == other, (*x[:2], *y[2:])
        case _:
            fits, made = len(x) == 2 and other in (torch.int64, torch.int32), (*y, *x[1:])
    if not fits:
        raise ValueError(f"{list(x)} {dtype} and {list(y)} {other} do not belong together")
    return made, dtype


def _like(arg: Any, region: RegionPlan, sizes: Mapping[str, int]) -> Like:
    if not isinstance(arg, Slot):
        raise TypeError(f"takes {arg!r}, which is no tensor")
    return like(region.slots[arg.id], sizes)


def _number(arg: Any, sizes: Mapping[str, int]) -> int:
    return evaluate(arg.expr if isinstance(arg, Size) else arg, sizes)


def _example(arg: Any, region: RegionPlan, sizes: Mapping[str, int], device: str) -> Any:
    match arg:
        case Slot(id=slot):
            shape, dtype = like(region.slots[slot], sizes)
            return torch.zeros(shape, dtype=dtype, device=device)
        case Size(expr=text):
            return evaluate(text, sizes)
        case DType(name=name):
            return getattr(torch, name)
        case list():
            return [_example(a, region, sizes, device) for a in arg]
    return arg
