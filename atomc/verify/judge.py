"""Judging what a step gave against what its reference gives in float64.

Terms:
    verdict   of one result: its relative error, the error that its bound would allow, and the element that comes
              closest to the bound (or is furthest beyond)
    use       an element's error as a part of its bound; above 1 the bound is broken
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atomc.verify import grid
from atomc.verify.errors import VerifyError


@dataclass(frozen=True)
class Verdict:
    """See the module's terms.

    Attributes:
        what: `out 0`, or the argument that the step writes. error: ||found - expected|| / ||expected||.
        bound: the same of the bound. index, found, expected: the worst element; spacings: how many spacings of its
            format the two are apart. why: what is wrong where it is not a matter of degree; empty otherwise.
    """

    what: str
    error: float
    bound: float
    use: float
    index: tuple[int, ...] = ()
    found: float = 0.0
    expected: float = 0.0
    spacings: float = 0.0
    why: str = ""

    @property
    def ok(self) -> bool:
        return self.use <= 1 and not self.why

    def of(self, what: str) -> Verdict:
        """The verdict under another name."""
        return replace(self, what=what)


def broken(what: str, why: str) -> Verdict:
    """A result that is not even comparable."""
    return Verdict(what, torch.inf, 0.0, torch.inf, why=why)


def compare(what: str, found: Tensor, expected: Tensor, allowed: Tensor | float) -> Verdict:
    """A result of numbers: each may be off by `allowed`, and by the rounding to its own dtype, which that includes."""
    if found.shape != expected.shape:
        return broken(what, f"has shape {list(found.shape)}, the reference {list(expected.shape)}")
    exact = not found.is_floating_point()
    wide, ideal = found.double(), expected.double()
    kind = grid.FLOATS.get(found.dtype)
    space = torch.ones_like(ideal) if kind is None else grid.spacing(ideal, *kind)
    return weigh(what, wide, ideal, (wide - ideal).abs(), torch.zeros_like(ideal) if exact else allowed, space)


def weigh(
    what: str, found: Tensor, expected: Tensor, error: Tensor, allowed: Tensor | float, space: Tensor | float
) -> Verdict:
    """The verdict on float64 `error` of elements that may be off by `allowed`."""
    if found.numel() == 0:
        return Verdict(what, 0.0, 0.0, 0.0)
    allowed, space = torch.as_tensor(allowed).expand_as(error), torch.as_tensor(space).expand_as(error)
    use = torch.where(error <= 0, 0.0, error / allowed)  # an error where none is allowed: infinite
    use = torch.where(found.isfinite() & expected.isfinite(), use, torch.inf)
    at = int(use.argmax()) if bool(use.any()) else int(error.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(at, device="cpu"), error.shape))
    norm = float(expected.norm()) or 1.0
    distance = float(found.flatten()[at] - expected.flatten()[at])
    why = "" if bool(found.isfinite().all()) else f"{int((~found.isfinite()).sum())} elements are not finite"
    return Verdict(
        what, float((found - expected).norm()) / norm, float(allowed.norm()) / norm, float(use.flatten()[at]), place,
        float(found.flatten()[at]), float(expected.flatten()[at]), abs(distance) / float(space.flatten()[at]), why,
    )  # fmt: skip


def judge_pair(what: str, codes: Tensor, scales: Tensor, text: str, x: Tensor, allowed: Tensor | float) -> Verdict:
    """A result in a layout: each number is what x rounds to, or a neighbour where x is within `allowed` of a midpoint.

    Args:
        x: float64, what the reference has before it rounds.
    """
    try:
        found, scale = grid.unpacked(codes, scales, text)
    except VerifyError as error:
        return broken(what, error.message)
    allowed = torch.as_tensor(allowed, dtype=torch.float64).expand_as(x)
    layout = grid.grid_of(text)
    wrong = _wrong_scale(scales, layout, x, allowed)
    expected, _ = grid.rounded(x, text)
    half = grid.grid_spacing(x, scale, layout) / 2
    if layout.scale == "float32":  # the scale, and the quotient, are rounded to float32 themselves
        half = half + 2.0**-22 * x.abs()
    # Only what is beyond half a spacing is the step's error: the format's own is not.
    beyond = torch.where(found == expected, 0.0, (found - x).abs() - half).clamp(min=0)
    beyond = torch.where((found != expected) & (allowed == 0), torch.maximum(beyond, half), beyond)
    spacing = 2 * half
    verdict = weigh(what, found, expected, beyond, allowed, spacing)
    undecided = torch.where(half - (x - expected).abs() <= allowed, spacing, 0.0) * (allowed > 0)
    verdict = replace(verdict, bound=float(undecided.norm()) / (float(expected.norm()) or 1.0))
    return replace(verdict, use=torch.inf, why=wrong) if wrong and verdict.ok else verdict


def _wrong_scale(scales: Tensor, layout: grid.Grid, x: Tensor, allowed: Tensor) -> str:
    """What is wrong with the scales for blocks whose elements are off by `allowed` at most; empty if nothing is."""
    amax, slack = grid.block_amax(x, layout), grid.block_amax(allowed, layout)
    found = grid.factors(scales, layout)
    round_off = 2.0**-22 if layout.scale == "float32" else 0.0
    low = grid.scale_of((amax - slack).clamp(min=0), layout) * (1 - round_off)
    high = grid.scale_of(amax + slack, layout) * (1 + round_off)
    low = torch.where(amax <= slack, 0.0, low)  # a block of zeros has scale 1, one of almost zeros the least there is
    outside = ~((found >= low) & (found <= torch.where(amax <= slack, high.clamp(min=1.0), high)))
    if not bool(outside.any()):
        return ""
    at = tuple(outside.nonzero()[0].tolist())
    return f"scale {list(at)} is {float(found[at]):g}, by the rule {float(grid.scale_of(amax, layout)[at]):g}"


def judge_records(what: str, body: Tensor, scales: Tensor, text: str, x: Tensor, allowed: Tensor | float) -> Verdict:
    """Packed cache rows: uint8 records [N, …] against float64 x [N, channels]."""
    rows = grid.row_grid_of(text)
    allowed = torch.as_tensor(allowed, dtype=torch.float64).expand_as(x)
    found = grid.unpacked_records(body, scales, text)
    verdicts = []
    if rows.grid is not None:
        codes = body[..., : rows.code_bytes].contiguous().view(rows.grid.code.stored[0])
        used = rows.scales * (1 if rows.grid.scale == "e8m0" else 4)
        kind = torch.float8_e8m0fnu if rows.grid.scale == "e8m0" else torch.float32
        pair = codes, scales[..., :used].contiguous().view(kind)
        narrow = slice(0, rows.narrow)
        verdicts.append(judge_pair(what, *pair, rows.grid.text, x[..., narrow], allowed[..., narrow]))
    if rows.wide:
        tail = x[..., rows.narrow :]
        half = grid.spacing(tail, 7, 2.0**-133) / 2
        error = ((found[..., rows.narrow :] - tail).abs() - half).clamp(min=0)
        expected = tail.float().bfloat16().double()
        verdict = weigh(what, found[..., rows.narrow :], expected, error, allowed[..., rows.narrow :], 2 * half)
        index = (*verdict.index[:-1], rows.narrow + verdict.index[-1]) if verdict.index else ()
        verdicts.append(replace(verdict, index=index))
    return worst(verdicts)


def judge_choice(what: str, found: Tensor, scores: Tensor, visible: Tensor, wanted: int, allowed: Tensor) -> Verdict:
    """Chosen rows [T, k] (-1: none) by float64 scores [T, n] of which the first `visible` [T] may be chosen.

    Args:
        allowed: [T, n], what each score may be off by: of two that are compared both may be.
    """
    if tuple(found.shape) != (expected := (scores.shape[0], wanted)):
        return broken(what, f"has shape {list(found.shape)}, the reference {list(expected)}")
    count = visible.clamp(max=wanted)
    picked, outside = found >= 0, (found < -1) | (found >= visible[:, None])
    if bool(outside.any()):
        token, choice = outside.nonzero()[0].tolist()
        return broken(
            what, f"token {token} chose row {int(found[token, choice])} of {int(visible[token])} that it may see"
        )
    rows = found.clamp(min=0).long()
    each = torch.zeros((found.shape[0], scores.shape[1] + 1), dtype=torch.int32)
    each.scatter_add_(1, torch.where(picked, rows, scores.shape[1]), torch.ones_like(rows, dtype=torch.int32))
    twice, few = (each[:, :-1] > 1).any(1), picked.sum(1) != count
    if bool((twice | few).any()):
        at = int((twice | few).nonzero()[0])
        some = ", some twice" if twice[at] else ""
        return broken(what, f"token {at} chose {int(picked[at].sum())} rows{some}; {int(count[at])} are wanted")
    hidden = torch.arange(scores.shape[1]) >= visible[:, None]
    order = scores.masked_fill(hidden, -torch.inf).argsort(dim=1, descending=True)
    kth = order.gather(1, (count.long() - 1).clamp(min=0)[:, None])
    lowest, allowed = scores.gather(1, kth), allowed.gather(1, kth) + allowed.gather(1, rows)
    chosen = torch.where(picked, scores.gather(1, rows), 0.0)
    best = torch.where(picked, lowest, 0.0)
    error = torch.where(picked, (best - chosen).clamp(min=0), 0.0)
    worth = torch.where(picked, torch.maximum(chosen, best), 0.0)
    return weigh(what, chosen, worth, error, allowed, grid.spacing(best, 23, 2.0**-149))


def worst(verdicts: list[Verdict]) -> Verdict:
    """The one that is furthest beyond its bound, or closest to it."""
    return max(verdicts, key=lambda v: (not v.ok, v.use, v.error))
