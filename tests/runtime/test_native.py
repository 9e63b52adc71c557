"""`native`: the compiled model equals a dequantised one that simulates the roundings of the reference inference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atomc.compiler import Options, compile_model
from atomc.formats import FP4_ACTIVATION, FP8_ACTIVATION, RowLayout, dequantize, quantize
from atomc.models.deepseek_v4.config import load_config
from atomc.models.deepseek_v4.model import DeepseekV4
from atomc.models.deepseek_v4.reader import CheckpointReader
from atomc.models.deepseek_v4.state import row_layouts
from atomc.models.deepseek_v4.weights import load_parameters
from atomc.ops.registry import OPS
from atomc.runtime import bind
from atomc.runtime.executor import Executor
from atomc.runtime.watch import MemoryWatch
from tests.runtime.test_executor import BLOCKS, PAGES, Paged, opened
from tests.support.artifact import LAYERS
from tests.support.eager import Step, run
from tests.support.simulated import fp4, fp8, roundings, row
from tests.support.tiny import random_checkpoint, tiny_config

# Chunks, decodes and mixed steps of three requests.
LENGTHS = (106, 49, 40)
STEPS: list[Step] = [
    [(0, 30), (1, 10)], [(0, 5), (1, 30), (2, 3)], [(0, 40)], [(2, 37), (0, 1), (1, 1)], [(0, 30), (1, 8)],
]  # fmt: skip


def test_the_simulation_is_what_the_formats_compute() -> None:
    """Two programs from one specification: lists of numbers in float64, and bits."""
    x = torch.randn(60, 300) * torch.logspace(-8, 6, 60)[:, None]
    assert torch.equal(fp8(x), dequantize(*quantize(x, FP8_ACTIVATION), FP8_ACTIVATION))
    x = x[:, :256].contiguous()
    assert torch.equal(fp4(x), dequantize(*quantize(x, FP4_ACTIVATION), FP4_ACTIVATION))
    config = tiny_config()
    layout = RowLayout.parse(row_layouts(config, "fp8", "fp8", "float32")[0]["rows"])
    x = x[:, : config.head_dim].contiguous()
    assert torch.equal(row(x, config.qk_rope_head_dim), layout.unpack(layout.pack(x)))


def simulated(checkpoint: Path, ids: list[Tensor], dtype: str = "float32") -> list[Tensor]:
    config = load_config(checkpoint)
    model = DeepseekV4(config, getattr(torch, dtype))
    load_parameters(model, config, CheckpointReader(checkpoint), dtype)  # type: ignore[arg-type]
    with torch.no_grad(), roundings(model):
        return [r.logits for r in run(model, ids, STEPS)]


def with_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run their operators' references: sums in the order in which the model itself is written."""
    usual: Callable[[str], Callable[..., Any]] = bind.resolve

    def resolve(op: str) -> Callable[..., Any]:
        namespace, name, _ = op.split(".")
        return OPS[name].reference if namespace == "atom" else usual(op)

    monkeypatch.setattr(bind, "resolve", resolve)


def sequences(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, LAYERS["vocab_size"], (n,), generator=generator) for n in LENGTHS]  # type: ignore[call-overload]


def test_it_is_the_simulated_model_bit_for_bit(
    native_artifact: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_references(monkeypatch)
    executor = opened(native_artifact)
    for seed in range(3):
        ids = sequences(seed)
        for found, expected in zip(
            Paged(executor, 3).feed(ids, STEPS), simulated(model_folder / "checkpoint", ids), strict=True
        ):
            assert torch.equal(found, expected)


def test_with_the_kernels_of_the_cpu_it_is_within_a_millionth(native_artifact: Path, model_folder: Path) -> None:
    """Sums in another order move a value by a fraction of u = 2^-24; over a midpoint of two codes it moves by a code.

    A run rounds 700,000 values, whose codes are |x| / 11 apart: where all were off by u, 0.9 of them would be over a
    midpoint. So a few of the twelve requests have one (of these runs one has), and from its token on what attends to
    it is off by more: a code of E4M3 is 2^-3 of its value at most, a value 3 times the root mean square of its row of
    64, which is 0.05 of the row. All rows of all other requests are within a millionth.
    """
    executor = opened(native_artifact)
    requests: list[Tensor] = []
    for seed in range(7, 11):
        ids = sequences(seed)
        pairs = zip(Paged(executor, 3).feed(ids, STEPS), simulated(model_folder / "checkpoint", ids), strict=True)
        requests += [(found - expected).norm(dim=1) / expected.norm(dim=1) for found, expected in pairs]
    assert len(requests) == 12
    assert float(torch.cat(requests).median()) < 3e-7
    assert float(torch.cat(requests).max()) < 0.05
    over = [rows for rows in requests if float(rows.max()) > 1e-6]
    assert len(over) <= 3, [int((rows > 1e-6).nonzero()[0]) for rows in over]


@pytest.mark.parametrize(
    ("overrides", "dtype"), [({"expert_dtype": "fp8"}, "float32"), ({}, "bfloat16")], ids=["base", "bfloat16"]
)
def test_other_checkpoints_and_dtypes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], dtype: str
) -> None:
    with_references(monkeypatch)
    checkpoint = random_checkpoint(tmp_path / "checkpoint", tiny_config(**{**LAYERS, **overrides}))
    options = Options(dtype=dtype, max_context=320, max_batch_tokens=48, max_requests=4, max_logit_rows=40)
    compile_model(str(checkpoint), "cpu", tmp_path / "a.atom", options)
    executor = Executor.load(tmp_path / "a.atom", num_blocks=BLOCKS, num_window_pages=PAGES)
    ids = sequences(1)
    for found, expected in zip(Paged(executor, 3).feed(ids, STEPS), simulated(checkpoint, ids, dtype), strict=True):
        assert torch.equal(found, expected)


def test_requests_of_one_step_do_not_see_one_another(native_artifact: Path) -> None:
    executor, ids = opened(native_artifact), sequences(3)
    together = Paged(executor, 3).feed(ids, STEPS)
    for i, mine in enumerate(ids):
        alone = Paged(executor, 1).feed([mine], [[(0, n)] for step in STEPS for r, n in step if r == i])
        torch.testing.assert_close(alone[0], together[i], atol=2e-5, rtol=1e-5)


def test_live_bytes_are_what_the_plan_predicts(native_artifact: Path) -> None:
    watch = MemoryWatch()
    Paged(opened(native_artifact), 3).feed(sequences(4), STEPS, watch)
    assert watch.steps > 0 and all(watch.peaks.values())


def test_weights_are_packed_and_expanded_once(native_artifact: Path) -> None:
    executor = opened(native_artifact)
    call = next(c for c in executor.calls if c.plan.name.startswith("layer_csa"))
    packed = [call.fixed[i.slot] for i in call.plan.inputs if i.role == "weight"]
    assert {torch.float8_e4m3fn, torch.int8, torch.float8_e8m0fnu} <= {t.dtype for t in packed}
    dense = [call.fixed[i] for i, s in enumerate(call.plan.slots) if s.role == "prepared" and s.base is None]
    assert all(t.dtype in (torch.float32, torch.int32) for t in dense)
    assert not any(step.op == "atom.dequantize.default" and step.args[0] in packed for step in call.plan.steps)
