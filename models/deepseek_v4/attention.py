"""Attention (spec 2.3-2.7): shared-KV sparse attention over a window and compressed rows; SWA, CSA and HCA layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.layers import Angles, Linear, RMSNorm, rotate, unit_rms
from atomc.ops import Batch


class AttentionState(NamedTuple):
    """The caches of one layer (spec 4.1); None where the layer kind has no such state."""

    window: Tensor  # [window pages, page, dh] roped kv rows
    rows: Tensor | None  # [blocks, block_tokens/m, dh] compressed rows (CSA, HCA)
    partial: Tensor | None  # [slots, R, 2, w] fp32 compressor ring (CSA, HCA)
    index_rows: Tensor | None  # [blocks, block_tokens/4, di] (CSA)
    index_partial: Tensor | None  # [slots, 8, 2, 2·di] fp32 (CSA)


class Rope(NamedTuple):
    """Rotation angles of one layer: at this step's tokens, and at the first positions of its completed windows."""

    tokens: Angles
    rows: Angles


class Compressor(nn.Module):
    """Per-channel softmax pooling of m tokens into one row (spec 2.5); with overlap also of the m before (spec 2.6)."""

    def __init__(self, config: DeepseekV4Config, dim: int, ratio: int, overlap: bool) -> None:
        super().__init__()
        width = 2 * dim if overlap else dim
        self.ratio, self.overlap = ratio, overlap
        self.wkv = Linear(config.hidden_size, width, torch.float32)
        self.wgate = Linear(config.hidden_size, width, torch.float32)
        self.ape = nn.Parameter(torch.empty(ratio, width), requires_grad=False)
        self.norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x_TD: Tensor, batch: Batch, at: Angles, cache: Tensor, partial: Tensor) -> None:
        """Add the rows of the windows completed in this step to `cache`; keep the rest of the tokens in `partial`."""
        ends = batch.csa_ends if self.overlap else batch.hca_ends
        where = batch.positions, batch.requests, batch.query_start, batch.slots
        x = x_TD.float()
        kv, gate = self.wkv(x), self.wgate(x)
        pooled_Nd = torch.ops.atom.compressor_pool(kv, gate, self.ape, partial, ends, *where, self.overlap)
        torch.ops.atom.compressor_update(partial, kv, gate, *where)
        row_Nd = rotate(self.norm(pooled_Nd.to(cache.dtype)), at)
        torch.ops.atom.compressed_insert(
            cache, row_Nd, batch.block_table, ends, batch.positions, batch.requests, self.ratio
        )


class Indexer(nn.Module):
    """The lightning indexer (spec 2.7): scores the compressed rows of a CSA layer and picks each query's top K."""

    def __init__(self, config: DeepseekV4Config, ratio: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.ratio = ratio
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim, dtype)
        self.weights_proj = Linear(config.hidden_size, self.heads, torch.float32)
        self.compressor = Compressor(config, self.dim, ratio, overlap=True)

    def forward(self, x_TD: Tensor, qn: Tensor, batch: Batch, rope: Rope, state: AttentionState) -> Tensor:
        """-> [T, K] int32 row numbers, -1 padded."""
        assert state.index_rows is not None and state.index_partial is not None
        self.compressor(x_TD, batch, rope.rows, state.index_rows, state.index_partial)
        q = rotate(self.wq_b(qn).unflatten(-1, (self.heads, self.dim)), rope.tokens)
        weights = self.weights_proj(x_TD.float()) * (self.dim**-0.5 * self.heads**-0.5)
        topk: Tensor = torch.ops.atom.index_topk(
            q, weights, state.index_rows, batch.block_table, batch.requests, batch.positions, batch.query_start,
            self.ratio, self.topk,
        )  # fmt: skip
        return topk


class Attention(nn.Module):
    """One attention sublayer. `ratio` 0: window rows only (SWA); 4: + the indexer's top K (CSA); else + all (HCA)."""

    def __init__(self, config: DeepseekV4Config, ratio: int, dtype: torch.dtype) -> None:
        super().__init__()
        d, heads, dh = config.hidden_size, config.num_attention_heads, config.head_dim
        groups, rank = config.o_groups, config.o_lora_rank
        self.heads, self.head_dim, self.groups, self.ratio = heads, dh, groups, ratio
        self.window_size, self.eps = config.sliding_window, config.rms_norm_eps
        self.wq_a = Linear(d, config.q_lora_rank, dtype)
        self.q_norm = RMSNorm(config.q_lora_rank, self.eps)
        self.wq_b = Linear(config.q_lora_rank, heads * dh, dtype)
        self.wkv = Linear(d, dh, dtype)
        self.kv_norm = RMSNorm(dh, self.eps)
        self.wo_a = Linear(heads * dh // groups, groups * rank, dtype)
        self.wo_b = Linear(groups * rank, d, dtype)
        self.attn_sink = nn.Parameter(torch.empty(heads), requires_grad=False)
        self.compressor = Compressor(config, dh, ratio, overlap=ratio == 4) if ratio else None
        self.indexer = Indexer(config, ratio, dtype) if ratio == 4 else None

    def forward(self, x_TD: Tensor, batch: Batch, rope: Rope, state: AttentionState) -> Tensor:
        qn = self.q_norm(self.wq_a(x_TD))  # shared with the indexer
        q_THd = unit_rms(self.wq_b(qn).unflatten(-1, (self.heads, self.head_dim)), self.eps)
        q_THd = rotate(q_THd, rope.tokens)
        kv_Td = rotate(self.kv_norm(self.wkv(x_TD)), rope.tokens)  # one head, K = V
        torch.ops.atom.cache_insert(state.window, kv_Td, batch.window_table, batch.requests, batch.positions)
        if self.compressor is not None:
            assert state.rows is not None and state.partial is not None
            self.compressor(x_TD, batch, rope.rows, state.rows, state.partial)
        topk = self.indexer(x_TD, qn, batch, rope, state) if self.indexer is not None else None
        o_THd = torch.ops.atom.sparse_attention(
            q_THd, state.window, batch.window_table, state.rows, batch.block_table, topk, self.attn_sink,
            batch.requests, batch.positions, self.head_dim**-0.5, self.window_size, self.ratio,
        )  # fmt: skip
        return self.output(rotate(o_THd, rope.tokens, inverse=True))

    def output(self, o_THd: Tensor) -> Tensor:
        """Grouped output projection (spec 2.4): wo_a acts on each group of heads alone, wo_b joins the groups."""
        o_gTx = o_THd.flatten(-2).unflatten(-1, (self.groups, -1)).transpose(0, 1)
        wo_a = self.wo_a.weight.unflatten(0, (self.groups, -1))
        z_gTr = torch.bmm(o_gTx, wo_a.transpose(1, 2))
        out: Tensor = self.wo_b(z_gTr.transpose(0, 1).flatten(-2))
        return out
