"""What each operator makes of the placements of its inputs, on one mesh axis.

Contract:
    A rule sees one mesh axis at a time: the axes cut a tensor one after the other, and no operator looks across them.
    A combination that a rule does not allow is an error, never a guess: a sum that is due is used by nothing but a
    collective and what is linear in it.
Terms:
    spec    `... k, N k -> ... N`: the dims of each tensor argument, then of each result. An upper-case letter is a
            dim that may be cut, the same way wherever it stands; a lower-case one has to be whole; `+k` is summed
            over, so that cutting it everywhere leaves a Partial. `...` are further dims, as upper-case letters; a
            dim of size 1 among them is repeated.
    T       tokens, and with them all that belongs to a rank's own requests: tables, caches, ends of windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Final

import torch

from atomc.ops import placement_exchange as exchange
from atomc.ops.placement import (
    OWN,
    PARTIAL,
    REPLICATE,
    Call,
    Operand,
    Partial,
    Placement,
    PlacementError,
    Shard,
    Size,
)
from atomc.ops.pointwise import CREATIONS, ELEMENTWISE, REDUCTIONS, Name, parse

Rule = Callable[[Call], tuple[Placement, ...]]


def propagate(call: Call) -> tuple[Placement, ...]:
    """The placements of the results on one axis.

    Raises:
        PlacementError: an operator without a rule, or inputs that it does not allow; the message has no place yet.
    """
    rule = RULES.get(call.op)
    if rule is None:
        raise PlacementError(f"{call.op} has no placement rule; give it one in atomc/ops/placement_rules.py")
    return rule(call)


# -- specs -------------------------------------------------------------------------------------------------------------


@cache
def _parse(spec: str) -> tuple[list[list[str]], list[list[str]]]:
    left, _, right = spec.partition("->")
    return tuple([part.split() for part in side.split(",")] if side.strip() else [] for side in (left, right))  # type: ignore[return-value]


def _letters(dims: list[str], rank: int) -> list[str]:
    """The letters of a tensor of so many dims, the ellipsis opened; its letters count from the right."""
    if "..." not in dims:
        if len(dims) != rank:
            raise PlacementError(f"a tensor of {rank} dims where {len(dims)} are expected ({' '.join(dims)})")
        return dims
    at, extra = dims.index("..."), rank - len(dims) + 1
    return [*dims[:at], *(f"*{extra - i}" for i in range(extra)), *dims[at + 1 :]]


def by_spec(spec: str, linear: bool = False) -> Rule:
    """The rule of a spec; `linear`: the one argument that the result is linear in, the first, may be Partial."""

    def rule(call: Call) -> tuple[Placement, ...]:
        inputs, outputs = _parse(spec)
        operands = call.operands()
        if len(operands) > len(inputs) and any(operands[len(inputs) :]):
            raise PlacementError(f"{len(operands)} tensors where {len(inputs)} are expected ({spec})")
        if linear and operands[0] is not None and operands[0].placement == PARTIAL:
            return _all_whole(operands[1:], len(outputs))
        named = [(o, _letters(dims, len(o.shape))) for o, dims in zip(operands, inputs, strict=False) if o is not None]
        cut = _cut_letter(named)
        if cut is None:
            return (REPLICATE,) * len(outputs)
        letters, by = cut
        _agree(named, letters)
        if any(letter.startswith("+") for letter in letters):
            return (PARTIAL,) * len(outputs)
        return tuple(
            _at(letters, _letters(dims, len(shape)), by) for dims, shape in zip(outputs, call.results, strict=False)
        )

    return rule


def _all_whole(operands: Sequence[Operand | None], results: int) -> tuple[Placement, ...]:
    for operand in operands:
        if operand is not None and operand.placement != REPLICATE:
            raise PlacementError(f"a sum that is due meets a tensor that is {operand.placement}")
    return (PARTIAL,) * results


def _cut_letter(named: Sequence[tuple[Operand, list[str]]]) -> tuple[set[str], str] | None:
    """The letters that are cut, and by what; None if nothing is."""
    letters: set[str] = set()
    by: set[str] = set()
    for operand, dims in named:
        placement = operand.placement
        if isinstance(placement, Partial):
            raise PlacementError(f"a {placement} is used as a full value: a collective over the axis is due before")
        if isinstance(placement, Shard):
            letter = dims[placement.dim]
            if letter.islower() and not letter.startswith("+"):
                raise PlacementError(f"dim {placement.dim} of a tensor that is {placement} has to be whole")
            if placement.parts > 1:
                raise PlacementError(f"a tensor that is {placement} is one of the experts' weights and nothing else")
            letters.add(letter)
            by.add(placement.by)
    if not letters:
        return None
    if len(letters) > 1 or len(by) > 1:
        placed = ", ".join(str(o.placement) for o, _ in named)
        raise PlacementError(f"the inputs are cut in ways that do not belong together ({placed})")
    return letters, by.pop()


def _agree(named: Sequence[tuple[Operand, list[str]]], letters: set[str]) -> None:
    """Whether all tensors with the letter are cut there; a dim of size 1 is repeated."""
    for operand, dims in named:
        for at, letter in enumerate(dims):
            repeated = letter.startswith("*") and operand.shape[at] == 1
            if letter in letters and operand.placement == REPLICATE and not repeated:
                raise PlacementError(
                    f"one input is whole in its dim {at} where another is cut: every rank would take a part of its own"
                )


def _at(letters: set[str], dims: list[str], by: str) -> Placement:
    found = [at for at, letter in enumerate(dims) if letter in letters]
    return Shard(found[0], by=by) if found else REPLICATE  # type: ignore[arg-type]


# -- rules of their own ------------------------------------------------------------------------------------------------


def _linear(call: Call) -> tuple[Placement, ...]:
    """A product with a bias is whole where it sums: of parts, every rank would add the bias."""
    found = _PRODUCT(call)
    if found == (PARTIAL,) and len([o for o in call.operands() if o is not None]) > 2:
        raise PlacementError("a sum that is due has a bias: it would count once a rank")
    return found


_PRODUCT: Final = by_spec("... +k, N +k, N -> ... N")


def _dim(dim: int, rank: int) -> int:
    return dim % rank


def _pointwise(call: Call) -> tuple[Placement, ...]:
    """Broadcast from the right. Adding two sums that are due is one that is due; adding a full value to one is not."""
    operands = [o for o in call.operands() if o is not None]
    if len(operands) == 1 and not isinstance(operands[0].placement, Partial):
        return (operands[0].placement,)
    due = [o.placement == PARTIAL for o in operands]
    if any(due):
        if call.op == "aten.to.dtype" and not (
            isinstance(call.args[1], torch.dtype) and call.args[1].is_floating_point
        ):
            raise PlacementError(f"a sum that is due is rounded to {call.args[1]} before it is taken")
        alone = len(operands) == 1 and not (call.op in _SUMS and len(call.args) > 1)
        if (call.op in _SUMS and all(due) and len(due) > 1) or (call.op in _SCALES and alone):
            return (PARTIAL,)
        if call.op == "aten.mul.Tensor" and due == [True, False]:
            return _all_whole(operands[1:], 1)
        raise PlacementError("a Partial(sum) is used as a full value: a collective over the axis is due before")
    return _ELEMENTS(call)


_ELEMENTS: Final = by_spec("..., ..., ... -> ...")
_SUMS: Final = frozenset({"aten.add.Tensor", "aten.sub.Tensor"})
_SCALES: Final = frozenset({"aten.mul.Tensor", "aten.div.Tensor", "aten.to.dtype", "aten.contiguous.default"})


def _reshape(call: Call) -> tuple[Placement, ...]:
    """The outermost of the dims that are joined or split carries the cut."""
    x = call.first()
    if not isinstance(x.placement, Shard):
        return (x.placement,)
    for before, after in _regrouped(x.shape, call.results[0]):
        if x.placement.dim in before:
            if x.placement.dim != before[0] or not after or (x.placement.parts > 1 and len(after) > 1):
                break
            return (replace(x.placement, dim=after[0]),)
    raise PlacementError(f"{list(x.shape)} as {list(call.results[0])} mixes the parts of dim {x.placement.dim}")


def _regrouped(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Runs of dims of equal products, the shortest there are."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        left, right, m, n = [i], [j], before[i], after[j]
        while m != n:
            if m < n and i + 1 < len(before):
                i += 1
                left.append(i)
                m *= before[i]
            elif n < m and j + 1 < len(after):
                j += 1
                right.append(j)
                n *= after[j]
            else:
                return [*found, (list(range(left[0], len(before))), [])]
        found.append((left, right))
        i, j = i + 1, j + 1
    return found


def _transpose(call: Call) -> tuple[Placement, ...]:
    x, (a, b) = call.first(), call.args[1:3]
    if not isinstance(x.placement, Shard):
        return (x.placement,)
    a, b = _dim(a, len(x.shape)), _dim(b, len(x.shape))
    return (replace(x.placement, dim={a: b, b: a}.get(x.placement.dim, x.placement.dim)),)


def _unsqueeze(call: Call) -> tuple[Placement, ...]:
    x, at = call.first(), _dim(call.args[1], len(call.first().shape) + 1)
    if not isinstance(x.placement, Shard):
        return (x.placement,)
    return (replace(x.placement, dim=x.placement.dim + (at <= x.placement.dim)),)


def _slice(call: Call) -> tuple[Placement, ...]:
    """A part of one dim; of a dim that is cut, the ranks' parts would be others."""
    x = call.first()
    if x.placement == OWN:
        raise PlacementError(f"a slice of a {x.placement}")
    cut = isinstance(x.placement, Shard) and x.placement.dim == _dim(call.args[1], len(x.shape))
    if cut and call.results[0] != x.shape:
        raise PlacementError("a slice of a dim that is cut is another on every rank")
    return (x.placement,)


