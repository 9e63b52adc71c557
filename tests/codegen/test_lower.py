"""Lowering: sizes, storages, lifetimes, releases, and the graphs that have no plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from atomc.artifact.check_region import Problems, check_region
from atomc.artifact.plan import SYMBOLS, RegionPlan, Role, SlotInfo, Step
from atomc.codegen.lower import EXAMPLE, Lowering, LoweringError
from atomc.passes.graph import location
from atomc.targets import get_target

BOUNDS = dict.fromkeys(SYMBOLS, 1) | {"T": 64, "B": 8}
WIDTH = 16


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, arguments: dict[str, Tensor]) -> Any:
        return self.function(**arguments)


def captured(function: Callable[..., Any], **arguments: tuple[Role, tuple[int | str, ...]]) -> Lowering:
    """The lowering of a function of named arguments, each with a role and a shape; symbols are dynamic sizes."""
    shapes = {name: shape for name, (_, shape) in arguments.items()}
    tensors = {n: torch.randn([EXAMPLE[s] if isinstance(s, str) else s for s in shape]) for n, shape in shapes.items()}
    dims = {s: Dim(s, min=1) for s in SYMBOLS}
    dynamic = {n: {i: dims[s] for i, s in enumerate(shape) if isinstance(s, str)} for n, shape in shapes.items()}
    program = export(Function(function), (tensors,), dynamic_shapes=(dynamic,), strict=False)
    symbols: dict[str, str] = {}
    names: dict[str, tuple[Role, str]] = {}
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    for (name, (role, shape)), spec in zip(arguments.items(), program.graph_signature.input_specs, strict=True):
        names[spec.arg.name] = role, name
        for size, symbol in zip(nodes[spec.arg.name].meta["val"].shape, shape, strict=True):
            if isinstance(symbol, str):
                symbols[str(size)] = symbol
    gm = program.graph_module
    for node in list(gm.graph.nodes):  # as canonicalization leaves it
        if "_assert" in str(node.target):
            gm.graph.erase_node(node)
    count = len(torch.utils._pytree.tree_leaves(next(n for n in gm.graph.nodes if n.op == "output").args))
    return Lowering(
        "region", gm, names, [f"out{i}" for i in range(count)], symbols, BOUNDS, location, get_target("cpu")
    )


def lowered(function: Callable[..., Any], **arguments: tuple[Role, tuple[int | str, ...]]) -> RegionPlan:
    """A plan that the checker accepts."""
    plan = captured(function, **arguments).run()
    problems = Problems()
    check_region(problems, plan, {}, BOUNDS)
    assert problems.found == []
    return plan


def slots_of(plan: RegionPlan, op: str) -> list[SlotInfo]:
    return [plan.slots[s] for step in steps_of(plan, op) for s in step.outputs if s is not None]


def steps_of(plan: RegionPlan, op: str) -> list[Step]:
    return [s for s in plan.steps if s.op == op]


X: tuple[Role, tuple[int | str, ...]] = ("value", ("T", WIDTH))


def test_sizes_are_expressions_of_the_plans_symbols() -> None:
    plan = lowered(lambda x: torch.cat((x, x)).exp() + x.new_zeros(2 * x.shape[0], WIDTH), x=X)
    assert [s.shape for s in slots_of(plan, "aten.exp.default")] == [["2*T", WIDTH]]
    assert plan.steps[-1].source != ""


def test_a_view_has_its_bases_storage_and_keeps_it_alive() -> None:
    def function(x: Tensor) -> Tensor:
        base = x.exp()
        view = base[:, 2:5].transpose(0, 1)
        other = x.sin().cos()
        return other.sum() + view.sum()

    plan = lowered(function, x=X)
    base = next(i for i, s in enumerate(plan.slots) if s.name == "exp")
    views = slots_of(plan, "aten.slice.Tensor") + slots_of(plan, "aten.transpose.int")
    assert [v.base for v in views] == [base] * len(views)
    assert all(v.offset is None and v.last == plan.slots[base].last for v in views)
    read = max(i for i, s in enumerate(plan.steps) if s.op == "aten.sum.default")
    assert plan.slots[base].last == read
    assert base in plan.steps[read].release


def test_a_reshape_that_must_copy_has_a_storage_of_its_own() -> None:
    def function(x: Tensor) -> Tensor:
        flat = x.exp().reshape(-1, 4)
        turned = x.exp().transpose(0, 1).reshape(-1)
        return flat.sum() + turned.sum()

    plan = lowered(function, x=X)
    bases = [s.base is None for s in slots_of(plan, "aten.reshape.default")]
    assert bases == [False, True]


@pytest.mark.parametrize("role", ["weight", "value", "state"])
def test_a_view_of_an_input_takes_no_memory_and_releases_nothing_of_it(role: Role) -> None:
    plan = lowered(lambda x, w: x @ w.transpose(0, 1).reshape(WIDTH, 4), x=X, w=(role, (4, WIDTH)))
    steps = [*plan.prepare, *plan.steps]
    view = next(plan.slots[s] for step in steps if step.op == "aten.transpose.int" for s in step.outputs)
    owner = next(i.slot for i in plan.inputs if i.name == "w")
    assert (view.role, view.base, view.offset) == ("prepared" if role == "weight" else "temporary", owner, None)
    assert all(owner not in s.release for s in plan.steps)


def test_what_is_made_of_weights_alone_is_made_once() -> None:
    def function(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return x @ (w * s).transpose(0, 1) + w.sum()

    plan = lowered(function, x=X, w=("weight", (4, WIDTH)), s=("weight", (4, 1)))
    assert [s.op for s in plan.prepare] == ["aten.mul.Tensor", "aten.transpose.int", "aten.sum.default"]
    made = [plan.slots[s] for step in plan.prepare for s in step.outputs if s is not None]
    assert {m.role for m in made} == {"prepared"} and all(m.first == -1 and m.offset is None for m in made)
    assert not {"aten.mul.Tensor", "aten.sum.default"} & {s.op for s in plan.steps}


def test_a_weight_that_is_returned_or_written_into_prepares_nothing() -> None:
    plan = lowered(lambda x, w: (x.exp(), w * 2), x=X, w=("weight", (4, WIDTH)))
    assert plan.prepare == [] and len(steps_of(plan, "aten.mul.Tensor")) == 1


@pytest.mark.parametrize("result", [lambda w: (w * 2).t().contiguous(), lambda w: (w * 2).split(2)[1], lambda w: w.t()])
def test_what_is_returned_through_a_view_or_an_item_is_made_anew(result: Callable[[Tensor], Tensor]) -> None:
    plan = lowered(lambda x, w: (x.exp(), result(w).exp() * 1), x=X, w=("weight", (4, WIDTH)))
    assert plan.prepare == []


def test_a_mutated_temporary_lives_on() -> None:
    def function(x: Tensor) -> Tensor:
        base = x.exp()
        part = base[:, :3]
        part.add_(1.0)
        return base.sum(dim=-1)

    plan = lowered(function, x=X)
    added = steps_of(plan, "aten.add_.Tensor")[0]
    base = next(i for i, s in enumerate(plan.slots) if s.name == "exp")
    assert [plan.slots[s].base for s in added.outputs if s is not None] == [base]
    assert plan.slots[base].last == plan.steps.index(steps_of(plan, "aten.sum.dim_IntList")[0])


def test_a_mutated_state_is_no_temporary() -> None:
    def function(x: Tensor, cache: Tensor) -> Tensor:
        cache[:2].copy_(x[:2])
        return x.exp()

    plan = lowered(function, x=X, cache=("state", ("blocks", WIDTH)))
    owner = next(i.slot for i in plan.inputs if i.name == "cache")
    assert {s.base for s in slots_of(plan, "aten.copy_.default")} == {owner}
    assert all(owner not in step.release for step in plan.steps)


def test_a_result_that_nobody_reads_takes_memory_for_one_step() -> None:
    plan = lowered(lambda x: torch.topk(x, 2)[1] + 1, x=X)
    step = steps_of(plan, "aten.topk.default")[0]
    unread = step.outputs[0]
    assert unread is not None
    assert plan.slots[unread].first == plan.slots[unread].last == plan.steps.index(step)
    assert plan.slots[unread].offset is not None
    assert unread in step.release


def test_outputs_are_contiguous_and_stay() -> None:
    plan = lowered(lambda x: (x.exp().transpose(0, 1), x.unsqueeze(1).expand(-1, 3, -1)), x=X)
    assert [s.op for s in plan.steps[-2:]] == ["aten.contiguous.default"] * 2
    for slot in plan.outputs.values():
        info = plan.slots[slot]
        assert (info.role, info.last, info.offset) == ("value", len(plan.steps), None)
        assert all(slot not in s.release for s in plan.steps)


def test_two_outputs_of_one_storage() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        whole = x.exp()
        return whole, whole.view(-1)

    plan = lowered(function, x=X)
    first, second = plan.outputs.values()
    assert plan.slots[second].base == first


def test_temporaries_share_memory_where_they_do_not_meet() -> None:
    plan = lowered(lambda x: x.exp().sin().cos().tan(), x=X)
    assert plan.arena_bytes == 2 * 64 * WIDTH * 4


def test_the_arena_is_for_the_largest_sizes() -> None:
    plan = lowered(lambda x: x.exp().sin(), x=X)
    assert plan.arena_bytes == 64 * WIDTH * 4


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, w: (x + 1, w[:1]), "an output is a view of weight arguments_w"),
        (lambda x, w: x.masked_fill(x > 0, float("-inf")) + w[0], "non-finite constant -inf"),
    ],
)
def test_graphs_that_have_no_plan(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        captured(function, x=X, w=("weight", (4, WIDTH))).run()


def test_a_graph_whose_values_are_wrong_is_refused() -> None:
    lowering = captured(lambda x: x.exp().sin(), x=X)
    node = next(n for n in lowering.gm.graph.nodes if "exp" in n.name)
    node.meta["val"] = node.meta["val"].new_empty(3, WIDTH)
    with pytest.raises(LoweringError, match=r"the graph says \[3, 16\] torch.float32, but on .* it is \[11, 16\]"):
        lowering.run()


def test_a_size_of_no_input_is_refused() -> None:
    lowering = captured(lambda x: x.exp(), x=X)
    lowering.symbols = {}
    with pytest.raises(LoweringError, match="belongs to no input"):
        lowering.run()
