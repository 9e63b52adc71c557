"""The proof of collectives: it accepts every legal layout, and refuses each way that public engines got them wrong.

Mutations of graphs change operators and arguments alone; what nodes say of themselves follows, as after any pass. What
then does not run on its own sizes is refused when it becomes a plan, the rest by the proof.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
import torch
from torch.fx import GraphModule, Node

from atomc.artifact.agreement import Agreed, RankState, prove
from atomc.artifact.check_ranks import Collective, CollectivesError, check_ranks
from atomc.artifact.plan import RegionPlan
from atomc.artifact.ranks import RanksPlan, cuts_of
from atomc.codegen.lower import LoweringError
from atomc.ops.placement import REPLICATE, Mesh, Placement, Shard
from atomc.parallel.collectives import KINDS, WAIT, c10d
from atomc.parallel.layout import parse_layout
from atomc.passes.graph import aten, quiet, value_of
from atomc.passes.runner import Context
from atomc.passes.shard import Form
from atomc.ranks import Variant, placements_of
from atomc.regions import Compiled, lower
from atomc.targets import get_target
from tests.support.sharded import LAYOUTS, captured, compiled

atom = torch.ops.atom
LAYER = "layer_hca_hash"
ROUTE, BOTH = ("dp=3,moe=ep", "route"), ("dp=2,tp=2", "gather")
BOUNDS = {"T": 64, "B": 8, "N4": 64, "NH": 64, "L": 64, "window_pages": 1, "blocks": 1, "slots": 1}


@dataclass
class Graph:
    """A fresh copy of a region's graph on the ranks of a layout."""

    variant: Variant
    region: str
    gm: GraphModule
    ctx: Context

    @classmethod
    def of(cls, layout: str, form: Form, region: str = LAYER) -> Graph:
        unit = compiled(layout, form)
        return cls(Variant(unit.layout, form), region, copy.deepcopy(unit.graphs[region]), unit.contexts[region])

    def plan(self) -> tuple[RegionPlan, RanksPlan]:
        """The region as the artifact has it, after every node's value was worked out once more."""
        nodes = list(self.gm.graph.nodes)
        for node in nodes:
            if node.op == "call_function":
                with quiet(n.meta.get("val") for n in nodes), torch.no_grad():
                    try:
                        node.meta["val"] = node.target(*map(value_of, node.args), **node.kwargs)
                    except Exception:  # noqa: BLE001  it does not run: lowering says so, with the line
                        continue
        region = next(r for r in captured().regions if r.name == self.region)
        one = Compiled(replace(region, gm=self.gm), self.ctx, [])
        bounds = self.variant.bounds(BOUNDS)
        found, _ = lower(one, bounds, get_target("cpu"))
        cuts = {w: cuts_of(p) for w, p in placements_of(self.ctx.module_paths, self.ctx.placements).items()}
        return found, RanksPlan(str(self.variant.layout), list(self.mesh.axes), bounds, cuts, {}, {})

    @property
    def mesh(self) -> Mesh:
        return self.variant.layout.mesh

    def check(self) -> list[Collective]:
        return check_ranks(*self.plan()).collectives


def regions() -> list[str]:
    return [r.name for r in captured().regions]


# -- what is legal -----------------------------------------------------------------------------------------------------


def steps(rank: int, state: RankState, agreed: Agreed) -> Sequence[str]:
    """What every rank runs: all regions, whatever it has to do, twice where batches overlap."""
    del rank, state
    return [*regions() * (1 + agreed.overlap), *["head"] * agreed.drafts]


@pytest.mark.parametrize(("layout", "form"), LAYOUTS)
def test_legal_layouts_are_proven(layout: str, form: Form) -> None:
    found = {name: Graph.of(layout, form, name).check() for name in regions()}
    proof = prove(found, steps, parse_layout(layout).mesh, (1, 8, 64), (False, True), (0, 2))
    assert proof.steps == 3 * 2 * 2 * 2
    assert proof.states > 100 * parse_layout(layout).ranks
    assert proof.longest == 2 * sum(map(len, found.values())) + 2 * len(found["head"])


