"""Predictions: the roofline of a launch, work spread over launches, and sums over regions and the step."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from atomc.artifact.plan import Bucket, CallPlan, Launch, Slot
from atomc.costs.launches import matrix_kind
from atomc.costs.predict import Scenario, Timing, bucket_scenario, scenarios
from atomc.targets import TARGETS, get_target
from tests.support.costs import FACTS, SERVING, K, N, costs, slot


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
    assert prefill.regions["layer"].bound == "compute"


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
    assert found == [("decode 1", 4096), ("decode 16", 4096), ("prefill 512", 512)]
    chosen = [(s.name, s.context) for s in scenarios(SERVING, 7, 100)]
    assert chosen == [("decode 7", 100), ("prefill 512", 512)]
    large = msgspec.structs.replace(SERVING, max_context=1 << 20, max_batch_tokens=8192, max_requests=128)
    assert [s.tokens for s in scenarios(large)] == [1, 16, 64, 128, 1024, 4096, 8192]
    assert {s.context for s in scenarios(large, context=200_000)} == {200_000}


@pytest.mark.parametrize(
    ("tokens", "context", "expected"),
    [
        (16, None, Scenario(16, 16, 4096)),  # as many requests as there may be
        (512, None, Scenario(512, 1, 4096)),
        (512, 100, Scenario(512, 1, 512)),  # the tokens of the step are part of the context
        (16, 8000, Scenario(16, 16, 8000)),
    ],
)
def test_the_largest_step_of_a_bucket(tokens: int, context: int | None, expected: Scenario) -> None:
    assert bucket_scenario(SERVING, tokens, context) == expected


def test_uses_of_a_kernel_are_counted_over_the_step_by_bucket_and_work() -> None:
    known = costs()
    found = [(known.kernels[u.cost.kernel].name, u.cost.kernel, u.tokens, u.count) for u in known.kernel_uses()]
    assert found == [("k", "gemm", 16, 2), ("k", "gemm", 512, 2), ("k", "sum", 16, 2)]
    halves, whole, total = known.kernel_uses()
    assert str(halves.cost.bytes) == f"{2 * K + 2 * N * 4}*T + {2 * N * K}" and str(total.cost.count) == "0"
    assert str(whole.cost.bytes) == f"{2 * K + 2 * N}*T + {2 * N * K}" and str(whole.cost.count) == f"{2 * N * K}*T"
    other = msgspec.structs.replace(known.regions["layer"], slots=[*known.regions["layer"].slots])
    other.slots[1], other.slots[2] = slot("w", "bfloat16", N // 2, K), slot("y", "bfloat16", "T", N // 2)
    calls = [*known.program.calls, CallPlan("half", "c.", {})]
    both = replace(
        known, program=msgspec.structs.replace(known.program, calls=calls), regions={**known.regions, "half": other}
    )
    large = [(u.count, u.cost.bytes.constant, str(u.cost.count)) for u in both.kernel_uses() if u.tokens == 512]
    assert sorted(large) == [(1, None, f"{N * K}*T"), (2, None, f"{2 * N * K}*T")]


def test_only_the_h100_is_measured() -> None:
    assert [name for name, target in TARGETS.items() if target.sustained.origin == "measured"] == ["h100"]
    assert all(0 < share <= 1 for t in TARGETS.values() for share in (t.sustained.memory, *t.sustained.matrix))


def test_times_add_up() -> None:
    a, b = Timing(1, 2, 1, {"memory": 3.0}), Timing(10, 20, 2, {"memory": 1.0, "latency": 2.0})
    both = a + b * 2
    assert (both.bytes, both.flops, both.launches, both.seconds, both.bound) == (21, 42, 5, 9.0, "memory")
