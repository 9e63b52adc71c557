"""The proof that ranks never wait for one another for ever: whatever each has to do, all issue the same collectives.

Contract: in every step, for all ranks and every state that they can be in, the collectives are equal in order: kind,
group, dtype, size and transport. Equality is one relation, so each rank in each state is compared with the first.

Terms:
    agreed  what all ranks know before a step, because they told one another: the rows of a message, whether any of
            them prefills, whether batches overlap, how many draft passes follow. Nothing else may choose what is run.
    state   what one rank alone has to do. Ranks along `tp` share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from atomc.artifact.check_ranks import Carried, Collective, CollectivesError, check_ranks
from atomc.artifact.expr import evaluate
from atomc.artifact.plan import DTYPE_BYTES, SYMBOLS, CallPlan, ProgramPlan, RegionPlan, of_batch
from atomc.artifact.ranks import KINDS, RanksPlan
from atomc.ops.placement import Mesh
from atomc.parallel.layout import LayoutError, parse_layout
from atomc.parallel.sizes import AGREED, HALVES, INDEX, STEP, bounds, half_rows, of_half

Load = Literal["real", "dummy", "empty"]
Phase = Literal["prefill", "decode", "mixed"]
PHASES: Final[tuple[Phase, ...]] = ("prefill", "decode", "mixed")


@dataclass(frozen=True)
class RankState:
    """What one rank has to do in a step: requests, a stand-in token, or nothing."""

    load: Load
    phase: Phase
    tokens: int


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of a step.

    Attributes:
        rows: of a message, at least every rank's tokens. prefill: some rank prefills. overlap: two batches.
        drafts: draft passes that follow.
    """

    rows: int
    prefill: bool
    overlap: bool = False
    drafts: int = 0

    def allows(self, state: RankState) -> bool:
        """Whether a rank can be in that state in such a step."""
        return state.tokens <= self.rows and (self.prefill or state.load != "real" or state.phase == "decode")


Runs = Callable[[int, RankState, Agreed], Sequence[str]]


@dataclass(frozen=True)
class Proof:
    """What was compared.

    Attributes:
        steps: kinds of steps that ranks can agree on. states: of a rank in them, over all ranks.
        longest: collectives in the longest step.
    """

    steps: int
    states: int
    longest: int


def states_of(buckets: Sequence[int]) -> list[RankState]:
    """The states that a rank can be in: every load and phase, at and below each bucket."""
    tokens = sorted({n for b in buckets for n in (1, max(b - 1, 1), b)})
    found = [RankState("real", phase, n) for phase in PHASES for n in tokens]
    return [*found, RankState("dummy", "decode", 1), RankState("empty", "decode", 0)]


def prove(
    sequences: Mapping[str, Sequence[Collective]], runs: Runs, mesh: Mesh, buckets: Sequence[int],
    overlap: Sequence[bool] = (False,), drafts: Sequence[int] = (0,),
) -> Proof:  # fmt: skip
    """That all ranks issue equal collectives, whatever each of them has to do.

    Args:
        sequences: graph -> its collectives. runs: (rank, its state, what is agreed) -> the graphs it runs, in order.
        buckets: rows that a step may agree on.
    Raises:
        CollectivesError: for each kind of disagreement the first rank and state.
    """
    problems: dict[str, str] = {}
    steps = compared = longest = 0
    issue = Issue(runs, sequences)
    for agreed in (Agreed(*facts) for facts in itertools.product(buckets, (False, True), overlap, drafts)):
        able = [s for s in states_of(buckets) if agreed.allows(s)]
        first = issue(0, able[0], agreed)
        steps, longest = steps + 1, max(longest, len(first.calls))
        for rank, state in itertools.product(range(mesh.ranks), able):
            other, alike = issue(rank, state, agreed), issue(0, state, agreed)  # these may be of one tp group
            compared, longest = compared + 1, max(longest, len(other.calls))
            for key, difference in _differences(first, alike, other):
                where = f"{first} and {other}, {_agreed(agreed)}"
                problems.setdefault(key, f"{where}: {difference}")
    if problems:
        raise CollectivesError("ranks disagree", list(problems.values()))
    return Proof(steps, compared, longest)


@dataclass(frozen=True)
class Issued:
    """What a rank issues in a state, with sizes in numbers."""

    rank: int
    state: RankState
    calls: Sequence[Collective]
    numbers: Sequence[tuple[int | str, ...]]

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.state.load}, {self.state.phase}, {self.state.tokens} tokens)"


@dataclass(frozen=True)
class Issue:
    """What ranks issue; of the same graphs with the same sizes worked out once."""

    runs: Runs
    sequences: Mapping[str, Sequence[Collective]]
    known: dict[tuple[tuple[str, ...], int, int], tuple[list[Collective], list[tuple[int | str, ...]]]] = field(
        default_factory=dict
    )

    def __call__(self, rank: int, state: RankState, agreed: Agreed) -> Issued:
        key = tuple(self.runs(rank, state, agreed)), state.tokens, agreed.rows
        if key not in self.known:
            calls = [c for name in key[0] for c in self.sequences[name]]
            sizes = {size: _numbers(size, agreed, state) for size in {c.size for c in calls}}
            self.known[key] = calls, [sizes[c.size] for c in calls]
        return Issued(rank, state, *self.known[key])


