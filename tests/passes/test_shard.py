"""The shard pass: the ranks' graphs together compute what the whole graph computes, whatever each rank has to do."""

from __future__ import annotations

import pytest
import torch

from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.ops import Batch
from atomc.parallel.layout import parse_layout
from atomc.passes.shard import Form
from tests.support.eager import Caches, Piece, Step, make_batch, new_caches
from tests.support.sharded import CONFIG, CONTEXT, LAYOUTS, LONGEST, Compiled, bundled, compiled
from tests.support.v4_configs import random_ids


def empty(config: DeepseekV4Config, caches: Caches) -> Batch:
    """A step of a rank that has no request."""
    one = make_batch(config, [(0, 0, torch.zeros(1, dtype=torch.int64))], caches)
    none = torch.zeros(0, dtype=torch.int32)
    return one._replace(
        ids=none, positions=none, requests=none, query_start=torch.zeros(1, dtype=torch.int32), slots=none,
        window_table=one.window_table[:0], block_table=one.block_table[:0], logit_rows=none,
        csa_ends=none, hca_ends=none,
    )  # fmt: skip


def compare(config: DeepseekV4Config, ours: Compiled, alone: Compiled, loads: list[list[Step]]) -> float:
    """The largest difference of any logit, relative to the largest; `loads`: dp rank -> steps of its requests."""
    tp, ids = ours.layout.tp, [random_ids(config, 60, i) for i in range(3)]
    many = [new_caches(config, 3, CONTEXT, longest_step=LONGEST) for _ in range(ours.layout.ranks)]
    single = [new_caches(config, 3, CONTEXT, longest_step=LONGEST) for _ in loads]
    done = [[0, 0, 0] for _ in loads]
    worst = 0.0
    for at in range(max(map(len, loads))):
        batches = []
        for load, caches, counts in zip(loads, single, done, strict=True):
            step = load[at] if at < len(load) else []
            pieces: list[Piece] = [(i, counts[i], ids[i][counts[i] : counts[i] + n]) for i, n in step]
            for i, n in step:
                counts[i] += n
            batches.append(make_batch(config, pieces, caches) if pieces else empty(config, caches))
        rows = max(len(b.ids) for b in batches) + 3
        with torch.no_grad():
            got = ours.step([b for b in batches for _ in range(tp)], [c.states for c in many], rows)
        for index, (batch, caches) in enumerate(zip(batches, single, strict=True)):
            results = got[index * tp : index * tp + tp]
            if not len(batch.ids):
                assert all(len(r) == 0 for r in results)
                continue
            with torch.no_grad():
                (want,) = alone.step([batch], [caches.states], 0)
            for result in results:
                assert not result.isnan().any()
                worst = max(worst, float((result - want).abs().max() / want.abs().max()))
    return worst


UNEVEN: list[list[Step]] = [
    [[(0, 20), (1, 5)], [(0, 1), (1, 1), (2, 3)], [(2, 1)]],
    [[(0, 1)], [(0, 16)], [(0, 1)]],
    [[(1, 33)], [], [(1, 1)]],
    [],
]


def test_counted_sizes_leave_nothing_for_the_next_trace() -> None:
    """Torch would refuse to trace a pattern on these sizes once, and an operator would stay unfused."""
    for gm in compiled("dp=3,moe=ep", "route").graphs.values():
        sizes = [s for n in gm.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor) for s in v.shape]
        envs = {s.node.shape_env for s in sizes if isinstance(s, torch.SymInt)}
        assert envs and not any(env.pending_fresh_unbacked_symbols for env in envs)


@pytest.mark.parametrize(("layout", "form"), LAYOUTS)
def test_ranks_together_compute_what_one_rank_does(layout: str, form: Form) -> None:
    loads = [UNEVEN[i % 4] for i in range(parse_layout(layout).dp)]
    assert compare(CONFIG, compiled(layout, form), compiled("dp=1"), loads) <= 1e-5


@pytest.mark.parametrize(("layout", "form"), [("dp=3,moe=ep", "route"), ("dp=4,moe=ep", "gather")])
def test_all_tokens_may_go_to_the_experts_of_one_rank(layout: str, form: Form) -> None:
    loads = [UNEVEN[i % 4] for i in range(parse_layout(layout).dp)]
    ours, alone = compiled(layout, form, True), compiled("dp=1", "gather", True)
    assert compare(CONFIG, ours, alone, loads) <= 1e-5


@pytest.mark.parametrize("form", ["gather", "route"])
def test_not_a_bit_differs_where_no_sum_is_in_another_order(form: Form) -> None:
    """One rank has all experts that are chosen, another all tokens: its sums are those of one rank, and zeros."""
    loads: list[list[Step]] = [[], UNEVEN[0], []]
    ours, alone = compiled("dp=3,moe=ep", form, True), compiled("dp=1", "gather", True)
    assert compare(CONFIG, ours, alone, loads) == 0


def test_only_idle_ranks_but_one() -> None:
    assert compare(CONFIG, compiled("dp=3,moe=ep", "route"), compiled("dp=1"), [[], [], [[(0, 9)], [(0, 1)]]]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "form"),
    [("dp=2,moe=tp", "gather"), ("dp=4,moe=ep", "route"), ("tp=2", "gather"), ("dp=2,tp=2,moe=ep", "gather")],
)
def test_a_quantised_model_too(layout: str, form: Form) -> None:
    """What is sent is what was quantised, and blocks are never cut: only sums over ranks are in another order.

    A sum that differs in its last bit may round to the neighbouring code of the next layer, a 16th of a value away.
    """
    config, ours = bundled(layout, form)
    layers = [gm for name, gm in ours.graphs.items() if name.startswith("layer")]
    assert layers and all(any("_c10d_functional" in str(n.target) for n in gm.graph.nodes) for gm in layers)
    loads = [UNEVEN[i % 4] for i in range(ours.layout.dp)]
    assert compare(config, ours, bundled("dp=1")[1], loads) <= 1e-5
