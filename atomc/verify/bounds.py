"""How far a step may be from its float64 reference: from the arithmetic, with the reason beside each number.

    kind of step                      bound, for each element
    views, gathers, copies, integers  0: nothing is computed
    a result in 16 bits               half a spacing of its dtype, beside what the lines below say of it in float32
    cast to a narrower float          half a spacing of the new dtype
    dequantize                        0 where scales are powers of two (a code times one is exact); else one rounding
    quantize                          0: the input is the same, so the value that the rule rounds to is known
    one product (linear, mm, bmm)     2 · 2^-24 · √K · Σ|x||w|, the probabilistic bound of a sum of K products (Higham
                                      and Mary, 2019: errors of either sign cancel, √K in place of K), and u · |y|
    one function (mul, cos, …)        8 · u · |y|: the functions of a vector library are off by a few units
    a fused operator                  SAFETY · √K · (what moving every input by u moves the result, and u · |y|)
    … that rounds to 16 bits inside   and HALVED · what moving each number so rounded by u of 16 bits moves the result,
                                      or rounding each to nearest: equal numbers are off alike, and their errors add;
                                      where it does is seen in its reference (`atomc.verify.wide`, halvings)
    … a product of FP8 on Hopper      and what losing bits of its sums moves the result (`atomc.verify.narrow`)
    … rounded to a format at its end  what enters the rounding obeys the line above, δ; a value may then fall on a
                                      neighbour only where it lies within δ of the midpoint
    … rounded to a format inside      and what the undecided values inside (within δ of a midpoint) move the result:
                                      their sum where they are few, three times the root of their squares else
    a choice (top-k)                  a chosen score is not below the k-th best by more than the bound of the scores

u is the unit roundoff, 2^-24: sums and functions are computed in float32. K is the longest sum, at least CHAIN.
On a GPU the kinds are the same, the sums in another order. A product of float32 there (tf32x3: three products of
parts) leaves 2^-20 of |x||w| out at most, of either sign, which SAFETY · √K covers. What its kernels round to 16 bits
where the reference does not: the weights of attention, before they multiply rows (ROUNDED).
Why √K for what moves a fused operator: u of either sign moves a sum of K terms by their root mean square, its own
roundings by up to √K times that; where all terms have one sign, as in large attention scores, by more: SAFETY.
A float64 result is off by 2^-53 of itself, which no bound here sees. NaN and infinity are never within a bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from atomc.targets import get_target
from atomc.verify import grid

# Over all steps of the bundled model and in every scheme, the largest error is 0.4 of its bound
# (tests/verify/test_clean.py holds it below 0.75).
SAFETY: Final = 4.0
HALVED: Final = 2.0
UNIT: Final = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
CHAIN: Final = 16  # a fused operator without long sums still rounds after each of its functions
JITTERS: Final = 2  # runs with every input off by u
HALVED_JITTERS: Final = 4  # runs with what is rounded to 16 bits off: more, as the bound is closer to the error
FLOOR: Final = 0.25  # of the root mean square over a tensor: a row whose jitter happened to cancel is not held to it
MOST_FLIPS: Final = 12  # runs with undecided values rounded the other way, one of each token in each

EXACT: Final = frozenset(
    f"aten.{name}"
    for name in (
        "alias.default", "arange.default", "clamp.default", "clone.default", "contiguous.default", "cat.default",
        "detach.default", "embedding.default", "expand.default", "eye.default", "flatten.using_ints", "full.default",
        "gather.default", "index.Tensor", "index_copy.default", "index_select.default", "ones.default",
        "permute.default", "reshape.default", "select.int", "slice.Tensor", "split.Tensor",
        "split_with_sizes.default", "squeeze.dim", "stack.default", "transpose.int", "unbind.int", "unflatten.int",
        "unsqueeze.default", "view.default", "where.self", "zeros.default",
    )
)  # fmt: skip
ROUNDINGS: Final = frozenset({"quantize", "pack_rows"})
COPIES: Final = frozenset({"cache_insert", "compressed_insert", "compressor_update"})  # between equal dtypes
PRODUCTS: Final = frozenset({"aten.linear.default", "aten.mm.default", "aten.bmm.default", "aten.matmul.default"})
CASTS: Final = frozenset({"aten.to.dtype", "aten._to_copy.default", "aten.copy.default"})


ROUNDED: Final = {"sparse_attention": ("softmax",)}  # operators that begin so: functions of their references


def rounded_by_kernels(name: str, arguments: dict[str, Any]) -> dict[str, float]:
    """Functions in an operator's reference whose results the kernel rounds, where it works in 16 bits: u of that."""
    functions = next((found for prefix, found in ROUNDED.items() if name.startswith(prefix)), ())
    dtype = arguments["q"].dtype if functions else torch.float32
    return dict.fromkeys(functions, UNIT[dtype]) if dtype.itemsize == 2 else {}


def loses_sums(name: str, target: str) -> bool:
    """Whether an operator's products lose bits of their sums (`atomc.verify.narrow`)."""
    return name.startswith("scaled_") and get_target(target).arch == "sm_90"


