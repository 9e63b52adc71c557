"""The routed experts of few tokens, as `benchmarks.tune` tunes them: both products, SwiGLU, sums and sorting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from atomc.codegen.device import Device
from atomc.codegen.kernels import moe
from atomc.codegen.kernels.moe_config import Part, choose, problem_of
from atomc.formats import FP8_ACTIVATION, MXFP4
from benchmarks.kernel_inputs import Inputs
from benchmarks.tune_problem import SAMPLE, Configuration

KERNEL = "experts"
PRODUCTS = ("experts_in", "experts_out")  # that it launches
SHAPES = {"deepseek-v4-flash": (256, 4096, 2048, 6), "deepseek-v4-pro": (384, 7168, 3072, 6)}  # experts, D, I, choices
BUCKETS = (16, 64)
LIMIT = 10.0
LAYOUTS = [str(layout) for layout in (FP8_ACTIVATION, FP8_ACTIVATION, MXFP4, MXFP4)]
FEW = 32  # experts that a compile does with
# By tokens of a tile: how the first product is cut, and the second. With 8 a program has more of the registers free.
CUTS = {
    8: ([*(Part(64, 4, 4, splits) for splits in (1, 2, 4, 8)), Part(64, 2, 4, 1, 2), Part(64, 2, 4, 2, 2),
         Part(32, 2, 4, 1, 2), Part(32, 2, 4, 2, 2), Part(32, 2, 4, 2)],
        [Part(64, 4, 4), Part(64, 2, 4, 1, 2), Part(32, 2, 4)]),
    16: ([*(Part(64, 4, 4, splits) for splits in (1, 2, 4, 8))], [Part(128, 4, 4), Part(64, 4, 4)]),
}  # fmt: skip


@dataclass(frozen=True)
class Experts:
    """The routed experts of one model, in one bucket."""

    experts: int
    d: int
    i: int
    choices: int
    tokens: int
    kernel: str = KERNEL

    @property
    def key(self) -> dict[str, int | str]:
        """As `codegen.tuning` looks it up."""
        return problem_of(self.experts, self.choices, self.d, self.i, LAYOUTS)

    @property
    def bytes(self) -> float:
        """Of the weights of as many experts as uniform routing uses."""
        used = self.experts * (1 - (1 - self.choices / self.experts) ** SAMPLE[self.tokens])
        return used * 3 * self.i * self.d * (1 / 2 + 1 / 32)

    @property
    def flops(self) -> float:
        """Of one call."""
        return 6.0 * SAMPLE[self.tokens] * self.choices * self.i * self.d

    def agrees(self, given: Tensor, expected: Tensor) -> bool:
        """In norm: of the inner codes in FP8 some are rounded to the next one."""
        return float((given - expected).norm()) <= 1e-2 * float(expected.norm())

    def candidates(self, device: Device) -> list[Configuration]:
        """Every pair of CUTS, the static model's configuration first."""
        static = choose(device, self.choices, self.experts, fused=True, eights=False)
        tried = [(bm, first, second) for bm, parts in CUTS.items() for first, second in product(*parts)]
        found = [replace(static, bm=bm, first=first, second=second, fused=False) for bm, first, second in tried]
        return list(dict.fromkeys([static, *found]))

    def calls(self, device: Device, sets: int, place: str = "cuda") -> list[Callable[[], Tensor]]:
        """The operator on `sets` sets of tokens, routed at random; one set alone has few experts, for a compile."""
        at, m = Inputs(place), SAMPLE[self.tokens]
        experts = self.experts if sets > 1 else FEW
        w13, w2 = at.codes((experts, 2 * self.i, self.d), MXFP4), at.codes((experts, self.d, self.i), MXFP4)
        made = []
        for _ in range(sets):
            x = at.codes((m, self.d), FP8_ACTIVATION)
            indices = torch.rand(m, experts, device=place).topk(self.choices, dim=-1).indices
            weights = torch.rand(m, self.choices, device=place)
            given = (*x, *w13, *w2, indices, weights, LIMIT, *LAYOUTS, torch.bfloat16)
            made.append(lambda given=given: moe.scaled_moe_experts(device, *given))
        return made


def problems(models: list[str]) -> Iterator[Experts]:
    """The models' experts, for every bucket of few tokens."""
    for model in models:
        for tokens in BUCKETS:
            yield Experts(*SHAPES[model], tokens)