def test_what_a_layer_issues() -> None:
    def kinds(layout: str, form: Form, region: str) -> list[str]:
        return [f"{c.kind} {c.group} {c.dtype}" for c in Graph.of(layout, form, region).check()]

    gather = ["all_gather dp uint8", "reduce_scatter dp float32"]
    assert kinds("dp=2,moe=tp", "gather", LAYER) == gather
    assert kinds("dp=3,moe=ep", "gather", LAYER) == gather
    assert kinds("dp=3,moe=ep", "route", LAYER) == [
        "all_to_all dp int64", "all_to_all dp uint8", "all_to_all dp float32",
    ]  # fmt: skip
    assert kinds("tp=4", "gather", LAYER) == ["all_reduce tp float32"] * 2
    assert kinds("dp=2,tp=2", "gather", LAYER) == ["all_reduce tp float32", *gather, "all_reduce tp float32"]
    assert kinds("tp=4", "gather", "prologue") == ["all_reduce tp float32"]
    assert kinds("tp=4", "gather", "head") == ["all_gather tp float32"]
    assert kinds("dp=2,moe=tp", "gather", "prologue") == kinds("dp=2,moe=tp", "gather", "head") == []


def test_sizes_are_expressions_of_what_is_agreed() -> None:
    (sent, summed) = Graph.of("dp=2,moe=tp", "gather").check()
    assert (sent.size, summed.size) == ("P x 216", "2*P x 48")
    counts, forth, back = Graph.of(*ROUTE).check()
    assert (counts.size, forth.size, back.size) == ("3", "counted x 216", "counted x 48")


# -- mutations of a graph ----------------------------------------------------------------------------------------------


def calls(gm: GraphModule, target: Any) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.target == target]


def starts(gm: GraphModule, kind: str) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "call_function" and KINDS.get(n.target) == kind]


def insert(gm: GraphModule, after: Node, target: Any, *args: Any, like: Node | None = None) -> Node:
    with gm.graph.inserting_after(after):
        node = gm.graph.call_function(target, args)
    node.meta = dict((like or after).meta)
    return node


def wait_of(node: Node) -> Node:
    return next(iter(node.users))


def drop(kind: str, at: int = 0) -> Callable[[GraphModule], None]:
    """Leave out a collective whose input has the shape of its result."""

    def mutate(gm: GraphModule) -> None:
        start = starts(gm, kind)[at]
        done = wait_of(start)
        done.replace_all_uses_with(start.args[0])
        gm.graph.erase_node(done)
        gm.graph.erase_node(start)

    return mutate


def double(kind: str, at: int = 0) -> Callable[[GraphModule], None]:
    def mutate(gm: GraphModule) -> None:
        start = starts(gm, kind)[at]
        done = wait_of(start)
        users = list(done.users)
        again = insert(gm, done, start.target, done, *start.args[1:], like=done)
        last = insert(gm, again, WAIT, again)
        for user in users:
            user.replace_input_with(done, last)

    return mutate


def retarget(kind: str, position: int, value: Any, at: int = 0) -> Callable[[GraphModule], None]:
    """Another argument: the group is the last (-1), its size comes before it."""

    def mutate(gm: GraphModule) -> None:
        start = starts(gm, kind)[at]
        start.update_arg(position % len(start.args), value)

    return mutate


def no_wait(kind: str) -> Callable[[GraphModule], None]:
    def mutate(gm: GraphModule) -> None:
        done = wait_of(starts(gm, kind)[0])
        done.replace_all_uses_with(done.args[0])
        gm.graph.erase_node(done)

    return mutate


def own_rows_of_a_sum(gm: GraphModule) -> None:
    """A rank takes its rows of a sum that is still due, instead of reduce-scatter (sglang PR#27189)."""
    start = starts(gm, "reduce_scatter")[0]
    done = wait_of(start)
    done.replace_all_uses_with(insert(gm, done, aten.slice.Tensor, start.args[0], 0, 0, 29, like=done))
    gm.graph.erase_node(done)
    gm.graph.erase_node(start)


def reduced_not_scattered(gm: GraphModule) -> None:
    start = starts(gm, "reduce_scatter")[0]
    whole = insert(gm, start, c10d.all_reduce.default, start.args[0], "sum", "dp", like=start.args[0])
    start.replace_all_uses_with(whole)
    gm.graph.erase_node(start)


