"""The proof that no rank computes with half a sum: a region's steps, checked as the ranks of a layout run them.

Contract: on every mesh axis, the placements of a region's inputs carried along its steps by the rules of the operators
end where the region promises; every step gives the shapes and dtypes that the plan says; each collective runs over the
group that it needs, is waited for once and read, and has sizes on which the ranks of its group agree; a rank's own
experts and rows are those of its place on the mesh.

Terms:
    own     a size that a rank alone knows: its tokens (`T`), its requests. Along `tp` the ranks share them.
    agreed  what all ranks know before a step: the rows of a message (`P`). No other size of a rank may be in a
            collective over `dp`.
    carried what a region in two micro-batches hands to the next one: a collective that is under way, what it was given,
            and what the steps after it read. Its placements go from the one check to the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch

from atomc.artifact.check_region import operator_of
from atomc.artifact.expr import evaluate, names_in
from atomc.artifact.order import owners_of, touches
from atomc.artifact.plan import CARRIED, PROBES, DType, RegionPlan, Size, Slot, Step, slots_of
from atomc.artifact.ranks import RanksPlan
from atomc.artifact.shapes import like, results_of
from atomc.errors import ProblemsError
from atomc.ops.placement import REPLICATE, Call, Operand, Placement, PlacementError, Shard
from atomc.ops.placement import Size as Number
from atomc.ops.placement_exchange import EXPERTS
from atomc.ops.placement_rules import propagate
from atomc.parallel.kinds import KINDS, NAMESPACE, WAIT, Kind, placed
from atomc.parallel.layout import parse_layout
from atomc.parallel.sizes import AGREED, COUNTED, HALVES, INDEX, of_half

HOST_SIZES: Final = "atom.host_sizes.default"


class CollectivesError(ProblemsError):
    """Ranks would hang, or compute with parts of sums; each problem names the step and the model's line."""

    exit_code = 7
    headline = "{where}: {count} problem{s} with collectives"


@dataclass(frozen=True)
class Collective:
    """One collective as every rank of its group has to issue it.

    Attributes:
        size: rows and the rest, expressions. transport: `live`, or `replayed` from a captured graph: the two do not
            meet. where: the step, for messages.
    """

    kind: Kind
    group: str
    dtype: str
    size: str
    transport: Literal["live", "replayed"] = "live"
    where: str = field(compare=False, default="?")

    def __str__(self) -> str:
        how = "" if self.transport == "live" else f", {self.transport}"
        return f"{self.kind} of {self.size} {self.dtype} over {self.group}{how} ({self.where})"


def collectives_of(region: RegionPlan) -> list[Collective]:
    """The collectives of a region in order, with sizes in symbols."""
    return [_collective(region, at, step) for at, step in enumerate(region.steps) if step.op in KINDS]


def _collective(region: RegionPlan, at: int, step: Step) -> Collective:
    info = region.slots[_slot(step.args[0])]
    rows, *rest = map(str, info.shape)
    if KINDS[step.op] == "all_to_all" and any(isinstance(n, Size) for n in _list(step.args[1])):
        rows = "counted"
    return Collective(
        KINDS[step.op], str(step.args[-1]), info.dtype, " x ".join([rows, *rest]),
        where=f"{region.name}, step {at}, {step.source}",
    )  # fmt: skip


@dataclass(frozen=True)
class Carried:
    """Something that a region hands to the next one.

    Attributes:
        placements: on each axis of the mesh, in order. under_way: it is what a collective gives, not waited for yet.
    """

    placements: tuple[Placement, ...]
    under_way: bool = False


@dataclass(frozen=True)
class Checked:
    """The collectives of a region in order, and what it hands to the next one, by name."""

    collectives: list[Collective]
    carried: Mapping[str, Carried]


def check_ranks(region: RegionPlan, plan: RanksPlan, given: Mapping[str, Carried] | None = None) -> Checked:
    """A region's collectives; `given`: what the region before it hands to it.

    Raises:
        CollectivesError: all that is wrong with it.
    """
    check = _Check(region, plan, given or {})
    problems = [*check.shapes(), *check.handed()]  # what the rest relies on
    if not problems:
        problems = [
            *(p for axis in plan.mesh.names for p in check.placements(axis)),
            *check.uses(), *check.exchanges(), *check.messages(), *check.owners(), *check.halves(),
        ]  # fmt: skip
    if problems:
        raise CollectivesError(f"plan/{region.name}.json", list(dict.fromkeys(problems)))
    return Checked(collectives_of(region), check.carried())


