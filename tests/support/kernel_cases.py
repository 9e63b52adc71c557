"""Cases of kernels: an operator's arguments, its host function, and how near to the reference it must come.

A case runs in two lanes: `interp`, Triton's interpreter on the CPU (corrected, in a process of its own), and `gpu`.
Outputs are poisoned by the device; each case runs twice on equal inputs and must give equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atomc.codegen.device import Device
from atomc.formats import Layout, RowLayout, dequantize
from atomc.ops import OPS
from atomc.targets import get_target

NARROW = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8)
# Relative error (Frobenius) by dtype of a result; what is rounded to a format at the end is judged code by code.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-3}


# torch's own operators, and what they are applied to: by the name that a case gives them.
TORCH: dict[str, Any] = {}


def operator(name: str) -> Any:
    """An operator of a case: its reference, its overload and what it mutates."""
    return TORCH[name] if name in TORCH else OPS[name]


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        name: unique. op: the operator. host: its host function, `host(device, *arguments)`.
        make: fresh random arguments on the CPU, in the operator's order. tokens: of the bucket.
        layouts: of each (codes, scales) pair among the results, in order. rows: row layout of a cache that is written.
        tolerance: by dtype, where it differs from TOLERANCE; `gpu_tolerance` where the matrix unit sums more coarsely.
        same: results that are sets (top-k rows): compared sorted along the last dim.
        ties: of these, judges sets that differ on a GPU: `ties(arguments, found, expected)` raises where the matrix
            unit's sums do not explain it.
        slow: left out of the interpreter lane (too many programs); the gpu lane runs it.
    """

    name: str
    op: str
    host: Callable[..., Any]
    make: Callable[[], list[Any]]
    tokens: int = 16
    layouts: Sequence[str] = ()
    rows: str = ""
    tolerance: dict[torch.dtype, float] = field(default_factory=dict)
    gpu_tolerance: dict[torch.dtype, float] = field(default_factory=dict)
    same: bool = False
    ties: Callable[[list[Any], Tensor, Tensor], None] | None = None
    slow: bool = False


def as_on(target: str, host: Callable[..., Any]) -> Callable[..., Any]:
    """A host function that chooses as for another target: its configurations are correct, if not quick, everywhere."""

    def run(device: Device, *given: Any) -> Any:
        other = copy(device)
        other.target = get_target(target)
        return host(other, *given)

    return run


def check(case: Case, device: str, where: Device) -> dict[str, float]:
    """Run a case on `cpu` (interpreter) or `cuda`. Returns the largest error of each result; raises AssertionError."""
    torch.manual_seed(hash_of(case.name))
    arguments = case.make()
    expected, written = _run(lambda _, *a: operator(case.op).reference(*a), None, arguments, "cpu", case.op)
    where.tokens = case.tokens
    found, mine = _run(case.host, where, arguments, device, case.op)
    again, mine_again = _run(case.host, where, arguments, device, case.op)
    for a, b in zip((*found, *mine.values()), (*again, *mine_again.values()), strict=True):
        assert torch.equal(_bits(a), _bits(b)), f"{case.name}: two runs differ"
    limits = {**TOLERANCE, **case.tolerance, **(case.gpu_tolerance if device != "cpu" else {})}
    if case.ties is not None and device != "cpu" and not torch.equal(_sorted(found[0]), _sorted(expected[0])):
        assert (found[0].shape, found[0].dtype) == (expected[0].shape, expected[0].dtype), case.name
        case.ties(arguments, found[0].cpu(), expected[0])
        found, expected = found[1:], expected[1:]
    errors = _compare(case, found, expected, limits)
    for name, value in mine.items():
        if case.rows:
            layout = RowLayout.parse(case.rows)
            flat = torch.arange(value.shape[0] * layout.rows_of(value.shape[1]))
            # Page 0 takes padding entries, in any order.
            flat = flat[layout.rows_of(value.shape[1]) :]
            codes = layout.layout
            four = codes.columns if codes is not None and codes.element.bits == 4 else 0
            pair = layout.load(value.cpu(), flat), layout.load(written[name], flat)
            errors[name] = close_codes(*pair, case.name, four)
        else:
            errors[name] = close(value[1:], written[name][1:], limits, f"{case.name}: {name}")
    return errors


def _sorted(x: Tensor) -> Tensor:
    return x.cpu().sort(-1).values


def hash_of(name: str) -> int:
    """A seed of a name that is the same in every process."""
    seed = 0
    for c in reversed(name):
        seed = (31 * seed + ord(c)) % (1 << 31)
    return seed


