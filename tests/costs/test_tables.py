"""Tables of costs: every column that is promised, with the numbers of the formulas; for every GPU."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from atomc.artifact.plan import Launch, LibraryCall
from atomc.costs.predict import Scenario
from atomc.costs.tables import Table, kernel_table, operator_table, reckoned, region_table, step_table, use_table
from atomc.targets import TARGETS
from tests.support.costs import FACTS, K, N, costs

GPUS = [name for name, target in TARGETS.items() if target.is_gpu]


def cells(table: Table, row: int) -> dict[str, str]:
    return dict(zip(table.head, table.rows[row], strict=True))


@pytest.mark.parametrize("target", GPUS)
def test_every_gpu_has_its_tables_and_only_an_h100_was_measured(target: str) -> None:
    known = costs(target)
    assert "predicted by the static model, not measured" in reckoned(known.target)
    assert ("assumed, nothing was measured on it" in reckoned(known.target)) == (target != "h100")
    table = kernel_table(known)
    assert f"2 kernels for {target} ({known.target.arch})" in table.title and len(table.rows) == 2
    assert {row["chosen by"] for row in (cells(table, 0), cells(table, 1))} == {"static model"}


def test_kernels_tell_their_configuration_and_what_they_take() -> None:
    known = costs()
    facts = msgspec.structs.replace(
        FACTS, constants={"BM": "64", "N": "8"}, spills=16, scalar_spills=2, shared=2048, registers=200
    )
    other = msgspec.structs.replace(FACTS, constants={"BM": "32", "N": "8"}, stages=1)
    row = cells(kernel_table(replace(known, kernels={"aaaaaaaaaa": facts, "b": other})), 0)
    assert row["key"] == "aaaaaaaa" and row["configuration"] == "BM=64 4 warps 3 stages"
    assert (row["registers"], row["spills"], row["LDS"]) == ("200", "16 + 2 scalar", "2,048")
    assert row["occupancy"] == "8/64 (registers)"
    assert row["matrix instructions"] == "4×wgmma.mma_async.m64n64k16.f32.bf16.bf16"


def test_who_chose_a_configuration_is_read_from_the_launches() -> None:
    known = costs()
    step = known.regions["layer"].steps[0]
    few, many = step.buckets
    tuned = [msgspec.structs.replace(launch, origin="tuned on a GPU") for launch in few.launches]
    library = LibraryCall("scaled_mm", [], [Launch("before", [1], [])])
    buckets = [msgspec.structs.replace(few, launches=tuned), msgspec.structs.replace(many, library=library)]
    region = msgspec.structs.replace(known.regions["layer"], steps=[msgspec.structs.replace(step, buckets=buckets)])
    kernels = {**known.kernels, "before": FACTS, "never": FACTS}
    table = kernel_table(replace(known, regions={"layer": region}, kernels=kernels))
    found = {row[1]: cells(table, at)["chosen by"] for at, row in enumerate(table.rows)}
    both = "static model, tuned on a GPU"
    assert found == {"gemm": both, "sum": "tuned on a GPU", "before": "static model", "never": ""}


def test_a_row_for_each_kernel_and_bucket_has_formulas_and_a_prediction() -> None:
    table = use_table(costs())
    assert [(row[1], row[2]) for row in table.rows] == [("gemm", "16"), ("gemm", "512"), ("sum", "16")]
    row = cells(table, 1)
    assert row["predicted for"] == "prefill 512, context 4,096"
    assert (row["bytes"], row["FLOPs"]) == (f"{2 * K + 2 * N}*T + {2 * N * K}", f"{2 * N * K}*T")
    assert (row["bound"], row["in a step"]) == ("compute", "2")
    target = costs().target
    assert float(row["µs"]) == pytest.approx(2 * 512 * N * K / target.sustained_matrix("bf16") * 1e6, abs=0.05)
    assert cells(use_table(costs(), 8000), 0)["predicted for"] == "decode 16, context 8,000"


def test_operators_layer_kinds_and_steps_add_up() -> None:
    known = costs()
    row = cells(operator_table(known, "layer"), 0)
    assert (row["operator"], row["source"], row["FLOPs"]) == ("aten.linear", "m.py:1", f"{2 * N * K}*T")
    assert row["decode 16, context 4,096"].endswith("memory (2)")
    step = known.predict(Scenario(512, 1, 512))
    one, whole = cells(region_table([step]), 0), cells(step_table([step]), 0)
    assert one["layer, 2×"] == f"{step.regions['layer'].seconds * 1e6:,.1f} compute"
    assert whole["ms"] == f"{2 * step.regions['layer'].seconds * 1e3:.2f}" and whole["launches"] == "2"
