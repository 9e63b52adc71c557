"""The shard pass: the ranks' graphs together compute what the whole graph computes, whatever each rank has to do."""

from __future__ import annotations

import pytest
import torch

from atomc.ops import Batch
from atomc.parallel.layout import parse_layout
from atomc.passes.shard import Form
from tests.support.eager import Caches, Piece, Step, make_batch, new_caches
from tests.support.sharded import CONFIG, CONTEXT, LAYOUTS, LONGEST, compiled
from tests.support.v4_configs import random_ids


def empty(caches: Caches) -> Batch:
    """A step of a rank that has no request."""
    one = make_batch(CONFIG, [(0, 0, torch.zeros(1, dtype=torch.int64))], caches)
    none = torch.zeros(0, dtype=torch.int32)
    return one._replace(
        ids=none, positions=none, requests=none, query_start=torch.zeros(1, dtype=torch.int32), slots=none,
        window_table=one.window_table[:0], block_table=one.block_table[:0], logit_rows=none,
        csa_ends=none, hca_ends=none,
    )  # fmt: skip


def compare(layout: str, form: Form, loads: list[list[Step]]) -> float:
    """The largest difference of any logit, relative to the largest; `loads`: dp rank -> steps of its requests."""
    ours, alone = compiled(layout, form), compiled("dp=1")
    tp = ours.layout.tp
    many = [new_caches(CONFIG, 3, CONTEXT, longest_step=LONGEST) for _ in range(ours.layout.ranks)]
    single = [new_caches(CONFIG, 3, CONTEXT, longest_step=LONGEST) for _ in loads]
    done = [[0, 0, 0] for _ in loads]
    worst = 0.0
    with torch.no_grad():
        for at in range(max(map(len, loads))):
            batches, references = [], []
            for load, caches, counts in zip(loads, single, done, strict=True):
                step = load[at] if at < len(load) else []
                ids = [random_ids(CONFIG, 60, i) for i in range(3)]
                pieces: list[Piece] = [(i, counts[i], ids[i][counts[i] : counts[i] + n]) for i, n in step]
                for i, n in step:
                    counts[i] += n
                batches.append(make_batch(CONFIG, pieces, caches) if pieces else empty(caches))
                references.append(batches[-1])
            rows = max(len(b.ids) for b in batches) + 3
            got = ours.step([b for b in batches for _ in range(tp)], [c.states for c in many], rows)
            for index, (batch, caches) in enumerate(zip(references, single, strict=True)):
                if len(batch.ids):
                    (want,) = alone.step([batch], [caches.states], 0)
                    for result in got[index * tp : index * tp + tp]:
                        assert not result.isnan().any()
                        worst = max(worst, float((result - want).abs().max() / want.abs().max()))
                else:
                    assert all(len(r) == 0 for r in got[index * tp : index * tp + tp])
    return worst


UNEVEN: list[list[Step]] = [
    [[(0, 20), (1, 5)], [(0, 1), (1, 1), (2, 3)], [(2, 1)]],
    [[(0, 1)], [(0, 16)], [(0, 1)]],
    [[(1, 33)], [], [(1, 1)]],
    [],
]


@pytest.mark.parametrize(("layout", "form"), LAYOUTS)
def test_ranks_together_compute_what_one_rank_does(layout: str, form: Form) -> None:
    dp = parse_layout(layout).dp
    assert compare(layout, form, [UNEVEN[i % 4] for i in range(dp)]) <= 1e-5
