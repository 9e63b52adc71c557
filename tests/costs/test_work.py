"""Bytes and FLOPs of operators, against counts by hand; and that no operator with a kernel is without."""

from __future__ import annotations

from typing import Any

import pytest

from atomc.artifact.plan import Arg, DType, RegionPlan, Slot, SlotInfo, Step
from atomc.codegen.hosts import HOSTS
from atomc.costs.work import COSTS, CostError, Work, work_of

ACTIVATION, TILE, MXFP4 = "e4m3:1x128:e8m0:0.0001", "e4m3:128x128:e8m0", "e2m1:1x32:e8m0"
ROWS, INDEX_ROWS = "448:e4m3:1x64:e8m0:0.0001+64", "128:e4m3:1x128:pow2:0.0001+0"
SCALE, CODE = "float8_e8m0fnu", "float8_e4m3fn"
# 32 tokens of 2 requests of 4,000 tokens each.
SIZES = {"T": 32.0, "B": 2.0, "C": 4000.0, "L": 2.0, "N4": 8.0, "NH": 1.0}

Given = tuple[str, list[int | str]]  # dtype and shape of a tensor


def work(op: str, args: list[Any], results: list[Given]) -> Work:
    """The work of a call: tuples among the arguments are tensors."""
    slots: list[SlotInfo] = []

    def slot(given: Given) -> Slot:
        dtype, shape = given
        slots.append(SlotInfo(f"s{len(slots)}", "temporary", shape, dtype, None, 0, 0, None))
        return Slot(len(slots) - 1)

    made: list[Arg] = [
        [slot(x) for x in a] if isinstance(a, list) else slot(a) if isinstance(a, tuple) else a for a in args
    ]
    step = Step(op, made, {}, [slot(r).id for r in results], [], "model.py:1")
    return work_of(step, RegionPlan("r", [], {}, slots, [], [step], 0))


def test_every_operator_that_has_a_kernel_has_a_cost() -> None:
    assert {op.split(".")[1] for op in HOSTS} == set(COSTS)


def test_an_operator_without_a_cost_is_named() -> None:
    with pytest.raises(CostError, match=r"aten\.relu\.default \(model\.py:1\) has kernels, but nothing says"):
        work("aten.relu.default", [("float32", ["T"])], [("float32", ["T"])])


def test_linear() -> None:
    found = work("atom.linear_fp32.default", [("bfloat16", ["T", 64]), ("float32", [48, 64])], [("float32", ["T", 48])])
    assert str(found.bytes) == "320*T + 12288"
    assert str(found.count()) == "6144*T"
    assert found.flops[0].wide == 1  # the weight


def test_scaled_linear_counts_scales() -> None:
    pair, weight = [(CODE, ["T", 256]), (SCALE, ["T", 2])], [(CODE, [512, 256]), (SCALE, [4, 2])]
    args = [*pair, *weight, ACTIVATION, TILE, DType("bfloat16")]
    found = work("atom.scaled_linear.default", args, [("bfloat16", ["T", 512])])
    assert found.bytes.at(SIZES) == 32 * (256 + 2 + 2 * 512) + 512 * 256 + 8
    assert found.count().at(SIZES) == 2 * 32 * 256 * 512


