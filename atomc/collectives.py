"""The proof that ranks never wait for one another for ever, and that no rank computes with half a sum.

Contract:
    1. `check_graph`: on every mesh axis, the placements of a graph's inputs carried along its nodes by the rules of
       the operators end where the region promises; each collective runs over the group that it needs, is waited for,
       and has sizes on which the ranks of its group agree.
    2. `prove`: for every pair of ranks, and every pair of states that they can be in at one step, both issue the same
       collectives in the same order: kind, group, dtype and size.
Terms:
    own     a size that a rank alone knows: its tokens (`T`), its requests. Along `tp` the ranks share them.
    agreed  what all ranks know before a step, because they reduced it: the rows of a message, whether any of them
            prefills, whether batches overlap, how many draft passes follow. Nothing else may choose what is run.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch.fx import GraphModule, Node

from atomc.artifact.expr import evaluate
from atomc.errors import ProblemsError
from atomc.ops.placement import REPLICATE, Mesh, Placement, PlacementError, Shard
from atomc.parallel.collectives import KINDS, WAIT, Kind, group_of, is_collective
from atomc.parallel.propagate import Placed, place_node, sizes_of
from atomc.passes.graph import location

AGREED: Final = frozenset({"P"})
_HOST_SIZES = torch.ops.atom.host_sizes.default


class CollectivesError(ProblemsError):
    """Ranks would hang, or compute with parts of sums; each problem names the node and the model's line."""

    exit_code = 7
    headline = "{where}: {count} problem{s} with collectives"


@dataclass(frozen=True)
class Collective:
    """One collective as every rank of its group has to issue it; `size`: rows and the rest, an expression."""

    kind: Kind
    group: str
    dtype: str
    size: str
    where: str = field(compare=False, default="?")

    def __str__(self) -> str:
        return f"{self.kind} of {self.size} {self.dtype} over {self.group} ({self.where})"


# -- one graph ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankGraph:
    """The graph of a region as the ranks run it.

    Attributes:
        placements: placeholder -> mesh axis -> what a rank holds of it. symbols: the graph's size symbols -> ours.
        sizes: placeholder -> symbol, of sizes that the ranks agreed on.
    """

    name: str
    gm: GraphModule
    placements: Mapping[str, Mapping[str, Placement]]
    symbols: Mapping[str, str]
    sizes: Mapping[str, str]


def check_graph(graph: RankGraph, mesh: Mesh) -> list[Collective]:
    """The collectives of a graph in order.

    Raises:
        CollectivesError: all that is wrong with it.
    """
    problems = [
        *(p for axis in mesh.names for p in _placement_problems(graph, axis)),
        *_use_problems(graph, mesh),
    ]
    found = sequence(graph)
    nodes = [n for n in graph.gm.graph.nodes if is_collective(n)]
    for node, one in zip(nodes, found, strict=True):
        problems += [f"{_at(graph, node)}: {p}" for p in _size_problems(one)]
    problems += _exchange_problems(graph)
    if problems:
        raise CollectivesError(graph.name, list(dict.fromkeys(problems)))
    return found


def _at(graph: RankGraph, node: Node) -> str:
    return f"{graph.name}: {node.name} ({location(node)})"


def _placement_problems(graph: RankGraph, axis: str) -> Iterator[str]:
    """Where the rules do not go through; the first on an axis, as the rest would follow from it."""
    known: dict[Node, Placed] = {}
    for node in graph.gm.graph.nodes:
        if node.op == "placeholder":
            known[node] = graph.placements.get(node.name, {}).get(axis, REPLICATE)
        elif node.op == "call_function":
            try:
                known[node] = place_node(node, known, axis, lambda n: sizes_of(n.meta.get("val")))
            except PlacementError as error:
                yield f"{_at(graph, node)}: along {axis}: {error}"
                return
    own: Placement = Shard(0) if axis == "dp" else REPLICATE
    output = next(n for n in graph.gm.graph.nodes if n.op == "output")
    for value in output.all_input_nodes:
        if known[value] != own:
            yield f"{_at(graph, value)}: a result is {known[value]} along {axis}; it has to be {own}"


