"""One step, judged: what it gave against its reference in float64 on the same arguments.

Pseudo-code, for an `atom` operator:
    nominal = reference in float64; jittered = the same with every input off by u (see `atomc.verify.wide`)
    each rounding inside: undecided values rounded the other way, one of each token at a time
    each result: judged within what jitter and undecided values move it (see `atomc.verify.bounds`)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from atomc.artifact.check_region import operator_of
from atomc.ops import OPS
from atomc.ops.pointwise import CREATIONS, GATHERS, VIEWS, parse
from atomc.ops.registry import NAMESPACE, written_by
from atomc.runtime.bind import resolve
from atomc.verify import bounds, grid, judge
from atomc.verify.errors import VerifyError
from atomc.verify.judge import Verdict
from atomc.verify.launched import Launched, device_of
from atomc.verify.wide import (
    HALF,
    Halvings,
    PackedRows,
    Rounding,
    Script,
    Trace,
    halvings_of,
    results_of,
    run_wide,
    widen,
    widen_dtype,
)  # fmt: skip

# Results that are choices: result -> the argument that says how many may be seen, if any.
CHOICES: Final = {"index_topk": 0, "index_rope_topk": 0, "route_topk": 1}

# Operators of a pointwise program that hand on numbers as they are.
MOVES: Final = VIEWS | CREATIONS | GATHERS | {"aten.contiguous.default"}


@dataclass(frozen=True)
class Observation:
    """A step that has run.

    Attributes:
        op: `namespace.name.overload`. arguments: by the schema's names, what is mutated as it was before.
        results: in the schema's order. mutated: argument -> what it is now.
        reserved: mutated arguments whose first page is nobody's: padding is written there.
        launched: how kernels of an artifact compute it; None where torch on the cpu did.
    """

    op: str
    arguments: dict[str, Any]
    results: tuple[Any, ...]
    mutated: dict[str, Tensor] = field(default_factory=dict)
    reserved: frozenset[str] = frozenset()
    launched: Launched | None = None

    @property
    def name(self) -> str:
        """The operator's name in its namespace."""
        return self.op.split(".")[1]

    def first_of(self, name: str) -> int:
        """The first page of a mutated argument that is judged."""
        return 1 if name in self.reserved else 0