def _slot(arg: Any) -> int:
    assert isinstance(arg, Slot), arg
    return arg.id


def _list(arg: Any) -> list[Any]:
    return arg if isinstance(arg, list) else []


@dataclass
class _Check:
    region: RegionPlan
    plan: RanksPlan
    given: Mapping[str, Carried]
    known: dict[str, dict[int, Placement]] = field(default_factory=dict)  # axis -> slot -> its placement
    made: dict[int, tuple[int, Step]] = field(init=False)  # slot -> the step that makes it
    readers: dict[int, list[Step]] = field(init=False)
    owner: list[int] = field(init=False)  # slot -> that whose storage it has

    def __post_init__(self) -> None:
        self.owner = owners_of(self.region.slots)
        steps = [*self.region.prepare, *self.region.steps]
        self.made = {s: (at, step) for at, step in enumerate(steps) for s in step.outputs if s is not None}
        self.readers = {}
        for step in steps:
            for arg in (*step.args, *step.kwargs.values()):
                for one in arg if isinstance(arg, list) else [arg]:
                    if isinstance(one, Slot):
                        self.readers.setdefault(one.id, []).append(step)

    def at(self, step: Step) -> str:
        names = [self.region.slots[s].name for s in step.outputs if s is not None]
        return f"{', '.join(names) or step.op} ({step.op}, {step.source})"

    def read_by(self, step: Step) -> list[Step]:
        """The steps that read a step's one result."""
        slot = step.outputs[0]
        return [] if slot is None else self.readers.get(slot, [])

    def steps(self, *ops: str) -> list[Step]:
        return [step for step in self.region.steps if step.op in ops]

    # -- shapes --------------------------------------------------------------------------------------------------------

    def shapes(self) -> Iterator[str]:
        """Each step once more: what it gives is what the plan says, at two sets of sizes."""
        for probe in PROBES:
            for step in (*self.region.prepare, *self.region.steps):
                op = operator_of(step.op)
                if op is None or step.op == HOST_SIZES:
                    continue  # the one was refused before, the other gives numbers
                try:
                    found = results_of(op, step, self.region, probe)
                except Exception as error:  # noqa: BLE001  whatever an operator says to arguments that do not fit
                    yield f"{self.at(step)}: does not run: {(str(error) or repr(error)).splitlines()[0]}"
                    continue
                for slot, (shape, dtype) in zip(step.outputs, found, strict=True):
                    if slot is not None and (shape, dtype) != like(self.region.slots[slot], probe):
                        said = f"{self.region.slots[slot].shape} {self.region.slots[slot].dtype}"
                        yield f"{self.at(step)}: gives {list(shape)} {dtype} where the plan says {said}"

    # -- placements ----------------------------------------------------------------------------------------------------

    def handed(self) -> Iterator[str]:
        """What the region before hands over is what this one takes, no less: its memory is in use until then."""
        taken = {i.name for i in self.region.inputs if i.name.startswith(CARRIED)}
        if taken != self.given.keys():
            yield f"it takes {sorted(taken)} of the region before, which hands over {sorted(self.given)}"

    def under_way(self) -> set[int]:
        """Slots of collectives that the region before started."""
        started = {name for name, known in self.given.items() if known.under_way}
        return {i.slot for i in self.region.inputs if i.name in started}

    def left(self, step: Step) -> bool:
        """Whether a collective is left for the next region to wait for."""
        handed = [slot for name, slot in self.region.outputs.items() if name.startswith(CARRIED)]
        return step.outputs[0] in handed and not self.read_by(step)

    def carried(self) -> dict[str, Carried]:
        """What the region hands to the next, when its placements are known."""
        found = {}
        for name, slot in self.region.outputs.items():
            if name.startswith(CARRIED):
                started = slot in self.made and self.made[slot][1].op in KINDS
                found[name] = Carried(tuple(self.known[axis][slot] for axis in self.plan.mesh.names), started)
        return found

    def placements(self, axis: str) -> Iterator[str]:
        """Where the rules do not go through; the first on an axis, as the rest would follow from it."""
        own: Placement = Shard(0) if axis == "dp" else REPLICATE
        known: dict[int, Placement] = {
            i.slot: self.plan.placement(i.name, axis) if i.role == "weight" else own for i in self.region.inputs
        }
        at = self.plan.mesh.names.index(axis)
        known |= {i.slot: self.given[i.name].placements[at] for i in self.region.inputs if i.name in self.given}
        self.known[axis] = known
        for step in (*self.region.prepare, *self.region.steps):
            try:
                found = self.place(step, known, axis)
            except PlacementError as error:
                yield f"{self.at(step)}: along {axis}: {error}"
                return
            known.update({s: p for s, p in zip(step.outputs, found, strict=True) if s is not None})
        for name, slot in self.region.outputs.items():
            if known[slot] != own and not name.startswith(CARRIED):
                by = self.at(self.made[slot][1]) if slot in self.made else "an input"
                yield f"result {name}, {by}: it is {known[slot]} along {axis}; it has to be {own}"

    def place(self, step: Step, known: Mapping[int, Placement], axis: str) -> tuple[Placement, ...]:
        if step.op == HOST_SIZES:
            return ()
        if step.op == WAIT:
            return (known[_slot(step.args[0])],)
        if step.op in KINDS:
            return (placed(KINDS[step.op], known[_slot(step.args[0])], step.args[-1] == axis),)
        results = tuple(self.shape(s) if s is not None else () for s in step.outputs)
        found = propagate(Call(step.op, tuple(self.argument(a, known, axis) for a in _positional(step)), results))
        return found[: len(step.outputs)]

    def shape(self, slot: int) -> tuple[int, ...]:
        return tuple(evaluate(n, PROBES[0]) for n in self.region.slots[slot].shape)

    def argument(self, arg: Any, known: Mapping[int, Placement], axis: str) -> Any:
        match arg:
            case list():
                return tuple(self.argument(a, known, axis) for a in arg)
            case Slot(id=slot):
                return Operand(known[slot], self.shape(slot), getattr(torch, self.region.slots[slot].dtype))
            case Size(expr=text):
                return Number(_is_own(text, axis), evaluate(text, PROBES[0]))
            case DType(name=name):
                return getattr(torch, name)
        return arg

    # -- collectives ---------------------------------------------------------------------------------------------------

    def uses(self) -> Iterator[str]:
        """Groups, their sizes, reductions, waits, and sizes that only one rank knows."""
        mesh = self.plan.mesh
        for step in self.region.prepare:
            if step.op.startswith(NAMESPACE):
                yield f"{self.at(step)}: a collective while weights are prepared"
        for slot in self.under_way():
            if [r.op for r in self.readers.get(slot, [])] != [WAIT] or slot in self.region.outputs.values():
                yield f"{self.region.slots[slot].name}: the region before started it; it is not waited for once here"
        for step in self.steps(WAIT):
            source = self.made.get(_slot(step.args[0]))
            if (source is None or source[1].op not in KINDS) and _slot(step.args[0]) not in self.under_way():
                yield f"{self.at(step)}: waits for what is no collective"
            if not self.read_by(step) and step.outputs[0] not in self.region.outputs.values():
                yield f"{self.at(step)}: what it waits for is read by nobody"
        for step in self.steps(*KINDS):
            kind, group = KINDS[step.op], str(step.args[-1])
            if group not in mesh.names:
                yield f"{self.at(step)}: {kind} over {group!r}; the mesh has {', '.join(mesh.names)}"
                continue
            if self.left(step):
                held = {self.owner[s] for name, s in self.region.outputs.items() if name.startswith(CARRIED)}
                if self.owner[_slot(step.args[0])] not in held:
                    yield f"{self.at(step)}: {kind} is left to the next region, and what it was given is not"
            elif [r.op for r in self.read_by(step)] != [WAIT]:
                yield f"{self.at(step)}: {kind} is not waited for once, before it is read"
            if kind in ("all_gather", "reduce_scatter") and step.args[-2] != mesh.size(group):
                yield f"{self.at(step)}: {kind} among {step.args[-2]} ranks; {group} has {mesh.size(group)}"
            rows = self.region.slots[_slot(step.args[0])].shape[0]
            if kind == "reduce_scatter" and any(evaluate(rows, p) % mesh.size(group) for p in PROBES):
                yield f"{self.at(step)}: {rows} rows cannot be shared out equally among {mesh.size(group)} ranks"
            if kind in ("reduce_scatter", "all_reduce"):
                yield from self.reduction(step)
            yield from (f"{self.at(step)}: {p}" for p in self.sizes(step))

    def reduction(self, step: Step) -> Iterator[str]:
        """Sums of parts are in float32; those of one part and zeros may be in any floating dtype."""
        if step.args[1] != "sum":
            yield f"{self.at(step)}: {KINDS[step.op]} takes {step.args[1]!r}; what is due is a sum"
        source, dtype = _slot(step.args[0]), getattr(torch, self.region.slots[_slot(step.args[0])].dtype)
        exact = source in self.made and self.made[source][1].op == "atom.vocabulary_embedding.default"
        if not (dtype.is_floating_point if exact else dtype == torch.float32):
            yield f"{self.at(step)}: {KINDS[step.op]} sums parts in {dtype}; it has to be float32"

    def sizes(self, step: Step) -> Iterator[str]:
        one = _collective(self.region, 0, step)
        own = {n for n in names_in(one.size.replace(" x ", " + ").replace("counted", "0")) if _is_own(n, one.group)}
        if own:
            names = ", ".join(sorted(own))
            yield f"{one.kind} over {one.group} of {one.size}: {names} is the rank's own, which the others do not know"

    def exchanges(self) -> Iterator[str]:
        """Rows that a rank sends and expects: by counts that it has sent before, to the same group."""
        for step in self.steps(*(op for op, kind in KINDS.items() if kind == "all_to_all")):
            group = str(step.args[-1])
            receive, send = _list(step.args[1]), _list(step.args[2])
            size = self.plan.mesh.size(group)
            if {len(receive), len(send)} != {size}:
                yield f"{self.at(step)}: all_to_all of {len(receive)} and {len(send)} parts; {group} has {size} ranks"
                continue
            rows = self.region.slots[_slot(step.args[0])].shape[0]
            if any(sum(_number(n, p) for n in send) != evaluate(rows, p) for p in PROBES):
                yield f"{self.at(step)}: all_to_all sends by sizes that are not those of its rows"
            if not any(isinstance(n, Size) for n in (*receive, *send)):
                if len({*receive, *send}) != 1:
                    yield f"{self.at(step)}: all_to_all of fixed sizes {send} against {receive}: no two ranks agree"
                continue
            ends = self.counts(receive), self.counts(send)
            if None in ends or not any(self.exchanged(a, group) == b for a, b in (ends, ends[::-1])):
                yield f"{self.at(step)}: all_to_all whose sizes were not exchanged with the ranks of {group}"

    def counts(self, sizes: list[Any]) -> int | None:
        """The slot of the counts behind sizes, all of them in order."""
        names = [n.expr for n in sizes if isinstance(n, Size)]
        return next((_slot(s.args[0]) for s in self.steps(HOST_SIZES) if s.sizes == names), None)

    def exchanged(self, counts: int | None, group: str) -> int | None:
        """The slot that a rank sent to learn these counts."""
        if counts is None or counts not in self.made or (wait := self.made[counts][1]).op != WAIT:
            return None
        start = self.made[_slot(wait.args[0])][1]
        return _slot(start.args[0]) if KINDS.get(start.op) == "all_to_all" and start.args[-1] == group else None

    # -- messages and owners -------------------------------------------------------------------------------------------

    def messages(self) -> Iterator[str]:
        """A message is taken apart as it was put together: that which a collective brought."""
        packs, unpacks = self.steps("atom.pack_message.default"), self.steps("atom.unpack_message.default")
        if len(packs) != len(unpacks):
            yield f"{len(packs)} messages are packed and {len(unpacks)} unpacked"
        for unpack in unpacks:
            pack = self.sent(_slot(unpack.args[0]))
            if pack is None or pack.op != "atom.pack_message.default":
                yield f"{self.at(unpack)}: takes apart what no collective brought of a message"
                continue
            infos = [self.region.slots[_slot(a)] for a in _list(pack.args[0])]
            sent = [(_product(i.shape[1:]), i.dtype) for i in infos]
            dtypes = [d.name for d in _list(unpack.args[2])]
            if sent != list(zip(_list(unpack.args[1]), dtypes, strict=False)):
                yield f"{self.at(unpack)}: takes a message apart otherwise than it was put together ({sent})"

    def sent(self, slot: int) -> Step | None:
        """The step that made what a collective brought, or what was sorted for it; None where none brought it."""
        for ops in ((WAIT,), tuple(KINDS)):
            if slot not in self.made or self.made[slot][1].op not in ops:
                return None
            slot = _slot(self.made[slot][1].args[0])
        if slot in self.made and self.made[slot][1].op == "atom.dispatch_rows.default":
            slot = _slot(self.made[slot][1].args[0])
        return self.made[slot][1] if slot in self.made else None

    def halves(self) -> Iterator[str]:
        """Of two micro-batches the second finds the state as the first left it: a request may be in both."""
        if not self.region.halves:
            return
        of: dict[int, set[int]] = {}  # slot -> the halves that it depends on
        for item in (i for i in self.region.inputs if i.role in ("batch", "value")):
            own = 1 if item.name.startswith(CARRIED) else int(item.name.rpartition(".")[2])
            of[item.slot] = {own}
        states = {i.slot for i in self.region.inputs if i.role == "state"}
        second: dict[int, tuple[bool, Step]] = {}  # state -> its first use by the second half, or first write
        for step in self.region.steps:
            given, written = touches(step, self.owner)
            halves = set().union(*(of.get(s, set()) for s in slots_of(step) if self.owner[s] not in states))
            if len(halves) > 1:
                yield f"{self.at(step)}: computes with both halves"
            for slot in step.outputs:
                if slot is not None:
                    of[slot] = set(halves)
            for state in given & states:
                writes = state in written
                if 0 in halves and state in second and (writes or second[state][0]):
                    name = self.region.slots[state].name
                    yield f"{self.at(step)}: the first half uses {name} after the second ({self.at(second[state][1])})"
                elif 1 in halves and not second.get(state, (False, step))[0]:
                    second[state] = writes, second[state][1] if state in second and not writes else step

    def owners(self) -> Iterator[str]:
        """Which experts, and which rows of the vocabulary, a rank has: by its place on the mesh."""
        mesh, held = self.plan.mesh, self.experts_held()
        whole = "ep" if self.steps("atom.local_experts.default", "atom.sort_by_rank.default") else "tp"
        if held and whole != (said := parse_layout(self.plan.layout).moe):
            yield f"experts are shared as with moe={whole}; the layout says moe={said}"
        for step in self.steps("atom.local_experts.default", "atom.sort_by_rank.default"):
            first, rest = step.args[1], step.args[2:]
            per = rest[-2] if len(rest) == 3 else rest[0]
            if {per} != held:
                yield f"{self.at(step)}: counts {per} experts of a rank; its weights hold {sorted(held)}"
            elif wrong := [r for r in range(mesh.ranks) if _number(first, self.index(r)) != r * int(str(per))]:
                yield f"{self.at(step)}: rank {wrong[0]}'s first expert is {_number(first, self.index(wrong[0]))}"
            if len(rest) == 3 and (rest[0], rest[2]) != (
                mesh.size("dp"),
                int(str(per)) * mesh.ranks // mesh.size("dp"),
            ):
                yield f"{self.at(step)}: sorts for {rest[0]} ranks of {rest[2]} experts, which the mesh has not"
        for step in self.steps("atom.vocabulary_embedding.default"):
            rows = self.shape(_slot(step.args[0]))[0]
            for rank in range(mesh.ranks):
                if _number(step.args[2], self.index(rank)) != self.index(rank).get("tp_index", 0) * rows:
                    yield f"{self.at(step)}: rank {rank}'s first row is {_number(step.args[2], self.index(rank))}"
                    break

    def experts_held(self) -> set[Any]:
        """How many experts the weights of the region's routed experts have on a rank."""
        found = [s for name in EXPERTS for s in self.steps(f"atom.{name}.default")]
        return {self.shape(_slot(s.args[EXPERTS[s.op.split(".")[1]][0]]))[0] for s in found}

    def index(self, rank: int) -> dict[str, int]:
        mesh = self.plan.mesh
        return {INDEX[a]: i for a, i in zip(mesh.names, mesh.coordinate(rank), strict=True)}


def _is_own(text: str, axis: str) -> bool:
    """Whether a size differs between the ranks along an axis."""
    agreed = {AGREED, *(of_half(AGREED, half) for half in HALVES)}
    shared = agreed | {name for other, name in INDEX.items() if other != axis}
    names = names_in(text) - shared
    if axis == "dp":
        return bool(names)
    return any(name == INDEX[axis] or name.startswith(COUNTED) for name in names)


def _number(arg: Any, symbols: Mapping[str, int]) -> int:
    return evaluate(arg.expr if isinstance(arg, Size) else arg, symbols)


def _product(sizes: list[int | str]) -> int:
    return math.prod(evaluate(size, {}) for size in sizes)


def _positional(step: Step) -> list[Any]:
    """The arguments by position of the schema; those of keywords where it has them."""
    op = operator_of(step.op)
    assert op is not None, step.op
    rest = op._schema.arguments[len(step.args) :]
    return [*step.args, *(step.kwargs[a.name] for a in rest if a.name in step.kwargs)]


__all__ = ["Collective", "CollectivesError", "check_ranks", "collectives_of"]