def _expand(call: Call) -> tuple[Placement, ...]:
    x = call.first()
    if x.placement == REPLICATE:
        return _sized(call.args[1])
    if not isinstance(x.placement, Shard):
        return (x.placement,)
    return (replace(x.placement, dim=x.placement.dim + len(call.results[0]) - len(x.shape)),)


def _made(call: Call) -> tuple[Placement, ...]:
    return _sized(call.args[0])


def _sized(sizes: Any) -> tuple[Placement, ...]:
    """A constant is the same everywhere, but for the number of the rank's own tokens."""
    own = (
        [at for at, size in enumerate(sizes) if isinstance(size, Size) and size.own]
        if isinstance(sizes, (list, tuple))
        else []
    )
    return (Shard(own[0]) if own else REPLICATE,)


def _size(call: Call) -> tuple[Placement, ...]:
    """A number of rows: cut if the dim is."""
    x = call.first()
    cut = isinstance(x.placement, Shard) and x.placement.dim == _dim(call.args[1], len(x.shape))
    return (Shard(0) if cut else REPLICATE,)


def _dequantize(call: Call) -> tuple[Placement, ...]:
    codes, scales = (o.placement for o in call.operands() if o is not None)
    if codes != scales or isinstance(codes, Partial):
        raise PlacementError(f"codes that are {codes} with scales that are {scales}")
    return (codes,)


