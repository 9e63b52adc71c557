"""Sharded, cut in two, stitched and scheduled: ranks compute what they computed before, with collectives hidden."""

from __future__ import annotations

import copy
import itertools
import operator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from atomc.ops import Batch
from atomc.parallel.collectives import WAIT, is_collective
from atomc.parallel.layout import parse_layout
from atomc.parallel.tasks import simulate
from atomc.passes.graph import PassError, order_edges
from atomc.passes.overlap import OverlapError
from atomc.passes.schedule import ScheduleOverlap, task_graph
from tests.passes.test_shard import empty
from tests.support.eager import Caches, make_batch, new_caches
from tests.support.halves import SECONDS, Halves, chunked, halves, node_seconds, schedule, sizes_of
from tests.support.micro_batches import operators
from tests.support.sharded import CONFIG, CONTEXT, LONGEST, compiled
from tests.support.v4_configs import random_ids

LAYOUTS = (("dp=2,moe=tp", "gather"), ("dp=2,moe=ep", "route"), ("tp=2", "gather"), ("dp=2,tp=2,moe=ep", "route"))
# Tokens of each request of each dp rank, step by step: a request straddles the middle; then a rank has one token beside
# full ones, or none; then decode. A rank of one token, or none, has an empty half, or two.
EVEN = (((17, 12),), ((5, 9),), ((1, 1),))
UNEVEN = (((17, 12), (1, 0)), ((0, 0), (5, 9)), ((1, 1), (1, 0)), ((2, 0), (0, 0)))


