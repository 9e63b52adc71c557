"""Predictions: the roofline of a launch, work spread over launches, and sums over regions and the step."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from atomc.artifact.kernels import KernelFacts
from atomc.artifact.manifest import Serving
from atomc.artifact.plan import Bucket, CallPlan, Launch, ProgramPlan, RegionPlan, Slot, SlotInfo, Step
from atomc.costs.launches import matrix_kind
from atomc.costs.predict import Costs, Scenario, Timing, scenarios
from atomc.targets import TARGETS, get_target

SERVING = Serving(
    model_name="m", vocab_size=8, bos_id=0, eos_ids=[], window=128, window_page=32, block_tokens=256, csa_ratio=4,
    hca_ratio=128, max_context=8192, max_batch_tokens=512, max_requests=32, max_logit_rows=32, window_table_width=1,
    block_table_width=1,
)  # fmt: skip
FACTS = KernelFacts(
    name="k", target="h100", signature=[], warps=4, wavefront=32, stages=3, shared=0, registers=32, spills=0,
    scalar_spills=0, matrix={"wgmma.mma_async.m64n64k16.f32.bf16.bf16": 4}, loads=0, wide_loads=0, constants={},
)  # fmt: skip
SUM = msgspec.structs.replace(FACTS, matrix={})
N, K = 4096, 8192


def slot(name: str, dtype: str, *shape: int | str) -> SlotInfo:
    return SlotInfo(name, "temporary", list(shape), dtype, None, 0, 0, None)


def costs(target: str = "h100") -> Costs:
    """One region, used twice: a linear layer, for few tokens in two halves that a second kernel adds."""
    slots = [
        slot("x", "bfloat16", "T", K), slot("w", "bfloat16", N, K), slot("y", "bfloat16", "T", N),
        slot("part", "float32", 2, "T", N),
    ]  # fmt: skip
    split = [Launch("gemm", [1], [Slot(0), Slot(1), Slot(3)]), Launch("sum", [1], [Slot(3), Slot(2)])]
    buckets = [Bucket(16, split, [3]), Bucket(512, [Launch("gemm", [1], [Slot(0), Slot(1), Slot(2)])], [])]
    step = Step("aten.linear.default", [Slot(0), Slot(1)], {}, [2], [], "m.py:1", buckets)
    region = RegionPlan("layer", [], {}, slots, [], [step], 0)
    program = ProgramPlan([CallPlan("layer", "a.", {}), CallPlan("layer", "b.", {})], {"T": 512}, {}, 0, 0)
    return Costs(program, {"layer": region}, {"gemm": FACTS, "sum": SUM}, get_target(target), SERVING)


def test_a_launch_is_bound_by_memory_by_compute_or_by_its_latency() -> None:
    known, h100 = costs(), get_target("h100")
    rate, bf16 = h100.memory_rate * h100.sustained.memory, h100.sustained_matrix("bf16")
    decode = known.predict(Scenario(1, 1, 4096))
    partial = 2 * N * 4
    gemm = (2 * K + 2 * N * K + partial) / rate
    assert decode.regions["layer"].seconds_by["memory"] == pytest.approx(gemm)
    assert decode.regions["layer"].seconds_by["latency"] == h100.sustained.launch  # of the sum
    assert decode.regions["layer"].bound == "memory" and decode.regions["layer"].launches == 2
    assert decode.regions["layer"].flops == 2 * N * K
    prefill = known.predict(Scenario(512, 1, 4096))
    assert prefill.regions["layer"].seconds_by == {
        "memory": 0,
        "compute": pytest.approx(2 * 512 * N * K / bf16),
        "latency": 0,
    }
    assert prefill.total.seconds == pytest.approx(2 * prefill.regions["layer"].seconds)
    assert prefill.total.launches == 2
    (operator, time) = prefill.operators[0]
    assert (operator.region, operator.number, time.bound) == ("layer", 0, "compute")


def test_a_float32_operand_takes_three_products() -> None:
    known = costs()
    region = known.regions["layer"]
    wide = msgspec.structs.replace(region, slots=[region.slots[0], slot("w", "float32", N, K), *region.slots[2:]])
    before, after = (c.predict(Scenario(512, 1, 4096)).total for c in (known, replace(known, regions={"layer": wide})))
    assert after.seconds == pytest.approx(3 * before.seconds) and after.flops == before.flops


def test_launches_of_one_kernel_share_their_tokens_but_not_their_weight() -> None:
    known = costs()
    region = known.regions["layer"]
    half = Launch("gemm", [1], [Slot(0), Slot(1), Slot(2)])
    step = msgspec.structs.replace(region.steps[0], buckets=[Bucket(512, [half, half], [])])
    twice = replace(known, regions={"layer": msgspec.structs.replace(region, steps=[step])})
    time = twice.predict(Scenario(512, 1, 4096)).regions["layer"]
    assert time.bytes == 2 * 512 * (K + N) + 2 * (2 * N * K)
    assert time.flops == 2 * 512 * N * K


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("wgmma.mma_async.m64n128k32.f32.e4m3.e4m3", "fp8"), ("mma.m16n8k16.row.col.f32.bf16.bf16.f32", "bf16"),
        ("wgmma.mma_async.m64n64k8.f32.tf32.tf32", "tf32"), ("v_mfma_scale_f32_32x32x64_f8f6f4", "fp8"),
        ("v_mfma_f32_32x32x16_bf16", "bf16"), ("v_mfma_f32_16x16x32_fp8_fp8", "fp8"),
        ("tcgen05.mma.cta_group::1.kind::f8f6f4", "fp8"),
        ("tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale", "fp8"),
        ("tcgen05.mma.cta_group::1.kind::mxf4.block_scale", "fp4"), ("tcgen05.mma.cta_group::1.kind::f16", "bf16"),
        ("v_mfma_f32_16x16x4_f32", ""),
    ],
)  # fmt: skip
def test_what_a_matrix_instruction_multiplies(name: str, kind: str) -> None:
    assert matrix_kind(msgspec.structs.replace(FACTS, matrix={name: 2, "v_mfma_f32_16x16x4_f32": 1})) == kind


def test_scenarios_go_as_far_as_the_artifact() -> None:
    found = [(s.name, s.context) for s in scenarios(SERVING)]
    assert found == [
        ("decode 1", 4096), ("decode 16", 4096), ("decode 1", 8192), ("decode 16", 8192),
        ("prefill 512", 4096), ("prefill 512", 8192),
    ]  # fmt: skip
    large = msgspec.structs.replace(SERVING, max_context=1 << 20, max_batch_tokens=8192, max_requests=64)
    assert {s.tokens for s in scenarios(large)} == {1, 16, 64, 1024, 4096, 8192}
    assert {s.context for s in scenarios(large)} == {4096, 8192, 131072}


def test_only_the_h100_is_measured() -> None:
    assert [name for name, target in TARGETS.items() if target.sustained.origin == "measured"] == ["h100"]
    assert all(0 < share <= 1 for t in TARGETS.values() for share in (t.sustained.memory, *t.sustained.matrix))


def test_times_add_up() -> None:
    a, b = Timing(1, 2, 1, {"memory": 3.0}), Timing(10, 20, 2, {"memory": 1.0, "latency": 2.0})
    both = a + b * 2
    assert (both.bytes, both.flops, both.launches, both.seconds, both.bound) == (21, 42, 5, 9.0, "memory")
