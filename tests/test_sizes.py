"""Bytes by arithmetic: packed weights of the released sizes, and the memory of a batch of requests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from atomc.artifact.facts import memory_plan
from atomc.artifact.store import read_manifest
from atomc.compiler import Options, compile_model
from atomc.formats import RowLayout
from atomc.models.bundled import bundled_config
from atomc.models.deepseek_v4.state import row_layouts
from atomc.report import weight_bytes
from atomc.runtime.loader import read_plan

# Specification 3.5: main model, tensors of the checkpoint; by dtype, in 10^9 bytes.
MAIN = {"flash": 156_015_698_140, "pro": 850_748_205_004}
BY_DTYPE = {
    "flash": {
        "bfloat16": 2.828,
        "float32": 0.141,
        "int64": 0.019,
        "e4m3:128x128:e8m0": 5.857,
        "e2m1:1x32:e8m0": 147.170,
    },
    "pro": {
        "bfloat16": 5.628,
        "float32": 0.345,
        "int64": 0.019,
        "e4m3:128x128:e8m0": 22.702,
        "e2m1:1x32:e8m0": 822.056,
    },
}
# Specification 4.3: bytes a token of context, and of the compressors' states a request.
GROWING = {
    ("flash", "mxfp4"): 3514.25, ("flash", "fp8"): 3850.25, ("pro", "mxfp4"): 5031.4375, ("pro", "fp8"): 5511.4375,
}  # fmt: skip
PARTIAL = {"flash": 12_206_080, "pro": 18_710_528}
WINDOW_LAYERS = {"flash": 43, "pro": 61}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "index_rows"), [("flash", "mxfp4"), ("pro", "fp8")])
def test_packed_weights_take_the_checkpoints_bytes_and_a_batch_its_caches(
    size: str, index_rows: str, tmp_path: Path
) -> None:
    options = Options(with_weights=False, max_context=131_072, index_rows=index_rows)
    result = compile_model(f"deepseek-v4-{size}", "cpu", tmp_path / "a.atom", options)
    found = weight_bytes(result.layouts)
    rope = sum(row.bytes for row in result.layouts["prologue"] if row.name.startswith("rope_"))
    assert sum(found.values()) - rope == MAIN[size]
    for layout, billions in BY_DTYPE[size].items():
        assert found[layout] / 1e9 == pytest.approx(billions, abs=6e-3)
    program, regions = read_plan(tmp_path / "a.atom")
    serving = read_manifest(tmp_path / "a.atom").serving
    for requests, context in ((1, 1024), (16, 131_072), (3, 1_048_576)):
        plan = memory_plan(program, regions, serving, requests, context)
        assert plan.rows == requests * context * GROWING[size, index_rows]
        assert plan.partial == requests * PARTIAL[size]
        # Rings of 128 rows in the specification; here pages of 64, of which a window touches three.
        assert plan.window == requests * WINDOW_LAYERS[size] * 3 * 64 * 584
        assert plan.weights - rope == MAIN[size]
        assert plan.total == sum(vars(plan).values())


@pytest.mark.parametrize(("size", "index_rows"), list(GROWING))
def test_rows_take_the_bytes_of_the_specification(size: str, index_rows: str) -> None:
    config = bundled_config(f"deepseek-v4-{size}")
    layouts, _ = row_layouts(config, "fp8", index_rows, "bfloat16")
    row, index = (RowLayout.parse(layouts[name]).row_bytes for name in ("rows", "index_rows"))
    kinds = Counter(config.compress_ratios[: config.num_hidden_layers])
    assert kinds[4] * (row + index) / 4 + kinds[128] * row / 128 == GROWING[size, index_rows]


def test_a_batch_that_fits_no_limit_is_arithmetic_all_the_same(native_artifact: Path) -> None:
    program, regions = read_plan(native_artifact)
    serving = read_manifest(native_artifact).serving
    one, many = (memory_plan(program, regions, serving, n, 4096) for n in (1, 1000))
    assert (many.rows, many.window, many.partial) == (1000 * one.rows, 1000 * one.window, 1000 * one.partial)
    assert (many.weights, many.prepared, many.arena) == (one.weights, one.prepared, one.arena)
    assert one.prepared > one.weights  # float32 of FP8 and FP4
