"""Library calls that a plan may name: offered where they fit, refused where they are not there."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")

from atomc.codegen.device import Recorder
from atomc.codegen.kernels import scaled_gemm
from atomc.formats import FP8_ACTIVATION, FP8_TILE, MXFP4, Layout
from atomc.ops import library
from atomc.ops.library import CALLS, missing
from atomc.targets import get_target


def test_a_machine_without_the_call_says_why() -> None:
    assert missing("scaled_mm", torch.device("cpu")) != ""


@pytest.mark.parametrize(
    ("shape", "fits"), [((4, 512), True), ((2, 2, 512), True), ((3, 512), False), ((1, 512), False)]
)
def test_the_rows_it_takes(shape: tuple[int, ...], fits: bool) -> None:
    assert CALLS["scaled_mm"].fits(torch.empty(shape)) is fits


class Offers(Recorder):
    """Keeps what is offered."""

    def library(self, name: str, arguments: object) -> bool:
        self.offered = [name, *[tuple(t.shape) for t in arguments()]]  # type: ignore[operator]
        return False


def offered(
    target: str, tokens: int, n: int, k: int, w: Layout = FP8_TILE, dtype: torch.dtype = torch.bfloat16
) -> list[object]:
    device = Offers(get_target(target), tokens)
    device.offered = []

    def meta(shape: tuple[int, ...], layout: Layout) -> list[torch.Tensor]:
        sizes = (layout.code_shape(shape), layout.element.storage), (layout.scale_shape(shape), layout.scale_dtype)
        return [torch.empty(size, dtype=kind, device="meta") for size, kind in sizes]

    x = meta((tokens, k), FP8_ACTIVATION)
    scaled_gemm.scaled_linear(device, *x, *meta((n, k), w), str(FP8_ACTIVATION), str(w), dtype)
    assert device.launches  # an offer never replaces the kernels of a plan
    return device.offered


def test_many_fp8_tokens_on_hopper_are_offered() -> None:
    for target in ("h100", "h200"):
        assert offered(target, 256, 1536, 4096) == [
            "scaled_mm", (256, 1, 4096), (32, 256), (1536, 4096), (12, 32), (256, 1536)
        ]  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [
        ("h100", 64, 1536, 4096), ("mi355x", 256, 1536, 4096), ("b200", 256, 1536, 4096), ("h100", 256, 1530, 4096),
        ("h100", 256, 1536, 4224), ("h100", 256, 1536, 4096, MXFP4), ("h100", 256, 1536, 4096, FP8_TILE, torch.float32),
    ],
)  # fmt: skip
def test_nothing_else_is(given: tuple[object, ...]) -> None:
    assert offered(*given) == []  # type: ignore[arg-type]


def test_a_call_is_tried_whatever_device_tensors_are_made_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(x: torch.Tensor, xs: torch.Tensor, w: torch.Tensor, ws: torch.Tensor, out: torch.Tensor) -> None:
        wide_x = x.float() * xs.t().repeat_interleave(128, 1)
        out.copy_(wide_x @ (w.float() * ws.repeat_interleave(128, 0).repeat_interleave(128, 1)).t())

    monkeypatch.setattr(library, "scaled_mm", product)
    with torch.device("meta"):
        assert missing("scaled_mm", torch.device("cpu")) == ""
    monkeypatch.setattr(library, "scaled_mm", lambda x, xs, w, ws, out: product(x, xs.flip(0), w, ws, out))
    assert missing("scaled_mm", torch.device("cpu")) == "it gives wrong sums"