def functional(op: str) -> str:
    """The operator that computes what an in-place one writes: `aten.mul_.Tensor` -> `aten.mul.Tensor`."""
    namespace, name, overload = op.split(".")
    return op if name.startswith("__") else f"{namespace}.{name.removesuffix('_')}.{overload}"


def flat(values: Iterable[Any]) -> Iterator[Any]:
    """Values, those of lists too."""
    for value in values:
        yield from value if isinstance(value, (list, tuple)) else (value,)


def in_16_bits(values: Any) -> bool:
    """Whether a step reads, is told of, or gives a 16-bit float."""
    found = [v.dtype if isinstance(v, Tensor) else v for v in flat(values) if isinstance(v, (Tensor, torch.dtype))]
    return any(d in (torch.bfloat16, torch.float16) for d in found)


def half_spacing(ideal: Tensor, slack: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Of the rounding of a result, itself off by `slack`, to a 16-bit dtype; 0 for another."""
    if dtype not in grid.FLOATS or dtype.itemsize > 2:
        return torch.zeros_like(ideal)
    return grid.spacing(ideal.abs() + slack, *grid.FLOATS[dtype]) / 2


def depth_of(op: str, values: Any) -> int:
    """The longest sum of a step: the last dim of what it reads; of hyper-connections all streams of a token."""
    tensors = [v for v in flat(values) if isinstance(v, Tensor) and v.dim()]
    shapes = [tuple(v.shape) for v in tensors if v.is_floating_point()]
    shapes += [(*v.shape[:-1], 2 * v.shape[-1]) for v in tensors if v.dtype == torch.int8]  # two FP4 codes in each
    if "hc_" in op:
        return max(math.prod(s[-2:]) for s in shapes)
    return max((s[-1] for s in shapes), default=CHAIN)


def mixed_depth(name: str, number: int, arguments: dict[str, Any]) -> int | None:
    """The sum behind the streams that a hyper-connection mixes, its first result; None of any other result."""
    return arguments["h"].shape[-2] + 1 if name.startswith("hc_post") and number == 0 else None


def product_bound(magnitudes: Tensor, nominal: Tensor, depth: int) -> Tensor:
    """Of a sum of `depth` products: `magnitudes` is the sum of their absolute values."""
    unit = UNIT[torch.float32]
    return (2 * unit * math.sqrt(depth)) * magnitudes + unit * nominal.abs()


def moved_bound(nominal: Tensor, moved: list[Tensor], depth: int) -> Tensor:
    """Of a fused operator: `moved` are its results with every input off by u."""
    factor = SAFETY * math.sqrt(max(depth, CHAIN))
    return factor * (_reach(nominal, moved, 0.0) + UNIT[torch.float32] * nominal.abs())


def halved_bound(nominal: Tensor, halved: list[Tensor], last: float) -> Tensor:
    """Of what is rounded to 16 bits inside: `halved` are the results with all that off by u of its dtype.

    Args:
        last: u of the dtype of the result itself, whose own rounding is no part of this bound; 0 for a wider one.
    """
    return HALVED * _reach(nominal, halved, last) if halved else torch.zeros_like(nominal)


def summed_bound(nominal: Tensor, summed: list[Tensor]) -> Tensor:
    """Of sums that lost bits: `summed` are the results with each off by the most, which is of each element alone."""
    return torch.stack([(s - nominal).abs() for s in summed]).amax(0) if summed else torch.zeros_like(nominal)


def flipped_bound(nominal: Tensor, flipped: list[Tensor]) -> Tensor:
    """Of undecided values inside: `flipped` are the results with one of each token the other way, the last with many.

    Few may all go the other way. Of many about half do, of either sign: their sum is within three times the root of
    the sum of squares.
    """
    moves = [(other - nominal).abs() for other in flipped]
    if not moves:
        return torch.zeros_like(nominal)
    alone = torch.stack(moves[: MOST_FLIPS - 1])
    bound = torch.minimum(alone.sum(0), 3 * alone.square().sum(0).sqrt())
    for together in moves[MOST_FLIPS - 1 :]:
        # They may have cancelled in one element, where some of them alone would not.
        bound = (bound.square() + together.amax(-1, keepdim=True).square()).sqrt()
    return bound


def _reach(nominal: Tensor, moved: list[Tensor], last: float) -> Tensor:
    """How far the elements of a row are moved, at most, beyond `last` of themselves."""
    if not nominal.numel():
        return nominal
    distance = (torch.stack([(m - nominal).abs() for m in moved]).amax(0) - last * nominal.abs()).clamp(min=0)
    if last:  # that of an element that moved by its own rounding alone is an error of the float64 arithmetic
        distance = torch.where(distance < 2.0**-40 * nominal.abs(), 0.0, distance)
    row = distance
    if distance.dim():
        row = distance.amax(-1, keepdim=True)
        if distance.dim() > 2 and distance.shape[-2] <= 8:  # a few heads or streams: too few to hit the worst
            row = row.amax(-2, keepdim=True)
    return torch.maximum(row, FLOOR * distance.square().mean().sqrt()).expand_as(nominal)