def shared_expert_in_the_sum(gm: GraphModule) -> None:
    """What every rank has alike, added before the sum over them: it would count once a rank."""
    start = starts(gm, "all_reduce")[-1]
    total = calls(gm, aten.add.Tensor)[-1]
    early = insert(gm, total.prev, aten.add.Tensor, start.args[0], total.args[1], like=total)
    again = insert(gm, early, start.target, early, *start.args[1:], like=total)
    total.replace_all_uses_with(insert(gm, again, WAIT, again, like=total))
    gm.graph.erase_node(total)
    gm.graph.erase_node(wait_of(start))
    gm.graph.erase_node(start)


def own_message_size(gm: GraphModule) -> None:
    """The message has the rank's own number of rows."""
    message = calls(gm, atom.pack_message.default)[0]
    message.args = message.args[:1]


def no_message(gm: GraphModule) -> None:
    """Experts on the rank's own tokens."""
    start = starts(gm, "all_gather")[0]
    done = wait_of(start)
    done.replace_all_uses_with(start.args[0])
    gm.graph.erase_node(done)
    gm.graph.erase_node(start)


def swap_sizes(at: int) -> Callable[[GraphModule], None]:
    def mutate(gm: GraphModule) -> None:
        start = starts(gm, "all_to_all")[at]
        x, receive, send, group = start.args
        start.args = (x, send, receive, group)

    return mutate


def same_sizes(at: int, which: int) -> Callable[[GraphModule], None]:
    """A rank expects as much as it sends."""

    def mutate(gm: GraphModule) -> None:
        start = starts(gm, "all_to_all")[at]
        sizes = start.args[which]
        start.args = (start.args[0], sizes, sizes, start.args[3])

    return mutate


def no_counts(gm: GraphModule) -> None:
    """The ranks do not tell one another how many rows they send."""
    start = starts(gm, "all_to_all")[0]
    done = wait_of(start)
    done.replace_all_uses_with(start.args[0])
    gm.graph.erase_node(done)
    gm.graph.erase_node(start)


def no_local_numbers(gm: GraphModule) -> None:
    """Numbers of all experts on a rank that has some."""
    node = calls(gm, atom.local_experts.default)[0]
    node.replace_all_uses_with(insert(gm, node, aten.to.dtype, node.args[0], torch.int64))
    gm.graph.erase_node(node)


def not_brought_back(gm: GraphModule) -> None:
    drop("all_to_all", 2)(gm)


def unsorted_rows(gm: GraphModule) -> None:
    """Rows in order of tokens, sent as if they lay in order of ranks."""
    node = calls(gm, atom.dispatch_rows.default)[0]
    node.replace_all_uses_with(node.args[0])
    gm.graph.erase_node(node)


def norm_of_parts(gm: GraphModule) -> None:
    """A norm before the sum over ranks."""
    start = starts(gm, "all_reduce")[0]
    start.update_arg(0, insert(gm, start.prev, atom.rms_norm.default, start.args[0], None, 1e-6, like=start.args[0]))


def wait_for_another(gm: GraphModule) -> None:
    done = wait_of(starts(gm, "all_gather")[0])
    done.update_arg(0, done.args[0].args[0])


def whole_heads(gm: GraphModule) -> None:
    """A reshape that counts the heads of all ranks."""
    node = next(n for n in calls(gm, aten.reshape.default) if len(n.args[1]) == 3)
    rows, heads, dim = node.args[1]
    node.update_arg(1, [rows, heads * 4, dim])


def as_it_came(gm: GraphModule) -> None:
    """What came back is used with the rows of padding."""
    node = calls(gm, atom.drop_padding.default)[0]
    node.replace_all_uses_with(node.args[0])
    gm.graph.erase_node(node)


def like_itself(gm: GraphModule) -> None:
    node = calls(gm, atom.drop_padding.default)[0]
    node.update_arg(1, node.args[0])


def parts_swapped(gm: GraphModule) -> None:
    """A message is taken apart in another order."""
    node = calls(gm, atom.unpack_message.default)[0]
    for at in (1, 2):
        node.update_arg(at, node.args[at][::-1])


def fixed_parts(gm: GraphModule) -> None:
    """As many rows for each rank, whatever they have."""
    start = starts(gm, "all_to_all")[1]
    start.args = (start.args[0], [2, 2, 2], [2, 2, 2], start.args[3])