def _differences(first: Issued, alike: Issued, other: Issued) -> Iterator[tuple[str, str]]:
    """A key for the kind of difference, and what it is: of sizes along `tp` against a rank of the same state."""
    if other.calls is first.calls and other.numbers is first.numbers:
        return
    for at, (one, two) in enumerate(zip(first.calls, other.calls, strict=False)):
        if (one.kind, one.group, one.dtype, one.transport) != (two.kind, two.group, two.dtype, two.transport):
            yield f"{one}/{two}", f"collective {at} is {one} for the one, {two} for the other"
            return
        base = alike if one.group == "tp" else first
        if at < len(base.numbers) and base.numbers[at] != other.numbers[at]:
            sizes = f"{list(base.numbers[at])} for the one, {list(other.numbers[at])} for the other"
            yield f"{one}/{two}/size", f"collective {at}, {one}, has {sizes}"
            return
    if len(first.calls) != len(other.calls):
        most = max(first.calls, other.calls, key=len)
        rest = most[min(len(first.calls), len(other.calls))]
        yield (
            f"{rest}/alone",
            (f"{len(first.calls)} collectives against {len(other.calls)}: {rest} would wait for ever"),
        )


def _numbers(size: str, agreed: Agreed, state: RankState) -> tuple[int | str, ...]:
    """The size in numbers; what only one kind of rank has differs with its tokens. An index is the same in any state:
    that it is in no size of a collective is checked where the collective is."""
    symbols = dict.fromkeys((*SYMBOLS, *INDEX.values()), state.tokens) | {AGREED: agreed.rows}
    for half in HALVES:
        symbols |= {of_half(name, half): half_rows(symbols[name])[half] for name in (*STEP, AGREED)}
    return tuple(p if p.startswith("counted") else evaluate(p, symbols) for p in size.split(" x "))


def _agreed(agreed: Agreed) -> str:
    facts = [f"{agreed.rows} rows", "with prefill" if agreed.prefill else "decode alone"]
    facts += ["overlapped"] if agreed.overlap else []
    return ", ".join(facts + ([f"{agreed.drafts} draft passes"] if agreed.drafts else []))


# -- of an artifact ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proven:
    """What the ranks of a layout send one another, form -> collectives of a step in order, and the proof."""

    plan: RanksPlan
    collectives: dict[str, list[Collective]]
    proof: Proof

    def bytes_a_row(self, form: str) -> dict[str, int]:
        """Kind of collective -> bytes that a rank gives to it in a step of that form, for each row of a message.

        Of rows that are counted when they are sent: for each that is. What is sent whatever the rows are is not in it.
        """
        found: dict[str, int] = {}
        for c in self.collectives[form]:
            found[c.kind] = found.get(c.kind, 0) + bytes_of(c, 2) - bytes_of(c, 1)
        return {kind: size for kind, size in found.items() if size}


def bytes_of(collective: Collective, rows: int) -> int:
    """Bytes that a rank gives to a collective of a step of so many rows."""
    size, symbols = DTYPE_BYTES[collective.dtype], dict.fromkeys((*SYMBOLS, AGREED), rows)
    symbols |= {of_half(name, half): half_rows(rows)[half] for name in (*STEP, AGREED) for half in HALVES}
    for part in collective.size.split(" x "):
        size *= rows if part == "counted" else evaluate(part, symbols)
    return size


def prove_layout(
    plan: RanksPlan, whole: ProgramPlan, regions: Mapping[str, RegionPlan], buckets: Sequence[int]
) -> Proven:
    """Check the regions of a layout, and prove from its table of steps that all ranks issue the same collectives.

    Args:
        whole: the program of one rank. regions: all of the artifact. buckets: rows that a step may agree on.
    Raises:
        CollectivesError: a sum is used before it is taken, or ranks would wait for one another for ever.
    """
    if problems := [*_table_problems(plan, whole, regions)]:
        raise CollectivesError(f"layout {plan.layout}", problems)
    found = _checked(plan, regions)
    calls = {form: [c.region for c in known.calls] for form, known in plan.forms.items()}

    def runs(_rank: int, _state: RankState, agreed: Agreed) -> Sequence[str]:
        return calls[plan.form("prefill" if agreed.prefill else "decode", agreed.rows)]

    least = {other.least for other in plan.overlap.values()}  # of steps on either side of it
    rows = sorted({*buckets, *least, *(n - 1 for n in least)})
    proof = prove(found, runs, plan.mesh, [n for n in rows if 1 <= n <= plan.symbols[AGREED]])
    return Proven(plan, {form: [c for name in names for c in found[name]] for form, names in calls.items()}, proof)


def prove_layouts(
    plans: Iterable[RanksPlan], whole: ProgramPlan, regions: Mapping[str, RegionPlan], buckets: Sequence[int]
) -> list[Proven]:
    """`prove_layout` of each."""
    return [prove_layout(plan, whole, regions, buckets) for plan in plans]


