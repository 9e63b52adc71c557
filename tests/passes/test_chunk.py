"""Two micro-batches compute what the whole step does: bitwise where operators treat tokens alone, state included."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

import atomc.ops  # noqa: F401  # registers the operators
from atomc.ops import Batch
from atomc.ops.batch import middle, split_batch
from atomc.passes.canonicalize import Canonicalize
from atomc.passes.chunk import Chunk
from atomc.passes.graph import PassError, mutated_args, order_edges
from atomc.passes.row_wise import free_symbols
from atomc.passes.runner import Context, run_pipeline
from atomc.recipes import Load
from tests.support.eager import Caches, Piece, make_batch, new_caches
from tests.support.micro_batches import Cuts, cut_model, operators, state_tensors
from tests.support.v4_configs import random_ids

LENGTHS = (35, 35, 12)  # 7003, 6928 and 2453 tokens, divided by 200
PREFIX = (40, 0, 70)  # tokens of each request that were there before; nano's window is 64
MATRIX = "the matrix library chooses its kernel by the number of rows, and rounds sums in another order"
VECTOR = (
    "elements past the last whole vector of the flattened tensor are computed by scalar functions of other rounding"
)
# Operators whose result for a token may depend on how many tokens there are, on a CPU.
DEPENDENT = {
    "aten.linear.default": MATRIX, "aten.bmm.default": MATRIX, "atom.moe_experts.default": MATRIX,
    "atom.moe_experts_quant.default": MATRIX, "atom.index_rope_topk.default": MATRIX,
    "atom.hc_head_norm.default": f"{MATRIX}; {VECTOR}", "atom.hc_post_pre_norm.default": f"{MATRIX}; {VECTOR}",
    "atom.hc_post_pre_norm_quant.default": f"{MATRIX}; {VECTOR}",
    "atom.sparse_attention_inverse_rope_quant.default": MATRIX,
    "atom.route_topk.default": VECTOR, "atom.route_hash.default": VECTOR,
}  # fmt: skip


@pytest.fixture(scope="module")
def nano() -> Cuts:
    return cut_model("deepseek-v4-nano")


def started(cuts: Cuts, prefix: tuple[int, ...] = PREFIX) -> tuple[Caches, list[Tensor]]:
    """Caches that hold the first tokens of three requests, and the requests' tokens."""
    config = cuts.source.config
    caches = new_caches(config, 3, 256, longest_step=512)
    ids = [random_ids(config, p + n, seed) for seed, (p, n) in enumerate(zip(prefix, LENGTHS, strict=True))]
    pieces: list[Piece] = [(i, 0, tokens[:p]) for i, (tokens, p) in enumerate(zip(ids, prefix, strict=True)) if p]
    if pieces:
        cuts.whole(make_batch(config, pieces, caches), caches)
    return caches, ids


