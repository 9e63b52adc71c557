"""Fuse: what it replaces, what it refuses and why, and where it puts the fused operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atomc.passes import fusions
from atomc.passes.fuse import Fuse
from atomc.passes.graph import PassError
from atomc.passes.pattern import Of, Spelling
from tests.support.graphs import TOKENS, apply, assert_same, by_references, operators, randn, report, text, traced

atom = torch.ops.atom


def norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    x_f = x.float()
    return (x_f * torch.rsqrt(x_f.square().mean(-1, keepdim=True) + eps) * w).to(x.dtype)


# -- golden graphs -----------------------------------------------------------------------------------------------------


def test_two_norms_become_two_operators() -> None:
    gm = traced(lambda x, w, v: norm(norm(x, w), v, 1e-3).relu(), randn(TOKENS, 8), randn(8), randn(8))
    apply(gm, fusions.RMS_NORM, expected={"fuse_rms_norm": 2})
    assert text(gm) == (
        "rms_norm_default_1 = atom.rms_norm(x_1, w_1, 1e-06)\n"
        "rms_norm_default = atom.rms_norm(rms_norm_default_1, v_1, 0.001)\n"
        "relu = aten.relu(rms_norm_default)"
    )


def test_the_casts_of_bf16_belong_to_the_operator() -> None:
    bf16 = torch.bfloat16
    gm = traced(lambda x, w: norm(x, w), randn(TOKENS, 8, dtype=bf16), randn(8))
    apply(gm, fusions.RMS_NORM)
    assert operators(gm) == ["atom.rms_norm"]


def test_a_norm_between_casts_of_its_own_is_fused_in_fp32() -> None:
    """The casts are not the norm's: it is given fp32 and gives fp32."""
    gm = traced(lambda x, w: norm(x.float(), w).relu().to(x.dtype), randn(TOKENS, 8, dtype=torch.bfloat16), randn(8))
    apply(gm, fusions.RMS_NORM)
    assert operators(gm) == ["aten.to.dtype", "atom.rms_norm", "aten.relu", "aten.to.dtype"]


def test_half_precision_is_a_compute_dtype_too() -> None:
    gm = traced(lambda x, w: norm(x, w), randn(TOKENS, 8, dtype=torch.float16), randn(8))
    apply(gm, fusions.RMS_NORM, expected={"fuse_rms_norm": 1})


def test_the_fused_node_carries_provenance() -> None:
    gm = traced(lambda x, w: norm(x, w), randn(TOKENS, 8), randn(8))
    (match,) = report(gm, fusions.RMS_NORM).matches
    assert match.where.startswith("passes/test_fuse.py:")
    assert match.module.endswith("[reference]")
    (fused,) = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert all(where.startswith("passes/test_fuse.py:") for where in fused.meta["fused_from"])


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_an_inner_result_that_is_needed_elsewhere_is_kept() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x * rstd * w, rstd

    gm = traced(fn, randn(TOKENS, 8), randn(8))
    found = report(gm, fusions.RMS_NORM)
    assert not found.matches
    assert found.refusals[0].reason.startswith("rsqrt, computed inside, is also used by output")
    assert "atom.rms_norm" not in operators(gm)