def _reduced(call: Call) -> tuple[Placement, ...]:
    """Over the last dim, kept or not."""
    x = call.first()
    if x.placement == OWN or (isinstance(x.placement, Partial) and call.op == "aten.amax.default"):
        raise PlacementError(f"{call.op} of a {x.placement}: of parts it is not that of the whole")
    dims = call.args[1] if isinstance(call.args[1], (list, tuple)) else [call.args[1]]
    if isinstance(x.placement, Shard):
        if x.placement.dim in [_dim(d, len(x.shape)) for d in dims]:
            raise PlacementError(f"a reduction over dim {x.placement.dim}, which is cut")
        if len(call.results[0]) < len(x.shape) and any(_dim(d, len(x.shape)) < x.placement.dim for d in dims):
            return (replace(x.placement, dim=x.placement.dim - len(dims)),)
    return (x.placement,)


def _quantize(call: Call) -> tuple[Placement, ...]:
    """Codes and scales of blocks along the last dim: a cut may not go through a block."""
    found = by_spec("... K -> ... K, ... K")(call)
    x = call.first()
    exchange.whole_blocks(str(call.args[1]), x, x.shape[-1])
    return found


def _pointwise_program(call: Call) -> tuple[Placement, ...]:
    """A generated chain: the rule of each of its lines."""
    inputs, sizes, text = call.args
    program = parse(text)
    shapes = program.run([torch.empty(o.shape, dtype=o.dtype, device="meta") for o in inputs], [s.value for s in sizes])
    known: dict[str, Any] = {f"a{i}": o for i, o in enumerate(inputs)} | {f"s{i}": s for i, s in enumerate(sizes)}
    for line in program.lines:
        value = shapes[line.result]
        args = tuple(_known(a, known) for a in line.args)
        (placed,) = RULES[line.op](Call(line.op, args, (tuple(value.shape),)))
        known[line.result] = Operand(placed, tuple(value.shape), value.dtype)
    return tuple(known[name].placement for name in program.results)


def _known(arg: Any, known: Mapping[str, Any]) -> Any:
    if isinstance(arg, Name):
        return known[arg.text]
    return tuple(_known(a, known) for a in arg) if isinstance(arg, list) else arg


# -- the table ---------------------------------------------------------------------------------------------------------