def steps(layout: str, loads: Any) -> Any:
    """For each step the batches and caches of all ranks, and the tokens of the fullest."""
    ranks, tp = parse_layout(layout).ranks, parse_layout(layout).tp
    caches = [new_caches(CONFIG, 3, CONTEXT, longest_step=LONGEST) for _ in range(ranks)]
    done = [[0] * len(loads[0][0]) for _ in range(ranks)]
    for load in loads:
        batches: list[Batch] = []
        for rank in range(ranks):
            lengths = load[rank // tp % len(load)]
            ids = [random_ids(CONFIG, 60, 10 * (rank // tp) + i) for i in range(len(lengths))]
            pieces: list[Any] = [
                (i, done[rank][i], ids[i][done[rank][i] : done[rank][i] + n]) for i, n in enumerate(lengths) if n
            ]
            batches.append(make_batch(CONFIG, pieces, caches[rank]) if pieces else empty(CONFIG, caches[rank]))
            done[rank] = [a + n for a, n in zip(done[rank], lengths, strict=True)]
        yield batches, caches, max(len(b.ids) for b in batches)


def whole_logits(layout: str, form: Any, loads: Any, hot: bool = False) -> list[Tensor]:
    unit, found = compiled(layout, form, hot), []
    for batches, caches, most in steps(layout, loads):
        with torch.no_grad():
            found += unit.step(batches, [c.states for c in caches], most)
    return found


def logits(made: Halves, loads: Any, by_requests: bool = False) -> tuple[list[Tensor], list[Caches]]:
    found, last = [], []
    for batches, caches, most in steps(str(made.unit.layout), loads):
        with torch.no_grad():
            found += made.step(batches, caches, most, by_requests)
        last = caches
    return found, last


def same(one: tuple[list[Tensor], list[Caches]], other: tuple[list[Tensor], list[Caches]]) -> bool:
    """Logits and state, bitwise."""
    states = [
        [t for c in caches for layer in c.states for t in layer if t is not None] for caches in (one[1], other[1])
    ]
    pairs = [*zip(one[0], other[0], strict=True), *zip(*states, strict=True)]
    return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize("loads", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(("layout", "form"), LAYOUTS)
def test_ranks_in_two_micro_batches_compute_what_they_did(layout: str, form: Any, loads: Any) -> None:
    """Stitched and scheduled: bitwise what the halves give as they were cut; and what the whole gives, to 1e-5."""
    want, plain = whole_logits(layout, form, loads), logits(halves(layout, form), loads)
    for a, b in zip(want, plain[0], strict=True):
        assert a.shape == b.shape
        assert not len(a) or (a - b).abs().max() <= 1e-5 * max(1.0, float(a.abs().max()))
    assert same(plain, logits(halves(layout, form, stitched=True, then=_schedule), loads))
    assert same(plain, logits(halves(layout, form, then=_schedule), loads))


def _schedule(gm: GraphModule, ctx: Any) -> None:
    schedule(gm, ctx, require=False)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "form"), LAYOUTS[:3])
def test_every_cut_of_three_requests(layout: str, form: Any) -> None:
    """7,003, 6,928 and 2,453 tokens, divided by 1,000: wherever it is cut, a half without tokens included."""
    loads = (((7, 7, 3),),)
    want, made = whole_logits(layout, form, loads), halves(layout, form, stitched=True, then=_schedule)
    for cut in range(18):
        for batches, caches, most in steps(layout, loads):
            with torch.no_grad():
                got = made.step(batches, caches, most, cut=cut)
        for a, b in zip(want, got, strict=True):
            assert (a - b).abs().max() <= 1e-5 * max(1.0, float(a.abs().max())), cut


@pytest.mark.parametrize("layout", ["dp=2,moe=tp", "dp=2,moe=ep"])
def test_decode_is_cut_between_requests(layout: str) -> None:
    form, loads = "route" if "ep" in layout else "gather", (((17, 12), (3, 1)), ((1, 1), (1, 0)), ((1, 1), (1, 1)))
    want = whole_logits(layout, form, loads)
    got, _ = logits(halves(layout, form, stitched=True, then=_schedule), loads, by_requests=True)
    for a, b in zip(want, got, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(a.abs().max()))


def test_all_tokens_to_the_same_experts() -> None:
    layout, form = "dp=2,moe=ep", "route"
    want = whole_logits(layout, form, UNEVEN, hot=True)
    got, _ = logits(halves(layout, form, True, stitched=True, then=_schedule), UNEVEN)
    for a, b in zip(want, got, strict=True):
        assert not len(a) or (a - b).abs().max() <= 1e-5 * max(1.0, float(a.abs().max()))


@pytest.mark.parametrize(("layout", "form"), LAYOUTS)
def test_a_schedule_moves_nodes_and_hides_collectives(layout: str, form: Any) -> None:
    for name, (gm, ctx) in chunked(layout, form).items():
        moved = schedule(copy.deepcopy(gm), ctx, require=name.startswith("layer"))
        assert operators(moved) == operators(gm)
        place = {node.name: at for at, node in enumerate(moved.graph.nodes)}
        for node, edges in order_edges(gm.graph).items():
            assert all(place[edge.name] < place[node.name] for edge in edges if node.op != "placeholder")
        if name.startswith("layer"):
            assert any(_works_between(moved, n) for n in moved.graph.nodes if is_collective(n)), name


def _works_between(gm: GraphModule, collective: Node) -> bool:
    """Whether compute stands between a collective and its wait."""
    nodes = list(gm.graph.nodes)
    waits = [at for at, node in enumerate(nodes) if node.target is WAIT and node.args[0] is collective]
    between = nodes[nodes.index(collective) + 1 : waits[0]] if waits else []
    return any(SECONDS(node) for node in between if node.target is not WAIT and not is_collective(node))


@pytest.mark.parametrize(("layout", "form"), LAYOUTS)
def test_what_a_region_leaves_open_is_waited_for_in_the_next(layout: str, form: Any) -> None:
    """Between layers the second half's last collective runs beside the next region's first half."""
    stitched = halves(layout, form, stitched=True, then=_schedule)
    plain = halves(layout, form)
    count = sum((operators(part.region.gm) for part in stitched.parts), operators(plain.parts[0].region.gm))
    assert count == sum((operators(part.region.gm) for part in plain.parts), operators(plain.parts[0].region.gm))
    layers = [part for part in stitched.parts if part.call.region.startswith("layer")]
    for first, second in itertools.pairwise(layers):
        assert first.region.chunked.carried > 0
        nodes = list(second.region.gm.graph.nodes)
        wait = next(n for n in nodes if n.target is WAIT and n.args[0].op == "placeholder")
        assert wait.args[0].name == second.region.chunked.given[0]
        before = nodes[: nodes.index(wait)]
        assert any(SECONDS(n) for n in before if n.op == "call_function" and n.meta.get("half") == 0)


def test_moved_nodes_have_values_of_the_region_they_are_in() -> None:
    """Their sizes are the next region's symbols: what it calls its second half's tokens."""
    stitched = halves("dp=2,moe=tp", stitched=True)
    for part in stitched.parts[2:-1]:
        gm, twins = part.region.gm, set(part.region.chunked.symbols.values())
        carried = [n for n in gm.graph.nodes if n.name in part.region.chunked.given]
        found = set().union(*(_symbols(n) for n in carried))
        assert found
        assert found <= twins


def _symbols(node: Node) -> set[str]:
    return {str(s) for size in node.meta["val"].shape if not isinstance(size, int) for s in size.node.expr.free_symbols}


@pytest.mark.parametrize("stitched", [False, True])
@pytest.mark.parametrize(("layout", "form"), LAYOUTS)
def test_bytes_are_those_of_the_storages(layout: str, form: Any, stitched: bool) -> None:
    """Peak of the tasks in the order given against every storage that a call makes, from its call to its last user."""
    for part in halves(layout, form, stitched=stitched).parts:
        gm = part.region.gm
        found = task_graph(gm.graph, SECONDS, sizes_of(gm))
        assert simulate(found, found.in_order()).peak == _peak(gm, sizes_of(gm)), part.call.region


def _peak(gm: GraphModule, sizes: dict[str, int]) -> int:
    """The graph is run on tensors without data: views share storages there as they do with data.

    What a collective reads is held until its wait, or, if the region leaves it open, until the end.
    """
    nodes, values = list(gm.graph.nodes), dict[Node, Any]()
    place = {node: at for at, node in enumerate(nodes)}
    given: set[int] = set()
    size: dict[int, int] = {}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for at, node in enumerate(nodes[:-1]):
        values[node] = _run(node, values, sizes)
        for index, leaf in enumerate(_tensors(values[node])):
            key = leaf.untyped_storage()._cdata
            if node.op == "placeholder":
                given.add(key)
            elif key not in given:
                taken = [u for u in node.users if u.target is operator.getitem and u.args[1] == index]
                several = isinstance(values[node], (list, tuple))
                users = [u for n in taken for u in n.users] if several else [*node.users, node]
                users += [wait for u in users if is_collective(u) for wait in [*u.users, nodes[-1]][:1]]
                size[key] = leaf.untyped_storage().nbytes()
                first.setdefault(key, at)
                last[key] = max([at, last.get(key, 0), *(place[u] for u in users)])
    calls = [at for at, n in enumerate(nodes) if n.op == "call_function" and n.target is not WAIT]
    return max((sum(size[k] for k in size if first[k] <= at <= last[k]) for at in calls), default=0)


def _run(node: Node, values: dict[Node, Any], sizes: dict[str, int]) -> Any:
    if node.op == "placeholder" or node.target is torch.ops.atom.host_sizes.default:
        return pytree.tree_map(lambda leaf: _real(leaf, sizes), node.meta.get("val"))
    if node.target is WAIT:
        return values[node.args[0]]
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **({**kwargs, "device": "meta"} if "device" in kwargs else kwargs))


def _real(leaf: Any, sizes: dict[str, int]) -> Any:
    if isinstance(leaf, Tensor):
        return torch.empty([_real(n, sizes) for n in leaf.shape], dtype=leaf.dtype, device="meta")
    if isinstance(leaf, torch.SymInt):
        return int(leaf.node.expr.subs({s: sizes[str(s)] for s in leaf.node.expr.free_symbols}))
    return leaf


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def test_a_whole_graph_hides_nothing_and_says_so() -> None:
    unit = compiled("dp=2,moe=tp")
    gm = copy.deepcopy(unit.graphs["layer_csa_topk"])
    free = node_seconds(0.0, 0.0, 1e-4)  # nothing to hide them with
    with pytest.raises(OverlapError, match="no communication is hidden"):
        ScheduleOverlap(free, sizes_of(gm)).run(gm, unit.contexts["layer_csa_topk"])


def test_a_size_without_a_value_is_an_error() -> None:
    gm, _ = chunked("dp=2,moe=tp", "gather")["layer_csa_topk"]
    with pytest.raises(PassError, match="which has no value"):
        task_graph(gm.graph, SECONDS, {})