def nobody_reads(gm: GraphModule) -> None:
    """A collective whose result is of no use."""
    done = wait_of(starts(gm, "all_gather")[0])
    start = insert(gm, done, c10d.all_gather_into_tensor.default, done.args[0].args[0], 2, "dp")
    insert(gm, start, WAIT, start)


def other(target: Any, position: int, change: Callable[[Any], Any]) -> Callable[[GraphModule], None]:
    """Another argument of the first call of an operator."""

    def mutate(gm: GraphModule) -> None:
        node = calls(gm, target)[0]
        node.update_arg(position, change(node.args[position]))

    return mutate


def first_of_all(gm: GraphModule) -> None:
    """Every rank thinks that it has the first experts."""
    other(atom.local_experts.default, 1, lambda _: 0)(gm)


def sums_of_codes(gm: GraphModule) -> None:
    """Parts of sums are rounded to integers before they are summed."""
    start = starts(gm, "reduce_scatter")[0]
    start.update_arg(0, insert(gm, start.args[0], aten.to.dtype, start.args[0], torch.int32))


def sums_in_bf16(gm: GraphModule) -> None:
    start = starts(gm, "reduce_scatter")[0]
    start.update_arg(0, insert(gm, start.args[0], aten.to.dtype, start.args[0], torch.bfloat16))


def as_rows(gm: GraphModule) -> None:
    """Parts of the vocabulary read as if they were rows."""
    node = calls(gm, atom.join_columns.default)[0]
    rows = node.args[0].args[0].args[0].meta["val"].shape
    turned = insert(gm, node, aten.reshape.default, node.args[0], [-1, rows[1] * 4])
    node.replace_all_uses_with(turned, delete_user_cb=lambda user: user is not turned)
    gm.graph.erase_node(node)


