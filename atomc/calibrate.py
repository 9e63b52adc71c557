"""Calibration: what enters each product on real text, channel by channel, so that scales can be chosen by it.

Contract:
    For the weight X [N, K] of a product, `X` in the file is [K] float32: the mean square of each input channel over all
    tokens. Routed experts have a file entry each, over the tokens that went to them; an expert that no token reached
    has none, and its scales are chosen as without calibration. The artifact that is run computes in full (`--scheme
    none`), else its own rounding would be measured.

Terms:
    importance    these mean squares, where scales are chosen (`atomc.formats.choice`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from atomc.artifact.plan import CallPlan, RegionPlan, Slot, Step
from atomc.artifact.store import read_manifest
from atomc.calibration import CalibrationError
from atomc.models.deepseek_v4.weights import official_parameter
from atomc.ops.experts import weighted_swiglu
from atomc.recipes import members
from atomc.runtime.bind import Environment, Sizes
from atomc.runtime.evaluate import evaluate
from atomc.runtime.executor import Executor

Progress = Callable[[int, int], None]


class Sums:
    """Sums of squares by weight, with the number of tokens they are over."""

    def __init__(self) -> None:
        self.squares: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Add inputs x [..., K] of the weight `name`."""
        rows = x.reshape(-1, x.shape[-1]).double()
        self.squares[name] = self.squares.get(name, 0) + rows.square().sum(0)
        self.tokens[name] = self.tokens.get(name, 0) + rows.shape[0]

    def means(self) -> dict[str, Tensor]:
        """[K] float32 by weight, in order of name."""
        return {name: (self.squares[name] / self.tokens[name]).float() for name in sorted(self.squares)}


class InputWatch:
    """Sees the input of every product of a run."""

    def __init__(self, sums: Sums) -> None:
        self.sums = sums

    def before(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        """Add what the step is about to multiply."""
        step = region.steps[at]
        if step.op in ("aten.linear.default", "aten.bmm.default"):
            for name in _weights(step, region, call, 1):
                self.sums.add(name, cast(Tensor, env[cast(Slot, step.args[0]).id]))
        elif step.op == "atom.moe_experts.default":
            self._experts(call, [env[a.id] if isinstance(a, Slot) else a for a in step.args])

    def after(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        """Nothing is looked at after a step."""

    def _experts(self, call: CallPlan, args: list[Any]) -> None:
        """What each expert's w1, w3 and w2 multiply (`atomc.ops.experts.moe_experts`)."""
        x, w13, _, indices, weights, limit = args
        for expert in torch.unique(indices).tolist():
            token, choice = torch.where(indices == expert)
            a = weighted_swiglu(F.linear(x[token], w13[expert]), weights[token, choice], limit)
            prefix = f"{call.prefix}ffn.experts.{expert}."
            for name, value in (("w1", x[token]), ("w3", x[token]), ("w2", a)):
                self.sums.add(f"{prefix}{name}.weight", value)


def _weights(step: Step, region: RegionPlan, call: CallPlan, argument: int) -> Iterator[str]:
    """Official names of the weights that a product multiplies by."""
    slot = cast(Slot, step.args[argument]).id
    base = region.slots[slot].base
    owner = slot if base is None else base
    for item in region.inputs:
        if item.role == "weight" and item.slot == owner:
            yield from (official_parameter(call.prefix + part) for part in members(item.name))


class _Watched:
    """An executor every step of which is watched."""

    def __init__(self, executor: Executor, watch: InputWatch) -> None:
        self._executor, self._watch = executor, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def step(self, batch: Any) -> Tensor:
        return self._executor.step(batch, self._watch)


def calibrate(executor: Executor, documents: Iterable[str], progress: Progress = lambda *_: None) -> dict[str, Tensor]:
    """Run the documents and return the mean squares of every product's input, by the weight's official name.

    Raises:
        CalibrationError: the artifact rounds what enters its products.
    """
    scheme = read_manifest(executor.folder).scheme
    if scheme["rules"] or {scheme["rows"], scheme["index_rows"]} != {"compute"}:
        raise CalibrationError(
            f"{executor.folder} has the scheme {scheme['name']}: what enters its products is rounded. Calibrate with "
            "an artifact that is compiled with --scheme none."
        )
    sums = Sums()
    evaluate(cast(Executor, _Watched(executor, InputWatch(sums))), documents, progress=progress)
    return sums.means()
