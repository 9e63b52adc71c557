"""DeepSeek-V4 from token ids to logits (spec 2.0), on flat tokens with batch metadata.

The model is cut into regions that are compiled once each: `Prologue`, one `Block` per distinct layer kind, `Head`,
and the `MTPBlock`. `DeepseekV4` strings them together; it is what the regions together must equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atomc.models.deepseek_v4.attention import Attention, AttentionState, Rope
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.hyper_connection import HyperConnection, HyperHead, Residual, enter
from atomc.models.deepseek_v4.layers import Angles, Linear, RMSNorm, angles, inverse_frequencies
from atomc.models.deepseek_v4.moe import MoE
from atomc.ops import Batch


class StepAngles(NamedTuple):
    """All rotation angles of a step, computed once: plain and YaRN at the tokens, YaRN at completed CSA, HCA rows."""

    plain: Angles
    yarn: Angles
    csa_rows: Angles
    hca_rows: Angles

    def of(self, ratio: int) -> Rope:
        """The angles a layer of compress ratio `ratio` uses."""
        if ratio == 0:
            return Rope(self.plain, self.plain)
        return Rope(self.yarn, self.csa_rows if ratio == 4 else self.hca_rows)


class Embedding(nn.Module):
    """weight [V, D]."""

    def __init__(self, config: DeepseekV4Config, dtype: torch.dtype) -> None:
        super().__init__()
        table = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        self.weight = nn.Parameter(table, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Prologue(nn.Module):
    """Embedding into n streams, and the step's rotation angles."""

    def __init__(self, config: DeepseekV4Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.n, self.csa_ratio, self.hca_ratio = config.hc_mult, config.csa_ratio, config.hca_ratio
        self.embed = Embedding(config, dtype)
        self.rope_plain = nn.Parameter(inverse_frequencies(config, compressed=False), requires_grad=False)
        self.rope_yarn = nn.Parameter(inverse_frequencies(config, compressed=True), requires_grad=False)

    def forward(self, batch: Batch) -> tuple[Residual, StepAngles]:
        return enter(self.embed(batch.ids), self.n), self.angles(batch)

    def angles(self, batch: Batch) -> StepAngles:
        def rows(ends_N: Tensor, ratio: int) -> Angles:
            # A row sits at its window's first position; padding entries (-1) get the angles of some token, unused.
            return angles(batch.positions[ends_N.clamp(min=0)] - (ratio - 1), self.rope_yarn)

        return StepAngles(
            plain=angles(batch.positions, self.rope_plain),
            yarn=angles(batch.positions, self.rope_yarn),
            csa_rows=rows(batch.csa_ends, self.csa_ratio),
            hca_rows=rows(batch.hca_ends, self.hca_ratio),
        )


class Block(nn.Module):
    """One layer: attention and MoE sublayers between hyper-connections."""

    def __init__(self, config: DeepseekV4Config, ratio: int, hash_routing: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.hc_attn = HyperConnection(config)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, ratio, dtype)
        self.hc_ffn = HyperConnection(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = MoE(config, hash_routing, dtype)

    def forward(self, residual: Residual, batch: Batch, rope: Rope, state: AttentionState) -> Residual:
        h = residual.streams()
        x, post, comb = self.hc_attn(h)
        y = self.attn(self.attn_norm(x), batch, rope, state)
        h = Residual(h, y, post, comb).streams()
        x, post, comb = self.hc_ffn(h)
        y = self.ffn(self.ffn_norm(x), batch.ids)
        return Residual(h, y, post, comb)


class Head(nn.Module):
    """Collapse of the streams, final norm and logits of the wanted rows."""

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__()
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, torch.float32)

    def forward(self, residual: Residual, batch: Batch) -> Tensor:
        """-> logits [L, V] fp32 of the tokens `batch.logit_rows`."""
        wanted = Residual(*(part[batch.logit_rows] for part in residual))
        logits: Tensor = self.head(self.norm(self.hc_head(wanted.streams())).float())
        return logits


class MTPBlock(nn.Module):
    """The multi-token-prediction block of the preview releases (spec 2.9): predicts token t+2.

    Reads the main model's streams after its last layer and the token at t+1; embedding and head are the main model's.
    """

    def __init__(self, config: DeepseekV4Config, dtype: torch.dtype) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.e_proj, self.h_proj = Linear(d, d, dtype), Linear(d, d, dtype)
        self.block = Block(config, ratio=0, hash_routing=False, dtype=dtype)
        self.head = Head(config)

    def forward(
        self, residual: Residual, next_embed_TD: Tensor, batch: Batch, rope: Rope, state: AttentionState
    ) -> tuple[Tensor, Residual]:
        """Residual after the last layer, embeddings [T, D] of the ids at t+1 -> logits [L, V], residual to chain."""
        h_TnD = residual.streams()
        z_TnD = self.e_proj(self.enorm(next_embed_TD)).unsqueeze(-2) + self.h_proj(self.hnorm(h_TnD))
        out = self.block(_settled(z_TnD), batch, rope, state)
        return self.head(out, batch), out


def _settled(h_TnD: Tensor) -> Residual:
    """Streams with nothing left to mix in."""
    zeros = torch.zeros(h_TnD.shape[:2], dtype=torch.float32, device=h_TnD.device)
    eye = torch.eye(h_TnD.shape[1], dtype=torch.float32, device=h_TnD.device)
    return Residual(h_TnD, h_TnD[:, 0], zeros, eye.expand(h_TnD.shape[0], -1, -1).contiguous())


class DeepseekV4(nn.Module):
    """The whole main model, eager: the semantics that capture, passes and runtime must preserve."""

    def __init__(self, config: DeepseekV4Config, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.prologue = Prologue(config, dtype)
        self.layers = nn.ModuleList(
            Block(config, config.compress_ratios[i], config.layer_kind(i).moe == "hash", dtype)
            for i in range(config.num_hidden_layers)
        )
        self.head = Head(config)

    def forward(self, batch: Batch, states: list[AttentionState]) -> Tensor:
        """-> logits [L, V] fp32 of the rows that `batch.logit_rows` names; `states` are updated in place."""
        residual, step_angles = self.prologue(batch)
        for layer, ratio, state in zip(self.layers, self.config.compress_ratios, states, strict=False):
            residual = layer(residual, batch, step_angles.of(ratio), state)
        logits: Tensor = self.head(residual, batch)
        return logits
