"""FP8 sums as Hopper makes them, written from their description: within their bound, and beyond every other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from atomc.artifact.plan import Step
from atomc.formats import Layout, quantize
from atomc.ops import OPS
from atomc.verify import Observation, examine, narrow
from atomc.verify.grid import unpacked
from atomc.verify.launched import Launched, alone
from atomc.verify.wide import results_of
from tests.verify.cases import ACT, CASES, TILE, arguments

STEP = alone(Step("aten.linear.default", [], {}, [], [], ""), [], 0)  # it is not looked at


def on(target: str) -> Launched:
    """As if kernels of an artifact for that target had computed a step."""
    return Launched(target, Path(), STEP, {}, {})


def cut(x: Tensor, exponent: Tensor) -> Tensor:
    """Towards zero, 13 bits below an exponent."""
    unit = torch.exp2(exponent - 13)
    return torch.trunc(x / unit) * unit


def hopper(x: Tensor, w: Tensor) -> Tensor:
    """x wᵀ of float64 values: 32 products and the sum so far are cut, added, cut again; each 128 go to fp32."""
    total = torch.zeros((*x.shape[:-1], w.shape[-2]), dtype=torch.float64)
    for block in range(0, x.shape[-1], 128):
        held = torch.zeros_like(total)
        for k in range(block, min(block + 128, x.shape[-1]), 32):
            products = x[..., :, None, k : k + 32] * w[..., None, :, k : k + 32]
            terms = torch.cat((products, held.unsqueeze(-1)), dim=-1)
            largest = terms.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
            held = cut(terms, largest.log2().floor()).sum(-1)
            held = cut(held, held.abs().clamp(min=2.0**-100).log2().floor())
        total = (total + held).float().double()
    return total


class Hopper(TorchFunctionMode):
    """Products of a reference as Hopper makes those of FP8 codes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (F.linear, torch.bmm):
            return func(*args, **(kwargs or {}))
        x, w = (a.double() for a in args)
        return hopper(x, w if func is F.linear else w.mT).to(args[0].dtype)


def values(kind: str, rows: int, layout: str) -> Tensor:
    """float64 values of codes [rows, 512]: random, of one sign, with outliers, or mostly zeros."""
    x = torch.randn(rows, 512)
    if kind == "of one sign":
        x = x.abs() + 0.5
    if kind == "outliers":
        x[:, ::40] *= 100
    if kind == "sparse":
        x *= torch.rand(rows, 512) < 0.05
    return unpacked(*quantize(x, Layout.parse(layout)), layout)[0]


@pytest.mark.parametrize("kind", ["random", "of one sign", "outliers", "sparse"])
def test_sums_of_a_matrix_unit_are_within_what_they_may_lose(kind: str) -> None:
    x, w = values(kind, 96, ACT), values(kind, 96, TILE)
    error, allowed = (hopper(x, w) - x @ w.T).abs(), narrow.loss(x, w)
    assert bool((error <= allowed).all())
    assert float((error / allowed.clamp(min=1e-30)).max()) > 0.03  # and not by far
    assert float(error.norm() / (x @ w.T).norm()) > 2.0**-18  # which no bound of float32 allows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("scaled")])
def test_a_step_with_such_sums_keeps_its_bound_on_hopper(case: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        op, given = arguments(case, dtype)
        with Hopper():
            found = results_of(OPS[CASES[case][0]].reference(**given))
        seen = Observation(op, given, found, launched=on("h100"))
        assert all(v.ok for v in examine(seen)), examine(seen)
        if dtype == torch.float32:  # in bfloat16 the rounding of the result hides them
            assert not all(v.ok for v in examine(dataclasses.replace(seen, launched=on("b200"))))
            assert not all(v.ok for v in examine(dataclasses.replace(seen, launched=None)))


def rounded_weights(x: Any, *args: Any, **kwargs: Any) -> Tensor:
    return SOFTMAX(x, *args, **kwargs).bfloat16().float()


SOFTMAX = torch.softmax


def test_attention_may_round_its_weights_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16; a kernel of a plan in float32 may not."""
    for dtype, allowed in ((torch.bfloat16, True), (torch.float32, False)):
        op, given = arguments("attention", dtype)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "softmax", rounded_weights)
            found = results_of(OPS["sparse_attention_inverse_rope"].reference(**given))
        seen = Observation(op, given, found, launched=on("h100"))
        assert all(v.ok for v in examine(seen)) is allowed
