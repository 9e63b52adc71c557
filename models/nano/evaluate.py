"""Validation bits per byte, exact: -log2 p summed over every token of every document, divided by its UTF-8 bytes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atomc.models.nano.config import NanoConfig
from atomc.models.nano.data import Validation
from atomc.models.nano.dense import AttnOut, FfnOut, Regions, forward


def token_nll(x_BTD: Tensor, head_VD: Tensor, target_BT: Tensor) -> Tensor:
    """Negative log-likelihood in nats, fp32 `[B, T]`."""
    logits = (x_BTD @ head_VD.T).float()
    return F.cross_entropy(logits.flatten(0, 1), target_BT.flatten(), reduction="none").view_as(target_BT)


class Losses(NamedTuple):
    """`nll_BT` predicts the next token, `mtp_nll_BT` the one after it."""

    nll_BT: Tensor
    mtp_nll_BT: Tensor
    attn: list[AttnOut]
    ffn: list[FfnOut]


@dataclass(frozen=True)
class Model:
    """The forward together with the loss, over rows of `T + 2` tokens."""

    config: NanoConfig
    regions: Regions
    nll: Callable[[Tensor, Tensor, Tensor], Tensor]

    @staticmethod
    def create(config: NanoConfig, compiled: bool) -> "Model":
        if not compiled:
            return Model(config, Regions(), token_nll)
        return Model(config, Regions.compiled(), torch.compile(token_nll, dynamic=False, fullgraph=True))

    def losses(self, weights: Mapping[str, Tensor], rows: Tensor, dense_rows: Tensor) -> Losses:
        # Contiguous slices: the compiled regions then see one memory layout in every call.
        ids_BT, next_BT, after_BT = (rows[:, shift : rows.shape[1] - 2 + shift].contiguous() for shift in range(3))
        out = forward(weights, ids_BT, next_BT, self.config, dense_rows, self.regions)
        nll_BT = self.nll(out.x_BTD, weights["head"], next_BT)
        return Losses(nll_BT, self.nll(out.x_mtp_BTD, weights["head"], after_BT), out.attn, out.ffn)


@dataclass(frozen=True)
class Report:
    """Bits per byte over all documents and per domain; share of the tokens each expert gets, per block."""

    bits_per_byte: float
    by_domain: dict[str, float]
    expert_share: list[list[float]]


def _batch(model: Model, weights: Mapping[str, Tensor], rows: Tensor, scored_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Nats per row `[B]`, tokens per block and expert `[L, E]`. A function of its own: all activations die here."""
    losses = model.losses(weights, rows, torch.zeros((), dtype=torch.bool, device=rows.device))
    nats_B = (losses.nll_BT.detach() * scored_BT).double().sum(1)
    return nats_B, torch.stack([ffn.load_E.detach().double() for ffn in losses.ffn])


def evaluate(model: Model, weights: Mapping[str, Tensor], validation: Validation, batch: int) -> Report:
    """Batches of one fixed size, in the caller's gradient mode: while training, this reuses the compiled graphs."""
    device, count = weights["embed"].device, len(validation.windows)
    nats, loads = [], []
    for first in range(0, count, batch):
        # The last batch is filled up from the front; what it repeats is dropped.
        index = torch.arange(first, first + batch) % count
        rows, scored_BT = validation.windows[index].to(device), validation.scored[index].to(device)
        nats_B, load_LE = _batch(model, weights, rows, scored_BT)
        nats.append(nats_B[: count - first])
        loads.append(load_LE)
    bits = (torch.cat(nats) / math.log(2)).tolist()
    bits_of = dict.fromkeys(validation.bytes_of_domain, 0.0)
    for of_window, domain in zip(bits, validation.domain_of_window, strict=True):
        bits_of[domain] += of_window
    size, load_LE = validation.bytes_of_domain, torch.stack(loads).sum(0)
    return Report(
        bits_per_byte=sum(bits_of.values()) / sum(size.values()),
        by_domain={domain: bits_of[domain] / size[domain] for domain in size if size[domain]},
        expert_share=(load_LE / load_LE.sum(1, keepdim=True)).tolist(),
    )


def index_recall(model: Model, weights: Mapping[str, Tensor], rows: Tensor) -> dict[str, float]:
    """By CSA block: share of dense attention's mass on compressed rows in the index's top-k, where that selects."""
    c = model.config
    losses = model.losses(weights, rows, torch.ones((), dtype=torch.bool, device=rows.device))
    recall = {}
    for (prefix, layer), attn in zip(c.blocks, losses.attn, strict=True):
        if c.kind(layer) == "csa":
            first = c.compress_ratios[layer] * (c.index_topk + 1)
            recall[prefix] = attn.index_recall_BT[:, first:].mean().item()
    return recall
