"""One training step of deepseek-v4-nano, and the schedule that rules it."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomc.models.nano.config import NanoConfig
from atomc.models.nano.data import Corpus, Validation
from atomc.models.nano.evaluate import Model, Report, evaluate
from atomc.models.nano.optim import Optimizer
from atomc.models.nano.quant import round_trip
from atomc.models.nano.weights import WeightSpec, initial_weights, weight_specs

DENSE_UNTIL = 0.3  # compressed rows are attended densely, so that the indexer learns from the full attention mass
COOLDOWN_FROM = 0.4
QUANTIZED_FROM = 0.75
MTP_WEIGHT = 0.1
ROUTER_BIAS_RATE = 1e-3
BASE_LR = {"muon": 0.02, "embed": 0.03, "head": 0.004, "scalar": 0.003}


@dataclass
class Settings:
    """Length of the schedule (`minutes`, `steps` or both) and hyper-parameters; `lr_scale` multiplies `BASE_LR`."""

    batch: int
    context: int
    minutes: float | None
    steps: int | None
    lr_scale: float
    weight_decay: float
    seed: int


@dataclass
class State:
    """What a checkpoint holds besides weights and optimizer. `history` rows: step, progress, bits/byte and index KL."""

    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def live_weights(masters: dict[str, Tensor], specs: dict[str, WeightSpec], quantized: bool) -> dict[str, Tensor]:
    """The leaves one step computes with: bf16, rounded to the shipped format when `quantized`; F32 weights as they are.

    The gradient with respect to a leaf is taken as its master's: that is the straight-through estimator.
    """
    live = {}
    for name, master in masters.items():
        spec, value = specs[name], master.detach()
        if spec.format in ("fp8", "fp4", "bf16"):
            value = (round_trip(value, spec) if quantized else value).bfloat16()
        live[name] = value.requires_grad_(spec.format != "i64" and not name.endswith("gate.bias"))
    return live


def lr_at(progress: float, step: int, settings: Settings) -> dict[str, float]:
    """Warm-up over 100 steps, constant, then linear to zero."""
    shape = min(1.0, (step + 1) / 100) * min(1.0, max(0.0, 1 - progress) / (1 - COOLDOWN_FROM))
    return {kind: base * shape * settings.lr_scale for kind, base in BASE_LR.items()}


class CapturedUpdate:
    """On a GPU a CUDA graph from the third call on: two thousand launches a step cost the host more than the GPU."""

    def __init__(self, update: Callable[[Tensor], Tensor]) -> None:
        self.update, self.calls = update, 0

    def __call__(self, rows: Tensor) -> Tensor:
        self.calls += 1
        if not rows.is_cuda or self.calls < 3:
            return self.update(rows)
        if self.calls == 3:
            self.rows, self.graph = rows.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.losses = self.update(self.rows)
        self.rows.copy_(rows)
        self.graph.replay()
        return self.losses.clone()


class Trainer:
    """Masters, optimizer and schedule; one `step` is one update."""

    def __init__(
        self, settings: Settings, config: NanoConfig, corpus: Corpus, device: torch.device, compiled: bool
    ) -> None:
        self.settings, self.config, self.corpus = settings, config, corpus
        self.specs = weight_specs(config)
        initial = initial_weights(config, corpus.token_counts(config.vocab_size), settings.seed)
        self.masters = {name: value.to(device) for name, value in initial.items()}
        self.optimizer = Optimizer(self.masters, self.specs, config)
        self.model = Model.create(config, compiled)
        self.state = State()
        self.dense_rows = torch.zeros((), dtype=torch.bool, device=device)
        self.bias_rate = torch.zeros((), device=device)
        self.quantized = False
        self.update = CapturedUpdate(partial(self._update, quantized=False))

    @property
    def progress(self) -> float:
        s, state = self.settings, self.state
        by_steps = state.step / s.steps if s.steps else 0.0
        return max(by_steps, state.seconds / (60 * s.minutes) if s.minutes else 0.0)

    def seconds_left(self, seconds_per_step: float) -> float:
        s, state = self.settings, self.state
        by_steps = (s.steps - state.step) * seconds_per_step if s.steps else math.inf
        return max(0.0, min(by_steps, 60 * s.minutes - state.seconds if s.minutes else math.inf))

    def step(self) -> Tensor:
        """One update. Returns mean (next-token, MTP, index KL) losses in nats, still on the device."""
        s, state, progress = self.settings, self.state, self.progress
        rows = self.corpus.crops(state.step * s.batch, s.batch, s.context + 2)
        lr = lr_at(progress, state.step, s)
        self.optimizer.set_rates(lr, min(0.95, 0.85 + state.step / 3000))
        self.bias_rate.fill_(ROUTER_BIAS_RATE * lr["muon"] / BASE_LR["muon"])
        self.dense_rows.fill_(progress < DENSE_UNTIL)
        state.step += 1
        if progress >= QUANTIZED_FROM and not self.quantized:
            self.quantized = True
            self.update = CapturedUpdate(partial(self._update, quantized=True))
            torch.cuda.empty_cache()  # the old graph's activations
        return self.update(rows)

    def _update(self, rows: Tensor, quantized: bool) -> Tensor:
        """Device work only, the same every time: it can be captured as a CUDA graph."""
        live = live_weights(self.masters, self.specs, quantized)
        losses = self.model.losses(live, rows, self.dense_rows)
        index_kl = torch.stack([attn.index_kl_BT.mean() for attn in losses.attn])  # zero but in CSA layers
        nll, mtp_nll, kl = losses.nll_BT.mean(), losses.mtp_nll_BT.mean(), index_kl.sum()
        (nll + MTP_WEIGHT * mtp_nll + kl).backward()
        grads = {name: leaf.grad for name, leaf in live.items() if leaf.grad is not None}
        self.optimizer.step(grads, self.settings.weight_decay)
        self._balance([ffn.load_E for ffn in losses.ffn])
        return torch.stack([nll, mtp_nll, kl]).detach()

    @torch.no_grad()
    def _balance(self, load_of_block: list[Tensor]) -> None:
        """Loss-free balancing: the selection bias of an overloaded expert falls, of an idle one rises."""
        for (prefix, layer), load_E in zip(self.config.blocks, load_of_block, strict=True):
            if not self.config.is_hash(layer):
                self.masters[f"{prefix}.ffn.gate.bias"] += self.bias_rate * torch.sign(load_E.mean() - load_E)

    def evaluate(self, validation: Validation, quantized: bool) -> Report:
        live = live_weights(self.masters, self.specs, quantized)
        return evaluate(self.model, live, validation, self.settings.batch)

    def save(self, path: Path) -> None:
        """Atomic: a killed process leaves the last whole checkpoint."""
        content = {"masters": dict(self.masters), "optimizer": self.optimizer.state(), "state": asdict(self.state)}
        torch.save(content, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)

    def load(self, path: Path) -> None:
        content: dict[str, Any] = torch.load(path, map_location=self.masters["embed"].device, weights_only=True)
        for name, value in content["masters"].items():
            self.masters[name].copy_(value)
        self.optimizer.load_state(content["optimizer"])
        self.state = State(**content["state"])