def _table_problems(plan: RanksPlan, whole: ProgramPlan, regions: Mapping[str, RegionPlan]) -> Iterator[str]:
    """What makes a layout's forms others than the program of one rank, cut as the layout says."""
    try:
        layout = parse_layout(plan.layout)
    except LayoutError as error:
        yield f"its layout is none: {error}"
        return
    if plan.axes != list(layout.mesh.axes):
        yield f"its axes are {plan.axes}; the layout has {list(layout.mesh.axes)}"
        return
    counted, halves = 2 * layout.dp if "route" in plan.forms else 0, any(f.halves for f in plan.forms.values())
    if plan.symbols != (known := bounds(whole.symbols, layout.mesh, counted, halves)):
        wrong = sorted(n for n in plan.symbols.keys() | known if plan.symbols.get(n) != known.get(n))
        said = ", ".join(f"{n} {plan.symbols.get(n)}, not {known.get(n)}" for n in wrong)
        yield f"its symbols have other bounds than the layout: {said}"
    whole_forms = {name for name, form in plan.forms.items() if not form.halves}
    if sorted(plan.steps) != sorted(KINDS) or not set(plan.steps.values()) <= whole_forms:
        yield f"steps are {plan.steps}; each of {', '.join(KINDS)} needs one of the forms {sorted(whole_forms)}"
    for kind, other in plan.overlap.items():
        if other.form not in plan.forms.keys() - whole_forms or other.least < 2:
            given = f"{other.form} from {other.least} rows on"
            yield f"{kind} takes {given}; it needs one in two micro-batches, from 2 rows on"
        if layout.tbo == "off" or (layout.tbo == "prefill" and kind == "decode"):
            yield f"{kind} in two micro-batches; the layout says tbo={layout.tbo}"
    for kind, most in (("prefill", whole.symbols["T"]), ("decode", whole.symbols["B"])):
        asked = layout.tbo == "all" or layout.tbo == kind
        if asked and most > 1 and (kind not in plan.overlap or plan.overlap[kind].least != 2):
            yield f"{kind} is not in two micro-batches from 2 rows on; the layout says tbo={layout.tbo}"
    for name, form in plan.forms.items():
        both = zip(whole.calls, form.calls, strict=False)
        expected = [in_halves(w, regions.get(c.region)) if form.halves else w for w, c in both]
        ours, due = ([(c.prefix, c.binds) for c in calls] for calls in (form.calls, expected))
        if ours != due or len(due) != len(whole.calls):
            yield f"form {name} does not call for each layer what one rank calls"
            continue
        for region, theirs in {(a.region, b.region) for a, b in zip(form.calls, whole.calls, strict=True)}:
            if region not in regions or theirs not in regions:
                yield f"form {name} calls {region}, which is no region"
            else:
                yield from _weight_problems(plan, regions[region], regions[theirs])


def _checked(plan: RanksPlan, regions: Mapping[str, RegionPlan]) -> dict[str, list[Collective]]:
    """The collectives of each region, checked after every region that comes before it in a form."""
    found: dict[str, list[Collective]] = {}
    known: dict[tuple[str, frozenset[tuple[str, Carried]]], Mapping[str, Carried]] = {}
    for name, form in plan.forms.items():
        carried: Mapping[str, Carried] = {}
        for call in form.calls:
            key = call.region, frozenset(carried.items())
            if key not in known:
                checked = check_ranks(regions[call.region], plan, carried)
                found[call.region], known[key] = checked.collectives, checked.carried
            carried = known[key]
        if carried:
            raise CollectivesError(
                f"layout {plan.layout}, form {name}", [f"the last region hands over {sorted(carried)}"]
            )
    return found


def in_halves(call: CallPlan, region: RegionPlan | None) -> CallPlan:
    """A call of one rank with the values of two micro-batches, as far as a region takes them."""
    taken = set() if region is None else {i.name for i in region.inputs if i.role == "value"}
    both = [(of_batch(name, half), of_batch(value, half)) for name, value in call.binds.items() for half in HALVES]
    return CallPlan(call.region if region is None else region.name, call.prefix, {n: v for n, v in both if n in taken})


def _weight_problems(plan: RanksPlan, ours: RegionPlan, whole: RegionPlan) -> Iterator[str]:
    """Weights whose parts do not make up the whole."""
    known = {i.name: whole.slots[i.slot] for i in whole.inputs if i.role == "weight"}
    for item in ours.inputs:
        if item.role != "weight":
            continue
        shape: list[int | str] = list(ours.slots[item.slot].shape)
        for cut in plan.cuts.get(item.name, ()):
            if cut.axis in plan.mesh.names and 0 <= cut.dim < len(shape):
                shape[cut.dim] = int(shape[cut.dim]) * plan.mesh.size(cut.axis)
        if item.name not in known or shape != known[item.name].shape:
            said = known[item.name].shape if item.name in known else "not there"
            yield f"plan/{ours.name}.json: weight {item.name}: its parts make up {shape}; the whole is {said}"