class RowByRow:
    """Calls operators of `DEPENDENT` for one token at a time: what a token gives is then a function of it alone.

    A row that was computed is remembered, so that the many cuts of one step take no longer than it does.
    """

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def __call__(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target: Any = node.target
        if str(target) not in DEPENDENT or str(target) == "atom.index_rope_topk.default":
            return target(*args, **kwargs)
        dim = 1 if str(target) == "aten.bmm.default" else 0
        cut = [_by_token(a, node.args[0], dim) for a in node.args]
        whole = tuple(_key(a) for a, c in zip(args, cut, strict=True) if not c)
        rows = []
        for row in range(args[0].shape[dim]):
            mine = [a.narrow(dim, row, 1).contiguous() if c else a for a, c in zip(args, cut, strict=True)]
            key = (str(target), whole, *(_key(a) for a, c in zip(mine, cut, strict=True) if c))
            if key not in self.known:
                self.known[key] = target(*mine, **kwargs)
            rows.append(self.known[key])
        if isinstance(rows[0], Tensor):
            return torch.cat(rows, dim)
        return [torch.cat(parts, dim) for parts in zip(*rows, strict=True)]


def _by_token(argument: Any, first: Any, dim: int) -> bool:
    """Whether an argument has a row for each token, as the first one has."""
    value = argument.meta.get("val") if isinstance(argument, Node) else None
    return (
        isinstance(value, Tensor) and value.dim() > dim and str(value.shape[dim]) == str(first.meta["val"].shape[dim])
    )


def _key(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return str(value)
    return value.shape, hash(value.contiguous().view(torch.uint8).numpy().tobytes())


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bitwise, NaN of places that nobody wrote included."""
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def compare(cuts: Cuts, batch: Batch, cuts_at: list[int], start: Caches, call_op: Any = None) -> Iterator[Any]:
    """(cut, largest difference of logits, whether logits and state are bitwise equal) for each cut of one step."""
    caches = copy.deepcopy(start)
    want, _ = cuts.whole(batch, caches, call_op)
    assert not want.isnan().any()
    for cut in cuts_at:
        mine = copy.deepcopy(start)
        got, _ = cuts.halves(split_batch(batch, cut), mine, call_op)
        same = equal([want, *state_tensors(caches)], [got, *state_tensors(mine)])
        yield cut, float((got - want).abs().max()), same


def step(cuts: Cuts, caches: Caches, ids: list[Tensor], lengths: tuple[int, ...] = LENGTHS) -> Batch:
    pieces: list[Piece] = [(i, PREFIX[i], ids[i][PREFIX[i] :][:n]) for i, n in enumerate(lengths) if n]
    return make_batch(cuts.source.config, pieces, caches)


def test_the_middle_of_a_prefill_is_the_whole_step(nano: Cuts) -> None:
    """Token by token bitwise, at the middle (a request straddles it), near the ends, between requests."""
    caches, ids = started(nano)
    batch = step(nano, caches, ids)
    cut = middle(batch.query_start, by_requests=False)
    assert cut == 41
    for at, difference, same in compare(nano, batch, [cut, 1, 35, 81], caches, RowByRow()):
        assert same, (at, difference)


def test_every_cut_of_three_requests_is_the_whole_step(nano: Cuts) -> None:
    caches, ids = started(nano)
    batch = step(nano, caches, ids)
    for at, difference, same in compare(nano, batch, list(range(1, sum(LENGTHS))), caches, RowByRow()):
        assert same, (at, difference)


def test_with_the_matrix_library_as_it_is(nano: Cuts) -> None:
    caches, ids = started(nano)
    for at, difference, _ in compare(nano, step(nano, caches, ids), [1, 17, 41, 70, 81], caches):
        assert difference <= 1e-5, at


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 0, 1), (1, 9, 1)])
def test_decode_is_cut_between_requests(nano: Cuts, lengths: tuple[int, ...]) -> None:
    caches, ids = started(nano)
    batch = step(nano, caches, ids, lengths)
    cut = middle(batch.query_start, by_requests=True)
    assert cut in batch.query_start
    assert 0 < cut < batch.ids.shape[0]
    assert all(same for _, _, same in compare(nano, batch, [cut], caches, RowByRow()))


def test_only_operators_that_are_known_to_depend_on_the_number_of_tokens_do(nano: Cuts) -> None:
    """Given the same inputs, every operator but those of `DEPENDENT` gives each token the same bits in its half."""
    caches, ids = started(nano)
    batch, found = step(nano, caches, ids), set()
    _, whole = nano.whole(batch, copy.deepcopy(caches))
    for cut in (1, 6, 30, 41, 81):
        _, halves = nano.halves(split_batch(batch, cut), copy.deepcopy(caches))
        for call, of_whole, of_halves in zip(nano.program.calls, whole, halves, strict=True):
            same: dict[Node, bool] = {}
            for node in nano.regions[call.region].whole.graph.nodes:
                parts = [of_halves.get(f"{node.name}_{half}") for half in (0, 1)]
                same[node] = parts[0] is None or _joined(of_whole[node.name], parts)
                if node.op == "call_function" and not same[node] and all(same[n] for n in node.all_input_nodes):
                    found.add(str(node.target))
    assert sorted(found - DEPENDENT.keys()) == []


def _joined(value: Any, parts: list[Any]) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_joined(v, list(p)) for v, p in zip(value, zip(*parts, strict=True), strict=True))
    if not isinstance(value, Tensor):
        return True
    for dim in range(value.dim()):
        if sum(p.shape[dim] for p in parts) == value.shape[dim] and parts[0].shape[:dim] == value.shape[:dim]:
            return equal([value.contiguous()], [torch.cat(parts, dim).contiguous()])
    return True  # padded windows: their number is not the sum of the halves'


def test_the_halves_do_the_same_operations_twice(nano: Cuts) -> None:
    """All but what depends on no batch, value or rope table of the step: weights' views and state's."""
    for cut in nano.regions.values():
        whole, halves = operators(cut.whole), operators(cut.halves)
        of_step = {p for p, (role, _) in cut.inputs.items() if role in ("batch", "value")}
        own: set[Node] = set()
        shared: Counter[str] = Counter()
        for node in cut.whole.graph.nodes:
            if node.name in of_step or own & set(node.all_input_nodes):
                own.add(node)
            elif node.op == "call_function":
                shared[str(node.target)] += 1
        assert halves == whole + whole - shared


def test_each_half_has_sizes_of_its_own(nano: Cuts) -> None:
    for cut in nano.regions.values():
        chunked = cut.ctx.chunked
        assert chunked is not None
        assert not set(chunked.symbols) & set(chunked.symbols.values())
        values = {node.name: node.meta.get("val") for node in cut.halves.graph.nodes}
        twice = [
            node.name for node in cut.whole.graph.nodes if f"{node.name}_1" in values and f"{node.name}_0" in values
        ]
        assert set(chunked.inputs) <= set(twice)
        assert not any(free_symbols(values[f"{name}_1"]) & set(chunked.symbols) for name in twice)


def test_the_second_half_touches_state_after_the_first(nano: Cuts) -> None:
    """Whatever order a schedule takes: of two that touch a cache, one writing, the first half's comes first."""
    for cut in nano.regions.values():
        before = order_edges(cut.halves.graph)
        edges = {node: set(edges) for node, edges in before.items()}
        for node in cut.halves.graph.nodes:  # closed over
            edges[node] = edges[node].union(*(edges[n] for n in edges[node]))
        users: dict[str, list[Node]] = {}
        for node in cut.halves.graph.nodes:
            for argument in node.all_input_nodes if node.op == "call_function" else []:
                if argument.name in cut.ctx.states:
                    users.setdefault(argument.name, []).append(node)
        for touching in users.values():
            for a in touching:
                for b in touching:
                    writes = mutated_args(a) or mutated_args(b)
                    if writes and a.name.endswith("_0") and b.name.endswith("_1"):
                        assert a in edges[b], (cut.ctx.region, a, b)
        assert users or not cut.ctx.states


def test_the_wrong_order_would_show(nano: Cuts) -> None:
    """The halves the other way round: a straddling request would not find its first tokens."""
    caches, ids = started(nano)
    batch = step(nano, caches, ids)
    halves = split_batch(batch, 41)
    want, _ = nano.whole(batch, copy.deepcopy(caches))
    turned, _ = nano.halves(halves._replace(first=halves.second, second=halves.first), copy.deepcopy(caches))
    assert not torch.allclose(torch.cat((turned[41:], turned[:41])), want, atol=1e-3)


# -- refused -----------------------------------------------------------------------------------------------------------


def graph_of(function: Any, *arguments: Tensor) -> tuple[GraphModule, frozenset[str]]:
    gm = make_fx(function, tracing_mode="symbolic", pre_dispatch=True)(*arguments)
    first = next(iter(gm.graph.nodes))
    return gm, frozenset({str(first.meta["val"].shape[0])})


def refused(function: Any, *arguments: Tensor) -> str:
    gm, symbols = graph_of(function, *arguments)
    with pytest.raises(PassError) as error:
        run_pipeline((Canonicalize(), Chunk(symbols)), gm, Context("layer"))
    return str(error.value)


def test_a_graph_before_and_after() -> None:
    gm, symbols = graph_of(lambda x, w: torch.ops.aten.linear(x, w).relu(), torch.ones(5, 4), torch.ones(4, 4))
    ctx = Context("layer")
    run_pipeline((Canonicalize(), Chunk(symbols)), gm, ctx)
    lines = [line.strip().split("; ")[0] for line in gm.code.splitlines() if " = " in line or "return" in line]
    assert lines == [
        "linear_0 = torch.ops.aten.linear.default(x_1_0, w_1)",
        "relu_0 = torch.ops.aten.relu.default(linear_0)",
        "linear_1 = torch.ops.aten.linear.default(x_1_1, w_1)",
        "relu_1 = torch.ops.aten.relu.default(linear_1)",
        "return (relu_0, relu_1)",
    ]
    assert ctx.chunked is not None
    assert dict(ctx.chunked.inputs) == {"x_1": ("x_1_0", "x_1_1")}
    assert ctx.chunked.results == 1


def linear(x: Any, w: Any) -> Any:
    return torch.ops.aten.linear.default(x, w)


JOINS = {
    "a sum over tokens": lambda x: x - x.sum(0),
    "a running sum": lambda x: x.cumsum(0),
    "a softmax over tokens": lambda x: x.softmax(0),
    "tokens in reverse": lambda x: x.flip(0),
    "tokens moved by one": lambda x: x.roll(1, 0),
    "every pair of tokens": lambda x: linear(linear(x, x), x.t()),
    "a product over tokens": lambda x: linear(linear(x.t(), x.t()), x),
    "the other half of the tokens": lambda x: x[: x.shape[0] - 1],
    "the number of tokens as a factor": lambda x: x * x.shape[0],
    "the number of tokens in a sum": lambda x: x + x.shape[0],
    "the number of tokens as a value": lambda x: x * torch.full((4,), x.shape[0]),
    "the place of a token in the step": lambda x: x + torch.arange(x.shape[0])[:, None],
    "a token's place as a row": lambda x: x.reshape(-1, 2, 2).transpose(0, 1).reshape(-1, 4),
}


@pytest.mark.parametrize("what", JOINS)
def test_what_does_not_treat_tokens_one_by_one_is_refused(what: str) -> None:
    gm, symbols = graph_of(JOINS[what], torch.ones(5, 4))
    with pytest.raises(PassError, match="does not treat tokens one by one"):
        Chunk(symbols).run(gm, Context("layer"))


def test_a_constant_as_long_as_the_step_is_one_of_each_half() -> None:
    gm, symbols = graph_of(lambda x: x.reshape(x.shape[0], 2, 2) + torch.ones(x.shape[0], 1, 2), torch.ones(5, 4))
    ctx = Context("layer")
    Chunk(symbols).run(gm, ctx)
    gm.recompile()
    first, second = gm(torch.ones(2, 4), torch.ones(3, 4))
    assert (first.shape, second.shape) == ((2, 2, 2), (3, 2, 2))


def test_random_numbers_are_refused() -> None:
    assert "drawn once more" in refused(lambda x: torch.ops.aten.bernoulli.p(x, 0.5), torch.ones(5, 4))


def test_a_result_without_tokens_is_refused() -> None:
    assert "depends on no token" in refused(lambda x, w: (x * 2, w + 1), torch.ones(5, 4), torch.ones(3))


def test_no_symbol_no_halves() -> None:
    gm, _ = graph_of(lambda x: x * 2, torch.ones(5, 4))
    with pytest.raises(PassError, match="no input has a size of s999"):
        run_pipeline((Canonicalize(), Chunk(frozenset({"s999"}))), gm, Context("layer"))


def test_a_weight_with_a_size_of_the_step_is_refused() -> None:
    gm, symbols = graph_of(lambda x: x * 2, torch.ones(5, 4))
    ctx = Context("layer", weights={"x_1": Load("w")})
    with pytest.raises(PassError, match="x_1 is a weight or state"):
        run_pipeline((Canonicalize(), Chunk(symbols)), gm, ctx)
