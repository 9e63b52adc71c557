"""Differentiable dense forward of DeepSeek-V4 on `[B, T]` sequences, for training and evaluation.

Weights are a mapping of tensors by official name (`weights.py`); the model runs in the dtype of `embed`. Every query
block of `sliding_window` tokens scores its own and the previous block, and all compressed rows under a mask, so the
cost is linear in T except for the compressed rows. T must be a multiple of the window and of every compress ratio;
causality makes padding on the right harmless.

Shape suffixes: B batch, T tokens, D hidden, n streams, E experts, N = B*T.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atomc.models.nano.attention import attention
from atomc.models.nano.config import LayerKind, NanoConfig
from atomc.models.nano.layers import Rope, Weights, rms_norm, rope_table
from atomc.models.nano.mhc import hc_head, hc_post, hc_pre
from atomc.models.nano.moe import moe

_FINAL = ("norm", "hc_head")


class AttnOut(NamedTuple):
    """`index_kl_BT` is zero where the layer has no indexer or the query sees no compressed row."""

    h_BTnD: Tensor
    index_kl_BT: Tensor
    index_recall_BT: Tensor


class FfnOut(NamedTuple):
    """`load_E`: tokens per expert."""

    h_BTnD: Tensor
    load_E: Tensor


class Output(NamedTuple):
    """Final-normed hidden states (main and MTP) and the training signals of every block."""

    x_BTD: Tensor
    x_mtp_BTD: Tensor
    attn: list[AttnOut]
    ffn: list[FfnOut]


def attention_sublayer(
    h_BTnD: Tensor, w: Weights, kind: LayerKind, ratio: int, rope: Rope, dense_rows: Tensor, c: NanoConfig
) -> AttnOut:
    """Hyper-connected attention: collapse the streams, norm, attend, write back."""
    x_BTD, post, comb = hc_pre(h_BTnD, w, "hc_attn", c)
    x_BTD = rms_norm(x_BTD, w["attn_norm"], c.rms_norm_eps)
    y_BTD, kl_BT, recall_BT = attention(x_BTD, w, kind, ratio, rope, dense_rows, c)
    return AttnOut(hc_post(y_BTD, h_BTnD, post, comb), kl_BT, recall_BT)


def ffn_sublayer(h_BTnD: Tensor, w: Weights, ids_BT: Tensor | None, c: NanoConfig) -> FfnOut:
    """Hyper-connected mixture of experts; hash layers pass the token ids."""
    x_BTD, post, comb = hc_pre(h_BTnD, w, "hc_ffn", c)
    x_BTD = rms_norm(x_BTD, w["ffn_norm"], c.rms_norm_eps)
    y_ND, load_E = moe(x_BTD.flatten(0, 1), w, None if ids_BT is None else ids_BT.flatten(), c)
    return FfnOut(hc_post(y_ND.view_as(x_BTD), h_BTnD, post, comb), load_E)


def final_hidden(h_BTnD: Tensor, w: Weights, c: NanoConfig) -> Tensor:
    """Collapse the streams and norm, `[B, T, D]`: what the head reads."""
    return rms_norm(hc_head(h_BTnD, w, c), w["norm"], c.rms_norm_eps)


def mtp_input(e_BTD: Tensor, h_BTnD: Tensor, w: Weights, c: NanoConfig) -> Tensor:
    """`e_BTD`: embeddings of the following tokens; `h_BTnD`: the main model's streams after its last layer."""
    e = rms_norm(e_BTD, w["enorm"], c.rms_norm_eps) @ w["e_proj"].T
    return e[:, :, None] + rms_norm(h_BTnD, w["hnorm"], c.rms_norm_eps) @ w["h_proj"].T


@dataclass(frozen=True)
class Regions:
    """The functions the forward is built from; `compiled()` compiles each once per distinct layer kind."""

    attention: Callable[..., AttnOut] = attention_sublayer
    ffn: Callable[..., FfnOut] = ffn_sublayer
    final: Callable[..., Tensor] = final_hidden
    mtp_input: Callable[..., Tensor] = mtp_input

    @staticmethod
    def compiled() -> "Regions":
        compile_region: Callable[..., Any] = partial(torch.compile, dynamic=False, fullgraph=True)
        return Regions(*map(compile_region, (attention_sublayer, ffn_sublayer, final_hidden, mtp_input)))


def scope(weights: Weights, prefix: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights below `prefix` whose local name starts with one of `parts`, by local name.

    Regions get exactly the weights they use, so that layers of one kind share one compiled graph.
    """
    local = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return {name: value for name, value in local.items() if name.startswith(parts)}


def forward(
    weights: Weights, ids_BT: Tensor, next_ids_BT: Tensor, c: NanoConfig, dense_rows: Tensor, run: Regions | None = None
) -> Output:
    """`next_ids_BT` are the ids one position later (for the MTP block); logits are `x @ head.T`."""
    run, T, device = run or Regions(), ids_BT.shape[1], ids_BT.device
    ropes: dict[LayerKind, Rope] = {kind: rope_table(c, kind, T, device) for kind in ("swa", "csa")}
    ropes["hca"] = ropes["csa"]
    attn: list[AttnOut] = []
    ffn: list[FfnOut] = []
    h_BTnD = weights["embed"][ids_BT][:, :, None].repeat(1, 1, c.hc_mult, 1)
    x_BTD = h_BTnD
    for prefix, layer in c.blocks:
        if layer == c.num_hidden_layers:
            x_BTD = run.final(h_BTnD, scope(weights, "", _FINAL), c)
            w_input = scope(weights, f"{prefix}.", ("e_proj", "h_proj", "enorm", "hnorm"))
            h_BTnD = run.mtp_input(weights["embed"][next_ids_BT], h_BTnD, w_input, c)
        w_attn = scope(weights, f"{prefix}.", ("attn", "hc_attn"))
        kind, ratio = c.kind(layer), c.compress_ratios[layer]
        attn.append(run.attention(h_BTnD, w_attn, kind, ratio, ropes[kind], dense_rows, c))
        w_ffn = scope(weights, f"{prefix}.", ("ffn", "hc_ffn"))
        ffn.append(run.ffn(attn[-1].h_BTnD, w_ffn, ids_BT if c.is_hash(layer) else None, c))
        h_BTnD = ffn[-1].h_BTnD
    return Output(x_BTD, run.final(h_BTnD, scope(weights, "mtp.0.", _FINAL), c), attn, ffn)