def test_a_view_of_an_input_may_be_used_elsewhere() -> None:
    def fn(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        pe = x[..., -4:]
        a, b = pe[..., 0::2], pe[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        return torch.cat((x[..., :-4], turned), dim=-1), pe.sum()

    gm = traced(fn, randn(TOKENS, 8), randn(TOKENS, 2), randn(TOKENS, 2))
    apply(gm, fusions.ROPE, expected={"fuse_rope": 1})
    assert sorted(operators(gm)) == ["aten.slice.Tensor", "aten.sum", "atom.rope"]


def test_a_match_that_must_run_before_and_after_a_node_is_refused() -> None:
    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        first = x.relu() * 2
        return first, (y * first.sum()).sigmoid() * 3

    both = Fuse(
        "rms_norm_pair",
        (Spelling(lambda q, kv: (q.relu() * 2, kv.sigmoid() * 3), {"q": Of((7, 22)), "kv": Of((7, 22))}),),
    )
    found = report(traced(fn, randn(TOKENS, 8), randn(TOKENS, 8)), both)
    assert not found.matches
    assert "must run both after and before a part of it" in found.refusals[0].reason


def test_a_match_across_a_write_is_refused() -> None:
    """The operator would read x once; the graph reads it before and after it is written."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        x[:1].mul_(2)
        return x * rstd * w

    inputs = randn(TOKENS, 8), randn(8)
    gm = traced(fn, *inputs)
    found = report(gm, fusions.RMS_NORM)
    assert not found.matches
    assert "mul_" in found.refusals[0].reason
    assert_same(gm(inputs[0].clone(), inputs[1]), fn(inputs[0].clone(), inputs[1]))


def test_a_spelling_that_is_not_the_operator_is_an_error() -> None:
    wrong = Fuse("swiglu", (Spelling(lambda gate, up, limit: (gate.clamp(max=limit) * up).sum(-1),
                                     {"gate": Of((7, 22)), "up": Of((7, 22)), "limit": 3.21}),))  # fmt: skip
    gm = traced(lambda a, b: (a.clamp(max=2.0) * b).sum(-1), randn(TOKENS, 8), randn(TOKENS, 8))
    with pytest.raises(PassError, match=r"the operator gives .* The spelling does not say"):
        apply(gm, wrong)


# -- alternatives ------------------------------------------------------------------------------------------------------


def test_alternative_spellings_are_tried_in_turn_and_named() -> None:
    def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return fusions._half_rotated(x, cos, sin)

    gm = traced(halves, randn(2, 3, TOKENS, 8), randn(2, TOKENS, 2), randn(2, TOKENS, 2))
    (match,) = report(gm, fusions.ROPE).matches
    assert match.module.endswith("[transformers]")
    assert operators(gm) == ["aten.unsqueeze", "aten.unsqueeze", "atom.rope"]


def test_the_doubled_angles_are_shared_by_all_that_is_rotated() -> None:
    def two(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return fusions._half_rotated(x, cos, sin), fusions._half_rotated_back(y, cos, sin)

    inputs = randn(2, 3, TOKENS, 8), randn(2, 1, TOKENS, 8), randn(2, TOKENS, 2), randn(2, TOKENS, 2)
    gm = traced(two, *inputs)
    apply(gm, fusions.ROPE_INVERSE, fusions.ROPE, expected={"fuse_rope": 1, "fuse_rope_inverse": 1})
    assert set(operators(gm)) == {"aten.unsqueeze", "atom.rope"}
    assert_same(by_references(gm, *inputs), two(*inputs))


# -- the order of effects ----------------------------------------------------------------------------------------------


def insert_and_read(
    q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, table: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The q half is computed after the cache is read, the insertion comes before: the operator must do both before."""
    atom.cache_insert(cache, atom.rope(kv, cos, sin, False), table, rows, rows)
    total = cache.sum(dim=(0, 1))
    return atom.rope(atom.rms_norm(q, None, 1e-6), cos.unsqueeze(-2), sin.unsqueeze(-2), False), total


def test_a_fused_insertion_stays_before_the_reader() -> None:
    def inputs() -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        rows = torch.zeros(TOKENS, dtype=torch.int32)
        return (randn(TOKENS, 3, 8), randn(TOKENS, 8), randn(TOKENS, 2), randn(TOKENS, 2), torch.zeros(3, 4, 8),
                torch.ones(1, 2, dtype=torch.int32), rows)  # fmt: skip

    plain = traced(insert_and_read, *inputs())
    gm = traced(insert_and_read, *inputs())
    apply(gm, fusions.QK_NORM_ROPE_INSERT, expected={"fuse_qk_norm_rope_insert": 1})
    assert operators(gm) == ["atom.qk_norm_rope_insert", "aten.sum.dim_IntList"]
    assert_same(by_references(gm, *inputs()), by_references(plain, *inputs()))


def read_between(
    q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, table: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The q half needs what is read from the cache after the insertion."""
    atom.cache_insert(cache, atom.rope(kv, cos, sin, False), table, rows, rows)
    q = q + cache.sum()
    return atom.rope(atom.rms_norm(q, None, 1e-6), cos.unsqueeze(-2), sin.unsqueeze(-2), False), q


def test_an_insertion_that_q_depends_on_is_not_fused_with_q() -> None:
    rows = torch.zeros(TOKENS, dtype=torch.int32)
    gm = traced(read_between, randn(TOKENS, 3, 8), randn(TOKENS, 8), randn(TOKENS, 2), randn(TOKENS, 2),
                torch.zeros(3, 4, 8), torch.ones(1, 2, dtype=torch.int32), rows)  # fmt: skip
    found = report(gm, fusions.QK_NORM_ROPE_INSERT)
    assert not found.matches
    assert "both after and before" in found.refusals[0].reason


# -- reading loop counts off the graph ---------------------------------------------------------------------------------


@pytest.mark.parametrize("iters", [1, 2, 5])
def test_sinkhorn_counts(iters: int) -> None:
    from atomc.ops.hyper_connection import sinkhorn

    gm = traced(lambda a: sinkhorn(torch.softmax(a, -1) + 1e-6, 1e-6, iters), randn(TOKENS, 4, 4))
    apply(gm)
    assert fusions.sinkhorn_counts(gm.graph) == [{"iters": iters}]


def test_no_sinkhorn_no_count() -> None:
    gm = traced(lambda a: F.softmax(a, -1) / 2, randn(TOKENS, 4))
    assert fusions.sinkhorn_counts(gm.graph) == []