_QUERIES = "T H d"
_HC_PRE = "r k, r, s"
_WHERE = "T, T, T"
_SPECS: Final[dict[str, str]] = {
    "atom.linear_fp32.default": "... +k, N +k -> ... N",
    "atom.scaled_linear.default": "... +K, ... +K, N +K, N +K -> ... N",
    "aten.bmm.default": "B M +k, B +k N -> B M N",
    "atom.scaled_grouped_output.default": "T G k, T G k, G k, G k -> T G",
    "aten.embedding.default": "v D, ... -> ... D",
    "aten.index.Tensor": "T ..., T -> T ...",
    "aten.gather.default": "... e, ... k -> ... k",
    "aten.topk.default": "... e -> ... k, ... k",
    "atom.pack_rows.default": "T d -> T d",
    "atom.hadamard.default": "... d -> ... d",
    "atom.swiglu.default": "..., ... -> ...",
    "atom.swiglu_quant.default": "..., ... -> ..., ...",
    "atom.rms_norm.default": "... d, d -> ... d",
    "atom.rms_norm_pair.default": "T d, d, T e, e -> T d, T e",
    "atom.rms_norm_pair_quant.default": "T d, d, T e, e -> T d, T d, T e",
    "atom.rope.default": "... d, ... r, ... r -> ... d",
    "atom.cache_insert.default": "T ..., T d, T w, T, T ->",
    "atom.packed_insert.default": "T ..., T d, T w, T, T ->",
    "atom.qk_norm_rope_insert.default": f"{_QUERIES}, T d, T r, T r, T ..., T w, T, T -> {_QUERIES}",
    "atom.sparse_attention.default": f"{_QUERIES}, T ..., T w, T ..., T m, T k, H, T, T -> {_QUERIES}",
    "atom.sparse_attention_inverse_rope.default":
        f"{_QUERIES}, T ..., T w, T ..., T m, T k, H, T, T, T r, T r -> {_QUERIES}",
    "atom.sparse_attention_inverse_rope_quant.default":
        f"{_QUERIES}, T ..., T w, T ..., T m, T k, H, T, T, T r, T r -> T H d, T H b",
    "atom.compressor_pool.default": f"T d, T d, m d, T ..., T, {_WHERE}, T -> T d",
    "atom.compressor_update.default": f"T ..., T d, T d, {_WHERE}, T ->",
    "atom.compressed_insert.default": "T ..., T d, T m, T, T, T ->",
    "atom.compressed_packed_insert.default": "T ..., T d, T m, T, T, T ->",
    "atom.compressor_pool_norm_rope_insert.default":
        f"T d, T d, m d, T ..., d, T r, T r, T ..., T m, T, {_WHERE}, T ->",
    "atom.index_topk.default": "T h d, T h, T ..., T m, T, T, T -> T k",
    "atom.index_rope_topk.default": "T h d, T r, T r, T h, T ..., T m, T, T, T -> T k",
    "atom.grouped_linear.default": "T ..., e n k, T c -> T c n",
    "atom.hc_pre.default": f"T n d, {_HC_PRE} -> T d, T n, T n n",
    "atom.hc_pre_norm.default": f"T n d, {_HC_PRE}, d -> T d, T n, T n n",
    "atom.hc_post.default": "T n d, T d, T n, T n n -> T n d",
    "atom.hc_post_pre_norm.default":
        f"T n d, T d, T n, T n n, {_HC_PRE}, d -> T n d, T d, T n, T n n",
    "atom.hc_post_pre_norm_quant.default":
        f"T n d, T d, T n, T n n, {_HC_PRE}, d -> T n d, T d, T n, T n n, T d, T d",
    "atom.hc_head.default": f"T n d, {_HC_PRE} -> T d",
    "atom.hc_head_norm.default": f"T n d, {_HC_PRE}, d -> T d",
    "atom.route_topk.default": "T e, e -> T k, T k",
    "atom.route_hash.default": "T e, T, v k -> T k, T k",
}  # fmt: skip
RULES: Final[dict[str, Rule]] = {
    **{op: by_spec(spec) for op, spec in _SPECS.items()},
    **dict.fromkeys((*ELEMENTWISE, "aten.softplus.default"), _pointwise),
    "aten.linear.default": _linear,
    "atom.pointwise.default": _pointwise_program,
    "atom.quantize.default": _quantize,
    **dict.fromkeys(("aten.reshape.default", "aten.view.default"), _reshape),
    "atom.drop_padding.default": by_spec("T ..., T ... -> T ...", linear=True),
    "aten.sym_size.int": _size,
    "atom.dequantize.default": _dequantize,
    "aten.transpose.int": _transpose,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.slice.Tensor": _slice,
    "aten.expand.default": _expand,
    **dict.fromkeys(REDUCTIONS, _reduced),
    **dict.fromkeys(CREATIONS, _made),
    "aten.eye.default": lambda _: (REPLICATE,),
    **{f"atom.{op}.default": exchange.experts for op in exchange.EXPERTS},
    "atom.join_columns.default": exchange.join_columns,
    "atom.local_experts.default": exchange.local_experts,
    "atom.vocabulary_embedding.default": exchange.vocabulary,
    "atom.sort_by_rank.default": exchange.sorted_rows,
    "atom.dispatch_rows.default": exchange.dispatch_rows,
    "atom.combine_rows.default": exchange.combine_rows,
    "atom.host_sizes.default": exchange.host_sizes,
    "atom.pack_message.default": by_spec("T ..., T ..., T ..., T ... -> T b"),
    "atom.unpack_message.default": exchange.view_message,
}