def test_experts_are_read_once_if_some_token_chooses_them() -> None:
    experts, hidden, inner, chosen = 16, 256, 128, 4
    args = [
        (CODE, ["T", hidden]), (SCALE, ["T", 2]),
        ("int8", [experts, 2 * inner, hidden // 2]), (SCALE, [experts, 2 * inner, hidden // 32]),
        ("int8", [experts, hidden, inner // 2]), (SCALE, [experts, hidden, inner // 32]),
        ("int64", ["T", chosen]), ("float32", ["T", chosen]), 10.0, ACTIVATION, ACTIVATION, MXFP4, MXFP4,
        DType("bfloat16"),
    ]  # fmt: skip
    found = work("atom.scaled_moe_experts.default", args, [("float32", ["T", hidden])])
    one = 3 * hidden * inner * (1 / 2 + 1 / 32)  # bytes of an expert
    distinct = experts * (1 - (1 - chosen / experts) ** 32)
    assert found.bytes.at(SIZES) == pytest.approx(32 * (256 + 2 + 12 * chosen + 4 * hidden) + one * distinct)
    assert found.bytes.at({**SIZES, "T": 1.0}) == pytest.approx(256 + 2 + 12 * chosen + 4 * hidden + one * chosen)
    assert found.count().at(SIZES) == 32 * chosen * 2 * 3 * hidden * inner


def test_experts_in_full_precision() -> None:
    experts, hidden, inner, chosen = 16, 256, 128, 4
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        args = [
            (dtype, ["T", hidden]), (dtype, [experts, 2 * inner, hidden]), (dtype, [experts, hidden, inner]),
            ("int64", ["T", chosen]), ("float32", ["T", chosen]), 10.0,
        ]  # fmt: skip
        found = work("atom.moe_experts.default", args, [("float32", ["T", hidden])])
        one = 3 * hidden * inner * size
        assert found.bytes.at({**SIZES, "T": 1.0}) == pytest.approx((size + 4) * hidden + 12 * chosen + one * chosen)
        assert found.count().at(SIZES) == 32 * chosen * 2 * 3 * hidden * inner
        assert {f.wide for f in found.flops} == {2 if dtype == "float32" else 0}


def test_a_batched_product_and_a_copy() -> None:
    args = [("bfloat16", [8, "T", 64]), ("bfloat16", [8, 64, 48])]
    found = work("aten.bmm.default", args, [("bfloat16", [8, "T", 48])])
    assert found.bytes.at(SIZES) == 2 * 8 * (32 * 64 + 64 * 48 + 32 * 48)
    assert found.count().at(SIZES) == 2 * 8 * 32 * 64 * 48
    found = work("aten.reshape.default", [("bfloat16", ["T", 8, 48]), 384], [("bfloat16", ["T", 384])])
    assert found.bytes.at(SIZES) == 2 * 2 * 32 * 384 and not found.flops


@pytest.mark.parametrize(
    ("ratio", "topk", "seen", "read"),
    [
        (4, 64, 64, 2 * 1000),  # 32 tokens choose 64 rows each, more than the 1,000 that a request has
        (4, 16, 16, 32 * 16),
        (128, None, (4000 - 7.5) / 128, 2 * 4000 / 128),  # the mean token of the last 16 of each request
    ],
)
def test_attention_reads_window_and_compressed_rows(ratio: int, topk: int | None, seen: float, read: float) -> None:
    chosen = None if topk is None else ("int32", ["T", topk])
    q = ("bfloat16", ["T", 8, 512])
    args = [
        q, ("uint8", ["window_pages", 37376]), ("int32", ["B", 3]), ("uint8", ["blocks", 37376]), ("int32", ["B", 9]),
        chosen, ("float32", [8]), ("int32", ["T"]), ("int32", ["T"]), 0.1, 128, ratio, ROWS,
    ]  # fmt: skip
    found = work("atom.sparse_attention.default", args, [q])
    small = 2 * 32 * 8 * 512 * 2 + 2 * (3 + 9) * 4 + 8 * 4 + 2 * 32 * 4 + (0 if topk is None else 32 * topk * 4)
    windows = 32 + 2 * 127  # each request's tokens, and the window before its first
    assert found.bytes.at(SIZES) == pytest.approx(small + 584 * (windows + read))
    assert found.count().at(SIZES) == pytest.approx(4 * 32 * 8 * 512 * (128 + seen))


def test_index_scores_every_visible_row_for_every_head() -> None:
    args = [
        ("bfloat16", ["T", 64, 128]), ("float32", ["T", 64]), ("uint8", ["blocks", 8448]), ("int32", ["B", 9]),
        ("int32", ["T"]), ("int32", ["T"]), ("int32", ["B + 1"]), 4, 512, INDEX_ROWS,
    ]  # fmt: skip
    found = work("atom.index_topk.default", args, [("int32", ["T", 512])])
    visible = (4000 - 7.5) / 4
    assert found.count("matrix").at(SIZES) == pytest.approx(2 * 32 * 64 * 128 * visible)
    assert found.count("vector").at(SIZES) == pytest.approx(3 * 32 * 64 * visible)
    small = 32 * 64 * (2 * 128 + 4) + 2 * 9 * 4 + 2 * 32 * 4 + 3 * 4 + 32 * 512 * 4
    assert found.bytes.at(SIZES) == pytest.approx(small + 132 * 2 * 1000)


def test_a_gather_reads_the_rows_it_takes() -> None:
    program = "v0 = aten.embedding.default(a0, a1)\nreturn v0,"
    inputs = [("bfloat16", [1000, 64]), ("int32", ["T"])]
    found = work("atom.pointwise.default", [inputs, [], program], [("bfloat16", ["T", 64])])
    assert str(found.bytes) == "260*T" and str(found.count()) == "0"


def test_a_compressor_reads_old_entries_once_a_request() -> None:
    entries = [("float32", ["T", 256]), ("float32", ["T", 256])]
    step = [("int32", ["T"]), ("int32", ["T"]), ("int32", ["B + 1"]), ("int32", ["B"])]
    state = ("float32", ["slots", 8, 2, 256])
    found = work("atom.compressor_update.default", [state, *entries, *step], [])
    kept = 2 * 8  # of 16 tokens of each request, those that its ring holds
    assert found.bytes.at(SIZES) == kept * 256 * 4 * 4 + 2 * 32 * 4 + 3 * 4 + 2 * 4