def _use_problems(graph: RankGraph, mesh: Mesh) -> Iterator[str]:
    """Groups, their sizes, reductions, and waits."""
    for node in graph.gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is WAIT and not is_collective(node.args[0]):
            yield f"{_at(graph, node)}: waits for {node.args[0]}, which is no collective"
        if not is_collective(node):
            continue
        kind, group = KINDS[node.target], group_of(node)
        if group not in mesh.names:
            yield f"{_at(graph, node)}: {kind} over {group!r}; the mesh has {', '.join(mesh.names)}"
            continue
        if [u.target for u in node.users] != [WAIT]:
            yield f"{_at(graph, node)}: {kind} is not waited for once, before it is read"
        if kind in ("all_gather", "reduce_scatter") and node.args[-2] != mesh.size(group):
            yield f"{_at(graph, node)}: {kind} among {node.args[-2]} ranks; {group} has {mesh.size(group)}"
        if kind in ("reduce_scatter", "all_reduce") and node.args[1] != "sum":
            yield f"{_at(graph, node)}: {kind} takes {node.args[1]!r}; what is due is a sum"
        if kind == "all_to_all":
            for sizes in node.args[1:3]:
                count = len(sizes) if isinstance(sizes, (list, tuple)) else len(sizes.meta["val"])
                if count != mesh.size(group):
                    yield f"{_at(graph, node)}: all_to_all of {count} parts; {group} has {mesh.size(group)} ranks"


def _exchange_problems(graph: RankGraph) -> Iterator[str]:
    """Rows that a rank sends and expects: by counts that it has sent before, to the same group."""
    for node in graph.gm.graph.nodes:
        if not is_collective(node) or KINDS[node.target] != "all_to_all":
            continue
        receive, send = node.args[1:3]
        if not isinstance(receive, Node) and not isinstance(send, Node):
            if len(set(receive)) != 1 or list(receive) != list(send):
                yield f"{_at(graph, node)}: all_to_all of fixed sizes {send} against {receive}: no two ranks agree"
            continue
        if isinstance(send, Node) and str(sum(send.meta["val"])) != str(node.args[0].meta["val"].shape[0]):
            yield f"{_at(graph, node)}: all_to_all sends by sizes that are not those of its rows"
        ends = [_counts(n) for n in (receive, send)]
        if None in ends or {_exchanged(a, group_of(node)) == b for a, b in (ends, reversed(ends))} == {False}:
            yield f"{_at(graph, node)}: all_to_all whose sizes were not exchanged with the ranks of {group_of(node)}"


def _counts(sizes: Any) -> Node | None:
    """The counts behind sizes on the host."""
    if isinstance(sizes, Node) and sizes.target is _HOST_SIZES:
        counts = sizes.args[0]
        return counts if isinstance(counts, Node) else None
    return None


def _exchanged(counts: Node | None, group: str) -> Node | None:
    """What a rank sent to learn these counts."""
    if counts is None or counts.target is not WAIT:
        return None
    start = counts.args[0]
    assert isinstance(start, Node)
    return start.args[0] if is_collective(start) and group_of(start) == group else None  # type: ignore[return-value]


def sequence(graph: RankGraph) -> list[Collective]:
    """The collectives of a graph in order, with sizes in symbols."""
    names = dict(graph.symbols)
    for node in graph.gm.graph.nodes:
        if node.op == "placeholder" and node.name in graph.sizes:
            names[str(node.meta["val"])] = graph.sizes[node.name]
    found = []
    for node in graph.gm.graph.nodes:
        if is_collective(node):
            value: torch.Tensor = node.args[0].meta["val"]
            rows, rest = value.shape[0], tuple(value.shape[1:])
            size = " x ".join([_rows(node, rows, names), *(_named(n, names) for n in rest)])
            dtype = str(value.dtype).removeprefix("torch.")
            found.append(Collective(KINDS[node.target], group_of(node), dtype, size, f"{graph.name}, {location(node)}"))
    return found


def _rows(node: Node, rows: int | torch.SymInt, names: Mapping[str, str]) -> str:
    """How many rows: an expression, or by which counts."""
    if KINDS[node.target] == "all_to_all" and isinstance(node.args[1], Node):
        forth = isinstance(node.args[2], Node) and _exchanged(_counts(node.args[1]), group_of(node)) is not None
        return "counted" if forth else "counted back"
    return _named(rows, names)


def _named(size: int | torch.SymInt, names: Mapping[str, str]) -> str:
    if isinstance(size, int):
        return str(size)
    expression = size.node.expr
    by_name = {s: type(s)(names.get(str(s), str(s)), integer=True) for s in expression.free_symbols}
    return str(expression.xreplace(by_name))


def _size_problems(one: Collective) -> Iterator[str]:
    for part in one.size.split(" x "):
        if part.startswith("counted"):
            continue
        used = set(re.findall(r"[A-Za-z_]\w*", part))
        if one.group == "dp" and used - AGREED:
            own = ", ".join(sorted(used - AGREED))
            yield f"{one.kind} over dp of {one.size}: {own} is the rank's own number, which the others do not know"


