"""The judge of the eager model: transformers' DeepseekV4ForCausalLM with the same weights, in fp32, a sequence at once.

A top-k whose candidates score equal up to rounding has two right answers, and either changes the logits visibly. Where
the model under test chose such an equal, and nowhere else, the oracle is asked again with that choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atomc.models.deepseek_v4.hf_names import official_name, stacked_experts
from atomc.models.deepseek_v4.model import DeepseekV4
from atomc.models.deepseek_v4.weights import official_parameter
from tests.support.eager import Choices, Run

TOLERANCE = 2e-5  # largest absolute difference of two fp32 logits, at a logit std of about 1
TIE = 2e-5  # scores (of order 1) closer than this are equal: both sides compute them from fp32 streams


class Oracle:
    """transformers' model with the weights that `model` has now, each under the name of the same official tensor."""

    def __init__(self, model: DeepseekV4, dtype: torch.dtype = torch.float32) -> None:
        from transformers import DeepseekV4ForCausalLM
        from transformers.models.deepseek_v4 import DeepseekV4Config

        config = DeepseekV4Config(**model.config.to_transformers_dict())
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"  # its grouped matrix product wants aligned sizes
        self._hf = DeepseekV4ForCausalLM(config).to(dtype).eval()
        ours = {official_parameter(n): p for n, p in model.named_parameters() if "rope_" not in n}
        theirs = {_official(name): name for name in self._hf.state_dict()}
        assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
        self._hf.load_state_dict({theirs[name]: parameter for name, parameter in ours.items()})

    @torch.no_grad()
    def logits(self, ids: Tensor, choices: Choices | None = None, tie: float = TIE) -> Tensor:
        """[T, V] of a whole sequence. `choices` are taken wherever they equal its own up to `tie`."""
        handles = [] if choices is None else self._settle(choices, tie)
        try:
            out: Tensor = self._hf(ids[None], use_cache=False).logits[0].float()
        finally:
            for handle in handles:
                handle.remove()
        return out

    @torch.no_grad()
    def rounding(self, ids: Tensor, choices: Choices) -> float:
        """How far half a rounding step of every weight moves the logits: what any implementation may be off by.

        Measured over 1200 random models: the eager model's difference is 0.7 of this in the median and 2.1 at most.
        """
        generator = torch.Generator().manual_seed(0)
        before = self.logits(ids, choices)
        weights = {name: value.clone() for name, value in self._hf.state_dict().items()}
        for parameter in self._hf.parameters():
            parameter.mul_(1 + 2**-24 * torch.randn(parameter.shape, generator=generator))
        moved = _largest(self.logits(ids, choices), before)
        self._hf.load_state_dict(weights)
        return moved

    def _settle(self, choices: Choices, tie: float) -> list[Any]:
        handles = []
        for path, chosen in choices.items():
            layer = self._hf.model.layers[int(path.split(".")[1])]
            if path.endswith(".indexer"):
                hook = _IndexHook(chosen, tie)
                indexer = layer.self_attn.compressor.indexer
                handles += [indexer.scorer.register_forward_hook(hook.scored), indexer.register_forward_hook(hook)]
            elif not layer.mlp.is_hash:
                handles.append(layer.mlp.gate.register_forward_hook(_GateHook(chosen, tie)))
        return handles


def _official(name: str) -> str:
    """The name that `official_parameter` gives the same tensor of ours, for an entry of transformers' state dict."""
    name = official_name(name)
    stacked = stacked_experts(name)
    if stacked is None:
        return name
    prefix, projections, _ = stacked
    return prefix + ("w13" if len(projections) == 2 else "w2")


def _members(chosen: Tensor, candidates: int) -> Tensor:
    """[T, n] whether a candidate is among the chosen [T, k]; -1 is none."""
    padded = torch.zeros((len(chosen), candidates + 1), dtype=torch.bool)
    return padded.scatter(1, chosen.long() % (candidates + 1), True)[:, :candidates]  # -1 -> the last, cut off


def _equals(scores: Tensor, own: Tensor, other: Tensor, tie: float) -> Tensor:
    """[T] whether `other` is another top-k of the same scores, up to `tie`: members own, other [T, n]."""
    worst_own = scores.masked_fill(~own, torch.inf).amin(-1)
    worst_other = scores.masked_fill(~other, torch.inf).amin(-1)
    return (own.sum(-1) == other.sum(-1)) & (worst_other >= worst_own - tie)


def _as_wide(chosen: Tensor, own: Tensor) -> Tensor:
    """`chosen` in as many columns as `own`: padding (-1), wherever it stands, goes or comes last."""
    ordered = chosen.long().sort(-1, descending=True).values[:, : own.shape[-1]]
    return nn.functional.pad(ordered, (0, own.shape[-1] - ordered.shape[-1]), value=-1)


class _IndexHook:
    """On an indexer: replaces its rows [1, T, k] by equal ones."""

    def __init__(self, chosen: Tensor, tie: float) -> None:
        self.chosen, self.tie = chosen, tie

    def scored(self, _: nn.Module, __: tuple[Any, ...], scores: Tensor) -> None:
        rows = torch.arange(scores.shape[-1])
        visible = (torch.arange(scores.shape[1])[:, None] + 1) // 4  # spec 2.6
        self.scores = scores[0].masked_fill(rows >= visible, -torch.inf)

    def __call__(self, _: nn.Module, __: tuple[Any, ...], own: Tensor) -> Tensor:
        rows = self.scores.shape[-1]
        if rows == 0:
            return own
        settled = _equals(self.scores, _members(own[0], rows), _members(self.chosen, rows), self.tie)
        ours = _as_wide(self.chosen, own)
        return torch.where(settled[:, None], ours, own[0])[None]


class _GateHook:
    """On a top-k router: replaces its experts by equal ones, and their weights."""

    def __init__(self, chosen: Tensor, tie: float) -> None:
        self.chosen, self.tie = chosen, tie

    def __call__(self, gate: Any, _: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, own = output[0], output[2]
        scores = gate.score_fn(logits)
        experts = scores.shape[-1]
        ranked = scores + gate.e_score_correction_bias
        settled = _equals(ranked, _members(own, experts), _members(self.chosen, experts), self.tie)
        indices = torch.where(settled[:, None], _as_wide(self.chosen, own), own)
        weights = scores.gather(1, indices)
        return logits, weights / (weights.sum(-1, keepdim=True) + 1e-20) * gate.routed_scaling_factor, indices


def difference(oracle: Oracle, ids: Tensor, run: Run) -> float:
    """Largest absolute difference of the logits of a run from the oracle's, ties settled; NaN counts as infinite."""
    found = _largest(run.logits, oracle.logits(ids))
    return found if found <= TOLERANCE else _largest(run.logits, oracle.logits(ids, run.choices))


def _largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().nan_to_num(nan=torch.inf).max().item()