def _run(
    host: Callable[..., Any], device: Device | None, arguments: list[Any], where: str, op: str
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results and written arguments of a run on copies."""
    given = [_copy(a, where) for a in arguments]
    result = host(device, *given)
    if where != "cpu":
        torch.cuda.synchronize()
    results = [] if result is None else list(result) if isinstance(result, (tuple, list)) else [result]
    names = [a.name for a in operator(op).overload._schema.arguments]
    return results, {n: given[names.index(n)] for n in operator(op).mutates}


def _copy(argument: Any, where: str) -> Any:
    if isinstance(argument, list):
        return [_copy(a, where) for a in argument]
    return argument.clone().to(where) if isinstance(argument, Tensor) else argument


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).cpu()


def _compare(
    case: Case, found: list[Tensor], expected: list[Tensor], limits: dict[torch.dtype, float]
) -> dict[str, float]:
    assert len(found) == len(expected), f"{case.name}: {len(found)} results, expected {len(expected)}"
    errors: dict[str, float] = {}
    layouts, at = iter(case.layouts), 0
    while at < len(expected):
        a, b = found[at], expected[at]
        assert a.shape == b.shape and a.dtype == b.dtype, (
            f"{case.name}: result {at} is {a.shape} {a.dtype}, not {b.shape} {b.dtype}"
        )
        if b.dtype in NARROW:
            layout = Layout.parse(next(layouts))
            pairs = [dequantize(p[at].cpu(), p[at + 1].cpu(), layout) for p in (found, expected)]
            four = layout.columns if layout.element.bits == 4 else 0
            errors[f"result {at}"] = close_codes(pairs[0], pairs[1], f"{case.name}: result {at}", four)
            at += 2
            continue
        errors[f"result {at}"] = close(a, b, limits, f"{case.name}: result {at}", case.same)
        at += 1
    return errors


def close(found: Tensor, expected: Tensor, limits: dict[torch.dtype, float], what: str, same: bool = False) -> float:
    """The relative error, which must be within the limit of the dtype; integers must be equal."""
    found = found.cpu()
    if not expected.is_floating_point():
        if same:
            found, expected = found.sort(-1).values, expected.sort(-1).values
        assert torch.equal(found, expected), f"{what}: {(found != expected).sum()} of {expected.numel()} differ"
        return 0.0
    a, b = found.double(), expected.double()
    hidden = b.isnan()
    assert torch.equal(a.isnan(), hidden), f"{what}: NaN where the reference has none, or the other way round"
    infinite = b.isinf()
    assert torch.equal(a[infinite], b[infinite]), f"{what}: an infinity of the reference is another value"
    a, b = a.masked_fill(hidden | infinite, 0), b.masked_fill(hidden | infinite, 0)
    error = float((a - b).norm() / b.norm().clamp(min=1e-30))
    assert error <= limits[expected.dtype], f"{what}: relative error {error:.2e}, at most {limits[expected.dtype]:.1e}"
    return error


def close_codes(found: Tensor, expected: Tensor, what: str, four: int = 0) -> float:
    """Almost all equal, others the next code: inputs that differ in the last bits round apart at a boundary.

    four: columns of a scale of e2m1 codes; the next code is then a step of the larger of both scales away. Else at most
    1/4, a step of the scale included (e4m3).
    """
    assert torch.equal(found.isnan(), expected.isnan()), (
        f"{what}: NaN where the reference has none, or the other way round"
    )
    a, b = found.nan_to_num(), expected.nan_to_num()
    share = float((a != b).float().mean())
    assert share < 0.03, f"{what}: {share:.1%} of the values differ"
    spread = b.abs().amax(-1, keepdim=True)
    near = next_e2m1(a, b, four) if four else 0.26 * b.abs() + 2**-6 * spread
    assert bool(((a - b).abs() <= near).all()), f"{what}: a value is off by more than a code"
    return share


def next_e2m1(a: Tensor, b: Tensor, columns: int) -> Tensor:
    """How far the next code is from values of e2m1 codes with a power of two for so many columns (the last: fewer)."""
    count = a.shape[-1]
    largest = F.pad(torch.maximum(a.abs(), b.abs()).double(), (0, -count % columns))
    groups = largest.unflatten(-1, (-1, columns))
    top = groups.amax(-1, keepdim=True).clamp(min=2.0**-120)
    scale = torch.exp2((top / 6).log2().ceil())  # a group's largest code is 3, 4 or 6
    step = torch.where(groups <= 2 * scale, 0.5, torch.where(groups <= 4 * scale, 1.0, 2.0)) * scale
    return step.flatten(-2)[..., :count]
