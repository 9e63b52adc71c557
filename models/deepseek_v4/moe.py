"""Mixture of experts (spec 2.8): router (top-k or hash), routed experts, one shared expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.layers import Linear, swiglu

WEIGHT_SUM_EPS = 1e-20  # as transformers; the reference has none, and a sum of square roots is far above it


class Gate(nn.Module):
    """The router. weight [E, D] fp32; `bias` [E] selects in top-k layers, `tid2eid` [V, k] in hash layers."""

    def __init__(self, config: DeepseekV4Config, hash_routing: bool) -> None:
        super().__init__()
        experts, self.k = config.n_routed_experts, config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        self.hash_routing = hash_routing
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size), requires_grad=False)
        if hash_routing:
            table = torch.empty(config.vocab_size, self.k, dtype=torch.int32)
            self.tid2eid = nn.Parameter(table, requires_grad=False)
        else:
            self.bias = nn.Parameter(torch.empty(experts), requires_grad=False)

    def forward(self, x_TD: Tensor, ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """-> weights [T, k] fp32, expert indices [T, k] int64."""
        scores = F.softplus(F.linear(x_TD.float(), self.weight)).sqrt()
        if self.hash_routing:
            indices = self.tid2eid[ids_T].long()
        else:
            indices = torch.topk(scores + self.bias, self.k, dim=-1, sorted=False).indices
        weights = scores.gather(-1, indices)
        return weights / (weights.sum(-1, keepdim=True) + WEIGHT_SUM_EPS) * self.scale, indices


class Experts(nn.Module):
    """Routed experts, stacked: w13 [E, 2I, D] (w1 = gate rows, then w3 = up rows), w2 [E, D, I]."""

    def __init__(self, config: DeepseekV4Config, dtype: torch.dtype) -> None:
        super().__init__()
        e, d, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.w13 = nn.Parameter(torch.empty(e, 2 * i, d, dtype=dtype), requires_grad=False)
        self.w2 = nn.Parameter(torch.empty(e, d, i, dtype=dtype), requires_grad=False)

    def forward(self, x_TD: Tensor, weights_Tk: Tensor, indices_Tk: Tensor) -> Tensor:
        """-> [T, D] fp32, the weighted sum over the k experts of each token."""
        gate, up = torch.ops.atom.grouped_linear(x_TD, self.w13, indices_Tk).chunk(2, dim=-1)
        a = swiglu(gate, up, self.limit) * weights_Tk.unsqueeze(-1)  # before w2, as the reference does
        y_TkD = torch.ops.atom.grouped_linear(a.to(x_TD.dtype), self.w2, indices_Tk)
        out: Tensor = y_TkD.float().sum(dim=1)
        return out


class SharedExpert(nn.Module):
    """The expert every token passes through, with weight 1."""

    def __init__(self, config: DeepseekV4Config, dtype: torch.dtype) -> None:
        super().__init__()
        d, i = config.hidden_size, config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.w1 = Linear(d, i, dtype)
        self.w3 = Linear(d, i, dtype)
        self.w2 = Linear(i, d, dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(swiglu(self.w1(x), self.w3(x), self.limit).to(x.dtype))
        return out


class MoE(nn.Module):
    """`Σ_k weight_k · expert_k(x) + shared(x)`, summed in fp32."""

    def __init__(self, config: DeepseekV4Config, hash_routing: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = Gate(config, hash_routing)
        self.experts = Experts(config, dtype)
        self.shared_experts = SharedExpert(config, dtype)

    def forward(self, x_TD: Tensor, ids_T: Tensor) -> Tensor:
        weights, indices = self.gate(x_TD, ids_T)
        routed = self.experts(x_TD, weights, indices)
        out: Tensor = (routed + self.shared_experts(x_TD).float()).to(x_TD.dtype)
        return out