def named_arguments(op: str, args: tuple[Any, ...] | list[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the operator's schema."""
    overload = operator_of(op)
    if overload is None:
        raise VerifyError(f"{op} is no operator of aten or atom.")
    names = [a.name for a in overload._schema.arguments if not a.kwarg_only]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def mutates(op: str) -> tuple[str, ...]:
    """Names of the arguments that an operator writes."""
    overload = operator_of(op)
    assert overload is not None
    return written_by(overload)


def copies_of_written(op: str, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copies of the tensors that an operator is going to write, by the names of its arguments."""
    return {n: arguments[n].clone() for n in mutates(op) if isinstance(arguments.get(n), Tensor)}


def observe(
    op: str, arguments: dict[str, Any], reserved: frozenset[str] = frozenset(), launched: Launched | None = None
) -> Observation:
    """Run a step as the plan does, on copies of what it writes."""
    if launched is not None:
        found, fresh = launched.run(arguments, mutates(op))
        return Observation(op, arguments, found, fresh, reserved, launched)
    fresh = copies_of_written(op, arguments)
    results = results_of(_call(resolve(op), op, arguments | fresh))
    return Observation(op, arguments, results, fresh, reserved)


def _call(function: Callable[..., Any], op: str, arguments: dict[str, Any]) -> Any:
    """Torch's own functions take what is positional by its place."""
    overload = operator_of(op)
    assert overload is not None
    order = [a.name for a in overload._schema.arguments if not a.kwarg_only and a.name in arguments]
    return function(*(arguments[n] for n in order), **{n: v for n, v in arguments.items() if n not in order})


def examine(seen: Observation) -> list[Verdict]:
    """A verdict on every result and on everything the step writes; several parts of one result are one verdict.

    Computed on the device that the observation's tensors are on.
    """
    with device_of((*seen.arguments.values(), *seen.results)):
        return _examine(seen)


def _examine(seen: Observation) -> list[Verdict]:
    if not seen.op.startswith(f"{NAMESPACE}."):
        return _examine_aten(seen)
    if seen.name == "dequantize":
        return [_examine_dequantize(seen)]
    return _Examination(seen).verdicts()


# -- aten --------------------------------------------------------------------------------------------------------------


def _examine_aten(seen: Observation) -> list[Verdict]:
    """Results that nobody uses (None) are not judged; what is written in place is judged as a result is."""
    function = operator_of(seen.op)
    assert function is not None
    wide = {name: widen_dtype(widen(value)) for name, value in seen.arguments.items()}
    now = wide | {name: wide[name].clone() for name in seen.mutated}
    pairs = dict(enumerate(zip(seen.results, results_of(_call(function, seen.op, now)), strict=True)))
    verdicts = [
        judge.compare(f"out {at}", found, ideal, _aten_bound(seen, function, wide, ideal, found))
        for at, (found, ideal) in pairs.items()
        if found is not None
    ]
    for name, found in seen.mutated.items():
        first = seen.first_of(name)
        bound = torch.as_tensor(_aten_bound(seen, function, wide, now[name], found)).expand(found.shape)
        verdict = judge.compare(name, found[first:], now[name][first:], bound[first:])
        verdicts.append(_moved_down(verdict, first))
    return verdicts


def _aten_bound(
    seen: Observation, function: Callable[..., Any], wide: dict[str, Any], ideal: Tensor, found: Tensor
) -> Tensor | float:
    op = bounds.functional(seen.op)
    if op in bounds.EXACT:
        return 0.0
    if op in bounds.CASTS:
        source = seen.arguments.get("src", next(v for v in seen.arguments.values() if isinstance(v, Tensor)))
        narrower = source.dtype != found.dtype and found.dtype in bounds.UNIT
        held = source.dtype in bounds.UNIT and bounds.UNIT[source.dtype] >= bounds.UNIT.get(found.dtype, 1.0)
        return grid.spacing(ideal, *grid.FLOATS[found.dtype]) / 2 if narrower and not held else 0.0
    if op in bounds.PRODUCTS:
        magnitudes = _call(function, seen.op, {n: v.abs() if isinstance(v, Tensor) else v for n, v in wide.items()})
        slack = bounds.product_bound(magnitudes, ideal, bounds.depth_of(op, wide.values()))
    else:  # one function of each element, or one we know nothing of: a few units, the reach of an argument reduction
        most = ideal.abs().amax() if ideal.numel() else 0.0
        slack = 8 * bounds.UNIT[torch.float32] * (ideal.abs() + 0.125 * most)
    return slack + bounds.half_spacing(ideal, slack, found.dtype)


def _examine_dequantize(seen: Observation) -> Verdict:
    """Stored numbers by their definition."""
    given = seen.arguments
    try:
        expected, _ = grid.unpacked(given["codes"], given["scales"], given["layout"])
    except VerifyError as error:
        return judge.broken("out 0", error.message)
    inexact = grid.grid_of(given["layout"]).scale == "float32"
    unit = bounds.UNIT[given["dtype"]]
    return judge.compare("out 0", seen.results[0], expected, unit * expected.abs() if inexact else 0.0)


# -- atom --------------------------------------------------------------------------------------------------------------


class _Examination:
    """An `atom` step: its reference's runs, and the verdicts that follow."""

    def __init__(self, seen: Observation) -> None:
        self.seen, self.reference = seen, OPS[seen.name].reference
        self.halvings, self.exact = Halvings(), False
        self.depth = bounds.depth_of(seen.op, seen.arguments.values())
        self.chosen: tuple[Tensor, ...] = ()
        self.moved: list[Trace] = []
        self.halved: list[Trace] = []
        self.summed: list[Trace] = []
        self.flips: list[Trace] = []

    def verdicts(self) -> list[Verdict]:
        found: dict[str, list[Verdict]] = {}
        for verdict in self._parts():
            found.setdefault(verdict.what, []).append(verdict)
        return [judge.worst(parts) for parts in found.values()]

    def _parts(self) -> Iterator[Verdict]:
        choice = CHOICES.get(self.seen.name)
        if choice is not None:
            verdict = self._choice(choice)
            yield verdict
            if len(self.seen.results) == 1 or verdict.why:
                return
            self.chosen = (self.seen.results[choice],)  # what follows from the choice is judged for the choice made
        self._run()
        for number, result in enumerate(self.seen.results):
            if number != choice and result is not None:
                yield self._result(number, result)
        for name, found in self.seen.mutated.items():
            yield from self._written(name, found)

    def _run(self) -> None:
        seen = self.seen
        self.nominal = self._wide(Script(chosen=self.chosen))
        # After a first run, which fills the caches of constants: the runs that follow make the same calls.
        if bounds.in_16_bits((*seen.arguments.values(), *seen.results, *seen.mutated.values())):
            rounded = bounds.rounded_by_kernels(seen.name, seen.arguments) if seen.launched else {}
            self.halvings = halvings_of(self.reference, seen.arguments, tuple(seen.mutated), rounded)
        # A rounding alone has nothing before it that could be off, and a copy nothing at all.
        copies = seen.name in bounds.COPIES and not any(self.halvings.units)
        self.exact = copies or seen.name in bounds.ROUNDINGS or _moves_only(seen)
        if self.exact:
            return
        frozen = tuple(r.values for r in self.nominal.roundings)
        chosen, u = self.chosen or tuple(self._indices()), bounds.UNIT[torch.float32]
        self.moved = [self._wide(Script(u, seed, frozen, chosen)) for seed in range(bounds.JITTERS)]
        if seen.launched is not None and bounds.loses_sums(seen.name, seen.launched.target):
            self.summed = [self._wide(Script(0.0, 0, frozen, chosen, sums=sign)) for sign in (1, -1)]
        if any(self.halvings.units):
            units = self.halvings.units
            scripts = [Script(0.0, seed, frozen, chosen, units) for seed in range(bounds.HALVED_JITTERS)]
            scripts.append(Script(0.0, 0, frozen, chosen, units, nearest=True))
            self.halved = [self._wide(script) for script in scripts]
        self.flips = list(self._flipped(frozen))

    def _wide(self, script: Script) -> Trace:
        return run_wide(self.reference, self.seen.arguments, tuple(self.seen.mutated), script)

    def _indices(self) -> Iterator[Tensor]:
        """A jittered run chooses what the nominal one did: its own near ties say nothing of rounding."""
        if self.seen.name == "route_topk":
            k = self.seen.arguments["k"]
            yield from (scores.topk(k, dim=-1).indices for scores in self.nominal.choices)

    # -- values that are rounded inside --------------------------------------------------------------------------------

    def _flipped(self, frozen: tuple[Tensor, ...]) -> Iterator[Trace]:
        """Runs in which undecided roundings that the result depends on went the other way."""
        for number, rounding in enumerate(self.nominal.roundings):
            if any(rounding.values is r for r in self.nominal.results):
                continue  # a result itself, judged as such
            for values in _other_ways(rounding, self._slack_of(number)):
                replaced = (*frozen[:number], values, *frozen[number + 1 :])
                yield self._wide(Script(0.0, 0, replaced, self.chosen or tuple(self._indices())))

    def _slack_of(self, number: int) -> Tensor:
        """What a value that is going to be rounded may be off by."""
        return self._slack(lambda t: t.roundings[number].x, self.halvings.quantized, flips=False)

    def _slack(
        self, part: Callable[[Trace], Tensor], dtype: torch.dtype, flips: bool = True, depth: int | None = None
    ) -> Tensor:
        """What a value of the reference may be off by in a step that holds it in `dtype`; `depth`: of its sums."""
        nominal = part(self.nominal)
        if self.exact or not nominal.is_floating_point():
            return torch.zeros_like(nominal)
        slack = bounds.moved_bound(nominal, [part(t) for t in self.moved], depth or self.depth)
        slack = slack + bounds.halved_bound(nominal, [part(t) for t in self.halved], HALF.get(dtype, 0.0))
        slack = slack + bounds.summed_bound(nominal, [part(t) for t in self.summed])
        if flips:
            slack = slack + bounds.flipped_bound(nominal, [part(t) for t in self.flips])
        return slack + bounds.half_spacing(nominal, slack, dtype)

    # -- results -------------------------------------------------------------------------------------------------------

    def _result(self, number: int, found: Tensor) -> Verdict:
        what = f"out {number}"
        for at, rounding in enumerate(self.nominal.roundings):
            if self.nominal.results[number] is rounding.values or self.nominal.results[number] is rounding.scales:
                codes = next(i for i, r in enumerate(self.nominal.results) if r is rounding.values)
                pair = self.seen.results[codes], self.seen.results[codes + 1]
                return judge.judge_pair(f"out {codes}", *pair, rounding.text, rounding.x, self._slack_of(at))
        expected = self.nominal.results[number]
        if self.seen.name == "pack_rows":
            rows = grid.row_grid_of(self.seen.arguments["rows"])
            body, scales = found[:, : rows.body_bytes], found[:, rows.body_bytes :]
            return judge.judge_records(what, body, scales, rows.text, self.nominal.packed[0].x, 0.0)
        depth = bounds.mixed_depth(self.seen.name, number, self.seen.arguments)
        slack = self._slack(lambda t: t.results[number], found.dtype, depth=depth)
        return judge.compare(what, found, expected, slack)

    def _choice(self, number: int) -> Verdict:
        self._run()
        found, given = self.seen.results[number], self.seen.arguments
        scores = self._scores(self.nominal)
        if self.seen.name == "route_topk":
            visible, wanted = torch.full(found.shape[:1], scores.shape[1]), given["k"]
        else:
            visible, wanted = (given["positions"].long() + 1) // given["ratio"], given["topk"]

        def finite(trace: Trace) -> Tensor:
            found = self._scores(trace)
            return found.masked_fill(found.isinf(), 0.0)

        slack = self._slack(finite, torch.float32)
        return judge.judge_choice(f"out {number}", found, scores, visible, wanted, slack)

    def _scores(self, trace: Trace) -> Tensor:
        """[T, n] of all recorded choices; the reference leaves out requests of which nothing can be seen yet."""
        given = self.seen.arguments
        if "query_start" not in given:
            return trace.choices[0]
        tokens, wide = given["positions"].shape[0], max((c.shape[1] for c in trace.choices), default=1)
        out = torch.full((tokens, wide), -torch.inf, dtype=torch.float64)
        visible, starts = (given["positions"] + 1) // given["ratio"], given["query_start"].tolist()
        rows = [t for a, b in itertools.pairwise(starts) if b > a and visible[b - 1] for t in range(a, b)]
        at = 0
        for choice in trace.choices:
            out[torch.tensor(rows[at : at + len(choice)]), : choice.shape[1]] = choice
            at += len(choice)
        return out

    # -- what is written -----------------------------------------------------------------------------------------------

    def _written(self, name: str, found: Tensor) -> Iterator[Verdict]:
        first = self.seen.first_of(name)
        if self.nominal.packed and found.dtype == torch.uint8:
            yield from self._packed(name, found, self.nominal.packed[0], first)
            return
        expected = self.nominal.mutated[name]
        slack = self._slack(lambda t: t.mutated[name][first:], found.dtype)
        slack = torch.where(expected[first:] == self.seen.arguments[name][first:].double(), 0.0, slack)
        verdict = judge.compare(name, found[first:], expected[first:], slack)
        yield _moved_down(verdict, first)

    def _packed(self, name: str, found: Tensor, rows: PackedRows, first: int) -> Iterator[Verdict]:
        """Rows written: as the format rounds them. All else: the bytes as they were."""
        text = rows.text
        body, scales = grid.records_of(found, text)
        count = body.shape[1]
        places = torch.cat(rows.places) if rows.places else torch.empty(0, dtype=torch.long)
        ours = places >= first * count
        places = places[ours]
        before = self.nominal.mutated[name].clone() if not rows.x.numel() else self.seen.arguments[name].clone()
        page, row = places // count, places % count
        if rows.x.numel():
            x, slack = rows.x[ours], self._slack(lambda t: t.packed[0].x, self.halvings.quantized, flips=False)[ours]
            at = (body[page, row], scales[page, row])
            for part, records in zip(grid.records_of(before, text), at, strict=True):
                part[page, row] = records
            if len(places):
                yield judge.judge_records(name, *at, text, x, slack)
        yield _moved_down(judge.compare(name, found[first:], before[first:], 0.0), first)


def _moves_only(seen: Observation) -> bool:
    """Whether a pointwise program only gathers, repeats or makes constants."""
    if seen.name != "pointwise":
        return False
    return all(line.op in MOVES for line in parse(seen.arguments["program"]).lines)


def _moved_down(verdict: Verdict, first: int) -> Verdict:
    """With the page number counted from the reserved one."""
    return replace(verdict, index=(verdict.index[0] + first, *verdict.index[1:])) if verdict.index else verdict


def _other_ways(rounding: Rounding, slack: Tensor) -> Iterator[Tensor]:
    """The values of a rounding with undecided ones rounded the other way: of each token one in each run.

    The furthest first; what is left after `MOST_FLIPS` runs, small ones, or a block whose scale is undecided, together.
    """
    layout = grid.grid_of(rounding.text)
    # A power of two may be undecided itself; another scale moves with what it is made of, which is no rounding.
    scale = rounding.scales if layout.scale == "float32" else None
    up, down = (grid.rounded(rounding.x + sign * slack, rounding.text, scale)[0] for sign in (1, -1))
    other = torch.where(up != rounding.values, up, down)
    distance = (other - rounding.values).abs().flatten(1)
    order = distance.argsort(dim=1, descending=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    rank = torch.where(distance > 0, rank, order.shape[1]).view(other.shape)
    most = int((distance > 0).sum(1).max())
    for number in range(min(most, bounds.MOST_FLIPS)):
        now = rank == number if number < bounds.MOST_FLIPS - 1 else (rank >= number) & (rank < order.shape[1])
        yield torch.where(now, other, rounding.values)