MUTATIONS: dict[str, tuple[str, Form, str, Callable[[GraphModule], None], str]] = {
    "sglang PR#27189: rows taken of a sum": ("dp=2,moe=tp", "gather", LAYER, own_rows_of_a_sum, "a sum that is due"),
    "all_reduce after attention dropped": ("tp=4", "gather", LAYER, drop("all_reduce"), "Partial(sum) is used"),
    "all_reduce after experts dropped": ("tp=4", "gather", LAYER, drop("all_reduce", 1), "Partial(sum) is used"),
    "all_reduce after the embedding dropped": ("tp=4", "gather", "prologue", drop("all_reduce"), "Partial(sum)"),
    "all_reduce doubled": ("tp=4", "gather", LAYER, double("all_reduce"), "it takes Partial"),
    "all_reduce of experts over one axis of two": (*BOTH, LAYER, drop("all_reduce", 1), "Partial(sum) is used"),
    "all_reduce over dp": (*BOTH, LAYER, retarget("all_reduce", -1, "dp"), "its input is"),
    "all_reduce takes the maximum": ("tp=4", "gather", LAYER, retarget("all_reduce", 1, "max"), "is a sum"),
    "all_gather over tp": (*BOTH, LAYER, retarget("all_gather", -1, "tp"), "its input is"),
    "all_gather among too many": ("dp=2,moe=tp", "gather", LAYER, retarget("all_gather", -2, 4), "among 4 ranks"),
    "all_gather over no axis": ("dp=2,moe=tp", "gather", LAYER, retarget("all_gather", -1, "ep"), "the mesh has dp"),
    "all_gather dropped": ("dp=2,moe=tp", "gather", LAYER, no_message, "no way of sharing experts"),
    "all_gather doubled": ("dp=2,moe=tp", "gather", LAYER, double("all_gather"), "it takes Shard(0)"),
    "all_gather not waited for": ("dp=2,moe=tp", "gather", LAYER, no_wait("all_gather"), "not waited for"),
    "all_gather of the rank's own rows": ("dp=2,moe=tp", "gather", LAYER, own_message_size, "T is the rank's own"),
    "a wait for something else": ("dp=2,moe=tp", "gather", LAYER, wait_for_another, "waits for what is no collective"),
    "reduce_scatter doubled": ("dp=2,moe=tp", "gather", LAYER, double("reduce_scatter"), "it takes Partial"),
    "reduce_scatter over tp": (*BOTH, LAYER, retarget("reduce_scatter", -1, "tp"), "a sum that is due"),
    "reduce_scatter not waited for": ("dp=2,moe=tp", "gather", LAYER, no_wait("reduce_scatter"), "not waited for"),
    "all_reduce for reduce_scatter": ("dp=2,moe=tp", "gather", LAYER, reduced_not_scattered, "where another is cut"),
    "the shared expert in the sum": ("tp=4", "gather", LAYER, shared_expert_in_the_sum, "Partial(sum) is used"),
    "a norm of parts of sums": ("tp=4", "gather", LAYER, norm_of_parts, "Partial(sum) is used"),
    "logits not gathered": ("tp=4", "gather", "head", drop("all_gather"), "columns of ranks that are Shard(1)"),
    "logits gathered as rows": ("tp=4", "gather", "head", as_rows, "it is Shard(0, by column)"),
    "whole heads on a part": ("tp=4", "gather", LAYER, whole_heads, "does not run"),
    "no exchange of counts": (*ROUTE, LAYER, no_counts, "were not exchanged"),
    "rows expected and sent swapped": (*ROUTE, LAYER, same_sizes(1, 2), "were not exchanged"),
    "sizes of rows out swapped": (*ROUTE, LAYER, swap_sizes(1), "not those of its rows"),
    "sizes of rows back swapped": (*ROUTE, LAYER, swap_sizes(2), "not those of its rows"),
    "as many back as were sent": (*ROUTE, LAYER, same_sizes(2, 1), "were not exchanged"),
    "numbers of all experts": (*ROUTE, LAYER, no_local_numbers, "no way of sharing experts"),
    "numbers of all experts, gathered": ("dp=3,moe=ep", "gather", LAYER, no_local_numbers, "no way of sharing"),
    "results not brought back": (*ROUTE, LAYER, not_brought_back, "rows that are Shard(0, by expert)"),
    "rows not sorted by rank": (*ROUTE, LAYER, unsorted_rows, "it takes Shard(0, by destination)"),
    "all_to_all over tp": ("dp=3,tp=2,moe=ep", "route", LAYER, retarget("all_to_all", -1, "tp"), "its input is"),
    "parts for too few ranks": (*ROUTE, LAYER, retarget("all_to_all", 1, [1, 1]), "of 2 and 3 parts"),
    "unequal fixed parts": (*ROUTE, LAYER, retarget("all_to_all", 2, [2, 1, 0]), "no two ranks agree"),
    "padding not dropped": ("dp=2,moe=tp", "gather", LAYER, as_it_came, "broadcastable to [23, 48]"),
    "padding dropped to itself": ("dp=2,moe=tp", "gather", LAYER, like_itself, "broadcastable to [23, 48]"),
    "a message taken apart in another order": ("dp=2,moe=tp", "gather", LAYER, parts_swapped, "to [11, 3]"),
    "equal parts whatever is sent": (*ROUTE, LAYER, fixed_parts, "not those of its rows"),
    "a collective that nobody reads": ("dp=2,moe=tp", "gather", LAYER, nobody_reads, "read by nobody"),
    "half of a rank's experts": (*ROUTE, LAYER, other(atom.local_experts.default, 2, lambda n: n // 2), "counts 2 exp"),
    "rows sorted for twice the experts":
        (*ROUTE, LAYER, other(atom.sort_by_rank.default, 4, lambda n: 2 * n), "3 ranks of 8 experts"),
    "rows sorted for too few ranks":
        (*ROUTE, LAYER, other(atom.sort_by_rank.default, 2, lambda n: n - 1), "all_to_all of 3 and 2 parts"),
    "the first experts on every rank": ("dp=3,moe=ep", "gather", LAYER, first_of_all, "rank 1's first expert is 0"),
    "sums rounded to integers": ("dp=2,moe=tp", "gather", LAYER, sums_of_codes, "before it is taken"),
    "sums in bfloat16": ("dp=2,moe=tp", "gather", LAYER, sums_in_bf16, "it has to be float32"),
    "the first rows of the vocabulary on every rank":
        ("tp=4", "gather", "prologue", other(atom.vocabulary_embedding.default, 2, lambda _: 0), "a table Shard(0)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_graph_is_refused(name: str) -> None:
    layout, form, region, mutate, why = MUTATIONS[name]
    unit = Graph.of(layout, form, region)
    mutate(unit.gm)
    unit.gm.graph.lint()
    with pytest.raises((CollectivesError, LoweringError)) as error:
        unit.check()
    assert why in str(error.value), str(error.value)
    assert ".py:" in str(error.value)  # the model's line


@pytest.mark.parametrize(
    ("weight", "placed", "why"),
    [
        ("attn.wo_b.weight", {"tp": REPLICATE}, "where another is cut"),
        ("attn.wo_b.weight", {"tp": Shard(0)}, "do not belong together"),
        ("attn.wo_a.weight", {"tp": REPLICATE}, "where another is cut"),
        ("ffn.experts.w13", {"tp": Shard(1)}, "no way of sharing experts"),
        ("ffn.experts.w2", {"tp": Shard(1)}, "no way of sharing experts"),
        ("attn.attn_sink", {"tp": REPLICATE}, "where another is cut"),
        ("ffn.gate.weight", {"tp": Shard(0)}, "has to be whole"),
    ],
)
def test_a_weight_cut_another_way_is_refused(weight: str, placed: dict[str, Placement], why: str) -> None:
    region, plan = Graph.of("tp=4", "gather").plan()
    assert weight in [i.name for i in region.inputs]
    with pytest.raises(CollectivesError) as error:
        check_ranks(region, msgspec.structs.replace(plan, cuts={**plan.cuts, weight: cuts_of(placed)}))
    assert why in str(error.value)


def test_a_layout_that_shares_experts_otherwise_is_refused() -> None:
    region, plan = Graph.of(*ROUTE).plan()
    with pytest.raises(CollectivesError, match="shared as with moe=ep; the layout says moe=tp"):
        check_ranks(region, msgspec.structs.replace(plan, layout="dp=3,moe=tp"))


# -- ranks that run other things ---------------------------------------------------------------------------------------

Runs = Callable[[int, RankState, Agreed], Sequence[str]]


def sequences() -> dict[str, list[Collective]]:
    """Two forms of the layers' collectives, and what else a rank may issue in their place."""
    layer, live = Graph.of("dp=3,moe=ep", "gather").check(), Graph.of(*ROUTE).check()
    halved = [replace(c, size=c.size.replace("P", "P//2")) for c in layer for _ in range(2)]
    return {
        "layer": layer, "live": live, "overlapped": halved, "draft": layer,
        "replayed": [replace(c, transport="replayed") for c in layer],
        "own halves": [replace(c, size=c.size.replace("P", "T//2")) for c in layer for _ in range(2)],
        "narrow": [replace(c, dtype="bfloat16") if c.dtype == "float32" else c for c in layer],
        "reordered": layer[::-1], "once": layer[:1], "doubled": [*layer, layer[-1]],
        "tp": [replace(layer[0], group="tp"), layer[1]], "kind": [layer[0], replace(layer[1], kind="all_reduce")],
        "own rows": [replace(layer[0], size="T x 216"), layer[1]],
        "wider": [replace(layer[0], size="P x 220"), layer[1]],
        "padded otherwise": [replace(layer[0], size="P+1 x 216"), layer[1]],
    }  # fmt: skip


def if_state(test: Callable[[int, RankState, Agreed], bool], then: list[str], otherwise: list[str]) -> Runs:
    return lambda rank, state, agreed: then if test(rank, state, agreed) else otherwise


def drafted(rank: int, state: RankState, agreed: Agreed) -> list[str]:
    """ATOM #1987: a rank without requests makes one draft pass, the others as many as the drafter has."""
    del rank
    return ["layer", *["draft"] * (agreed.drafts if state.load == "real" else min(agreed.drafts, 1))]


# What each public bug was, as far as a sequence of collectives shows it. sglang #32669 is none of them: there a library
# chose another algorithm inside of a captured graph, on all ranks alike.
RANKS: dict[str, tuple[Runs, str]] = {
    "ATOM #1987: draft passes by load": (drafted, "would wait for ever"),
    "ATOM #1697: a dummy step is live, the others replay a graph of the same collectives":
        (if_state(lambda _r, s, _a: s.load == "dummy", ["layer"], ["replayed"]), "replayed"),
    "ATOM #1627: halves padded to the rank's own number, not to the most of all ranks":
        (if_state(lambda _r, _s, a: a.overlap, ["own halves"], ["layer"]), "has ["),
    "sglang #28915: idle ranks skip the experts":
        (if_state(lambda _r, s, _a: s.load == "empty", [], ["layer"]), "would wait for ever"),
    "sglang #29144: a rank decides for prefill by its own load":
        (if_state(lambda _r, s, _a: s.phase != "decode", ["live"], ["layer"]), "for the other"),
    "a rank splits its batch where it has enough, whatever the others do":
        (if_state(lambda _r, s, a: a.overlap and s.tokens > 1, ["overlapped"], ["layer"]), "for the other"),
    "one rank skips the last layer": (if_state(lambda r, _s, _a: r == 2, ["layer"], ["layer", "layer"]), "for ever"),
    "one rank skips all": (if_state(lambda r, _s, _a: r == 0, [], ["layer"]), "would wait for ever"),
    "one rank skips a collective": (if_state(lambda r, _s, _a: r == 1, ["once"], ["layer"]), "would wait for ever"),
    "one rank doubles one": (if_state(lambda r, _s, _a: r == 1, ["doubled"], ["layer"]), "would wait for ever"),
    "one rank reorders": (if_state(lambda r, _s, _a: r == 1, ["reordered"], ["layer"]), "for the other"),
    "one rank sends bf16": (if_state(lambda r, _s, _a: r == 1, ["narrow"], ["layer"]), "bfloat16"),
    "one rank in another group": (if_state(lambda r, _s, _a: r == 1, ["tp"], ["layer"]), "over tp"),
    "one rank reduces where others scatter": (if_state(lambda r, _s, _a: r == 1, ["kind"], ["layer"]), "all_reduce"),
    "own numbers of rows": (if_state(lambda _r, _s, _a: True, ["own rows"], []), "has ["),
    "wider rows on one rank": (if_state(lambda r, _s, _a: r == 1, ["wider"], ["layer"]), "220"),
    "padding by another rule": (if_state(lambda r, _s, _a: r == 1, ["padded otherwise"], ["layer"]), "has ["),
    "a full bucket goes another way": (if_state(lambda _r, s, a: s.tokens == a.rows, ["live"], ["layer"]), "other"),
    "mixed batches go another way": (if_state(lambda _r, s, _a: s.phase == "mixed", ["live"], ["layer"]), "other"),
    "layers in another order": (if_state(lambda r, _s, _a: r == 1, ["live", "layer"], ["layer", "live"]), "other"),
    "drafts of one rank alone": (if_state(lambda r, _s, _a: r == 0, ["layer", "draft"], ["layer"]), "for ever"),
    "an empty rank drafts not": (
        lambda _r, s, a: ["layer", *["draft"] * (a.drafts if s.load != "empty" else 0)], "would wait for ever"
    ),
}  # fmt: skip
MESH = Mesh((("dp", 3),))


@pytest.mark.parametrize("name", RANKS)
def test_ranks_that_disagree_are_refused(name: str) -> None:
    runs, why = RANKS[name]
    with pytest.raises(CollectivesError) as error:
        prove(sequences(), runs, MESH, (1, 8), (False, True), (0, 2))
    assert why in str(error.value), str(error.value)


@pytest.mark.parametrize(
    "runs",
    [
        lambda _r, _s, a: ["live"] if a.prefill else ["layer"],
        lambda _r, _s, a: ["overlapped"] if a.overlap else ["layer"],
        lambda _r, _s, a: ["layer", *["draft"] * a.drafts],
        lambda _r, _s, a: ["layer"] if a.rows > 1 else ["live"],
    ],
)
def test_what_all_ranks_know_may_choose(runs: Runs) -> None:
    assert prove(sequences(), runs, MESH, (1, 8), (False, True), (0, 2)).states > 100


def test_ranks_of_a_tp_group_may_have_sizes_of_their_own() -> None:
    """Two tp groups serve other requests: their sums have other sizes, and no rank of one waits for the other."""
    found = {"layer": Graph.of("tp=4", "gather").check()}
    assert found["layer"][0].size.startswith("T x")
    assert prove(found, lambda *_: ["layer"], Mesh((("dp", 2), ("tp", 2))), (1, 8)).longest == 2
