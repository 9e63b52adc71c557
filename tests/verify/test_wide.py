"""References in float64: that they really are, that nothing else is, and that nothing stays changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atomc.formats import RowLayout
from atomc.ops import OPS
from atomc.ops import quantize as quantize_ops
from atomc.verify.errors import VerifyError
from atomc.verify.wide import Script, halvings_of, run_wide
from tests.verify.cases import CASES, arguments


def wide(name: str, given: dict[str, object]) -> tuple[Tensor, ...]:
    return run_wide(OPS[name].reference, given, (), Script()).results


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def test_rms_norm_is_computed_in_float64() -> None:
    x, weight, eps = torch.randn(50, 512), torch.randn(512), 1e-6
    by_hand = x.double() * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
    (found,) = wide("rms_norm", {"x": x, "weight": weight, "eps": eps})
    assert found.dtype == torch.float64
    assert relative(found, by_hand) < 1e-15
    assert 1e-8 < relative(OPS["rms_norm"].reference(x, weight, eps), found) < 1e-7


def test_a_bfloat16_step_is_not_rounded_in_between() -> None:
    x, weight = torch.randn(50, 512).bfloat16(), torch.randn(512).bfloat16()
    by_hand = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    assert relative(wide("rms_norm", {"x": x, "weight": weight, "eps": 1e-6})[0], by_hand) < 1e-15


def test_attention_is_computed_in_float64() -> None:
    """A window only; every table and page is read through integers, which stay what they are."""
    _, given = arguments("attention")
    given |= {"cache": None, "topk": None}
    (found,) = wide("sparse_attention_inverse_rope", given)
    window, expected = given["window"].double(), torch.empty(0)
    t = 23
    request, position = int(given["requests"][t]), int(given["positions"][t])
    rows = torch.arange(max(0, position - 7), position + 1)
    pages = given["window_table"][request, (rows // 4) % given["window_table"].shape[1]].long()
    kv = window[pages, rows % 4]
    scores = given["q"][t].double() @ kv.T * 0.3
    scores = torch.cat((scores, given["sink"].double()[:, None]), 1).softmax(1)[:, :-1]
    expected = scores @ kv
    even, odd = expected[:, -32::2].clone(), expected[:, -31::2].clone()
    cos, sin = given["cos"][t].double(), given["sin"][t].double()
    expected[:, -32::2], expected[:, -31::2] = even * cos + odd * sin, odd * cos - even * sin
    assert relative(found[t], expected) < 1e-14


def test_products_are_computed_in_float64() -> None:
    _, given = arguments("experts")
    (found,) = wide("moe_experts", given)
    x, w13, w2 = (given[n].double() for n in ("x", "w13", "w2"))
    expected = torch.zeros(24, 128, dtype=torch.float64)
    for t in range(24):
        for k in range(3):
            gate, up = (w13[given["indices"][t, k]] @ x[t]).chunk(2)
            a = torch.nn.functional.silu(gate.clamp(max=1.5)) * up.clamp(-1.5, 1.5) * given["weights"][t, k].double()
            expected[t] += w2[given["indices"][t, k]] @ a
    assert relative(found, expected) < 1e-14


def test_no_result_of_any_reference_is_narrow() -> None:
    for case, (name, _) in CASES.items():
        op, given = arguments(case)
        written = OPS[name].mutates
        trace = run_wide(OPS[name].reference, given, written, Script())
        for value in (*trace.results, *trace.mutated.values()):
            assert value.dtype not in (torch.float32, torch.bfloat16), (case, op, value.dtype)


def test_arguments_and_the_formats_are_as_before() -> None:
    before = (RowLayout.pack, RowLayout.unpack, RowLayout.store, quantize_ops.to_layout, quantize_ops.from_layout)
    _, given = arguments("compressor index")
    kept = given["cache"].clone()
    trace = run_wide(OPS["compressor_pool_norm_rope_insert"].reference, given, ("cache",), Script())
    assert torch.equal(given["cache"], kept)
    assert not torch.equal(trace.mutated["cache"], kept)
    after = (RowLayout.pack, RowLayout.unpack, RowLayout.store, quantize_ops.to_layout, quantize_ops.from_layout)
    assert before == after


def test_a_float32_constant_that_is_cached_stays_float32() -> None:
    quantize_ops._matrix.cache_clear()
    run_wide(OPS["hadamard"].reference, {"x": torch.randn(3, 64)}, (), Script())
    assert quantize_ops._matrix(64, torch.device("cpu")).dtype == torch.float32


def test_a_jitter_is_as_large_as_its_unit() -> None:
    x = torch.randn(100, 64)
    given = {"x": x, "weight": None, "eps": 1e-6}
    nominal, moved = (
        run_wide(OPS["rms_norm"].reference, given, (), Script(unit)).results[0] for unit in (0.0, 2.0**-24)
    )
    assert 2.0**-26 < relative(moved, nominal) < 2.0**-23


# -- where a reference rounds to 16 bits -------------------------------------------------------------------------------

# In bfloat16, of each case: how often. An expert rounds both products, and what enters the second is rounded once.
HALVINGS = {
    "rms_norm": 1, "rms_norm_pair_quant": 2, "hc_post_pre_norm": 3, "hc_post_pre_norm_quant": 3, "hc_head_norm": 2,
    "rope": 1, "insert": 3, "insert packed": 3, "compressor": 3, "compressor packed": 3, "compressor index": 4,
    "update": 0, "index": 1, "index packed": 2, "attention": 2, "attention packed": 2, "route_topk": 0, "route_hash": 0,
    "hc_post": 1, "linear_fp32": 0, "scaled": 1, "scaled grouped": 1, "scaled experts packed": 3,
    "scaled experts packed fp8": 3, "pointwise angles": 0, "pointwise gather": 0, "pointwise add": 1,
    "experts": 6 * 2 + 1, "experts packed": 6 * 2 + 1, "swiglu_quant": 1, "quantize": 0, "quantize fp4": 0,
    "dequantize": 0, "dequantize fp4": 0, "dequantize channel": 1, "pack_rows": 0, "hadamard": 1,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_halvings_are_where_a_reference_rounds(case: str) -> None:
    name = CASES[case][0]
    for dtype, count in ((torch.float32, 0), (torch.bfloat16, HALVINGS[case])):
        _, given = arguments(case, dtype)
        found = halvings_of(OPS[name].reference, given, OPS[name].mutates)
        assert sum(unit > 0 for unit in found.units) == count
        assert set(found.units) <= {0.0, 2.0**-8}
        quantizes = any(part in case for part in ("quant", "pack", "index")) and not case.startswith("dequantize")
        assert found.quantized == (dtype if quantizes and case != "index" else torch.float32)


def test_a_halving_moves_a_result_and_no_input_does() -> None:
    x = torch.randn(100, 64).bfloat16()
    given = {"x": x, "weight": None, "eps": 1e-6}
    reference = OPS["rms_norm"].reference
    units = halvings_of(reference, given, ()).units
    nominal, moved = (run_wide(reference, given, (), Script(halvings=h)).results[0] for h in ((), units))
    assert torch.allclose((moved / nominal - 1).abs(), torch.tensor(2.0**-8, dtype=torch.float64), rtol=1e-12)


def test_runs_that_make_other_calls_are_refused() -> None:
    given = {"x": torch.randn(3, 64).bfloat16(), "weight": None, "eps": 1e-6}
    with pytest.raises(VerifyError, match="rms_norm makes"):
        run_wide(OPS["rms_norm"].reference, given, (), Script(halvings=(2.0**-8,)))