# -- all ranks, all states ---------------------------------------------------------------------------------------------

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
    overlap: bool
    drafts: int

    def allows(self, state: RankState) -> bool:
        """Whether a rank can be in that state in such a step."""
        return state.tokens <= self.rows and (self.prefill or state.load != "real" or state.phase == "decode")


Runs = Callable[[int, RankState, Agreed], Sequence[str]]


@dataclass(frozen=True)
class Proof:
    """What was compared: pairs of ranks and states, and collectives in the longest step."""

    pairs: int
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
        CollectivesError: for each kind of disagreement the first pair.
    """
    problems: dict[str, str] = {}
    pairs = longest = 0
    states = states_of(buckets)
    for agreed in (Agreed(*facts) for facts in itertools.product(buckets, (False, True), overlap, drafts)):
        able = [s for s in states if agreed.allows(s)]
        # Ranks that run the same in every state are compared once, whatever their number.
        run = [tuple(tuple(runs(rank, state, agreed)) for state in able) for rank in range(mesh.ranks)]
        issued = {names: [c for name in names for c in sequences[name]] for found in run for names in found}
        longest = max(longest, *(len(found) for found in issued.values()))
        alike: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
        for a, b in itertools.combinations(range(mesh.ranks), 2):
            alike.setdefault((run[a], run[b], _shared_axis(mesh, a, b)), []).append((a, b))
        for (ours, theirs, shared), same in alike.items():
            known: dict[tuple[Any, ...], tuple[str, str] | None] = {}
            for (left, one), (right, other) in itertools.product(
                zip(able, ours, strict=True), zip(able, theirs, strict=True)
            ):
                if shared == "tp" and left != right:  # they have the same requests
                    continue
                pairs += len(same)
                key = one, other, left.tokens, right.tokens
                if key not in known:
                    known[key] = _difference(issued[one], issued[other], agreed, left, right, shared)
                if (difference := known[key]) is not None:
                    (a, b), who = same[0], (_said(left), _said(right))
                    where = f"rank {a} ({who[0]}) and rank {b} ({who[1]}), {_agreed(agreed)}"
                    problems.setdefault(difference[0], f"{where}: {difference[1]}")
    if problems:
        raise CollectivesError("ranks disagree", list(problems.values()))
    return Proof(pairs, longest)


def _shared_axis(mesh: Mesh, a: int, b: int) -> str | None:
    """The axis of the one group that two ranks are both in."""
    differ = [n for n, x, y in zip(mesh.names, mesh.coordinate(a), mesh.coordinate(b), strict=True) if x != y]
    return differ[0] if len(differ) == 1 else None


def _difference(
    ours: Sequence[Collective], theirs: Sequence[Collective], agreed: Agreed, left: RankState, right: RankState,
    shared: str | None,
) -> tuple[str, str] | None:  # fmt: skip
    """A key for the kind of difference, and what it is; None if there is none."""
    for at, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if (one.kind, one.group, one.dtype) != (other.kind, other.group, other.dtype):
            return f"{one}/{other}", f"collective {at} is {one} for the one, {other} for the other"
        if one.group == shared:
            sizes = _numbers(one.size, agreed, left), _numbers(other.size, agreed, right)
            if sizes[0] != sizes[1]:
                return f"{one}/size", f"collective {at}, {one}, has {sizes[0]} for the one, {sizes[1]} for the other"
    if len(ours) != len(theirs):
        rest = max(ours, theirs, key=len)[min(len(ours), len(theirs))]
        return f"{rest}/alone", f"{len(ours)} collectives against {len(theirs)}: {rest} would wait for ever"
    return None


def _numbers(size: str, agreed: Agreed, state: RankState) -> list[int | str]:
    """The size in numbers; what only one kind of rank has differs with its tokens."""
    symbols = dict.fromkeys(("T", "B", "N4", "NH", "L"), state.tokens) | {"P": agreed.rows}
    return [p if p.startswith("counted") else evaluate(p, symbols) for p in size.split(" x ")]


def _said(state: RankState) -> str:
    return f"{state.load}, {state.phase}, {state.tokens} tokens"


def _agreed(agreed: Agreed) -> str:
    facts = [f"{agreed.rows} rows", "with prefill" if agreed.prefill else "decode alone"]
    facts += ["overlapped"] if agreed.overlap else []
    return ", ".join(facts + ([f"{agreed.drafts} draft passes"] if agreed.drafts else []))
