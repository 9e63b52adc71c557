"""Mixture of experts with hash or top-k routing, every expert computed for every token.

With eight small experts wide GEMMs beat sorting tokens by expert, and they leave nothing to tune.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from atomc.models.nano.config import NanoConfig
from atomc.models.nano.layers import Weights


def route(x_ND: Tensor, w: Weights, ids_N: Tensor | None, c: NanoConfig) -> tuple[Tensor, Tensor]:
    """Routing weight `[N, E]`, zero where not chosen, and tokens per expert `[E]`. Hash layers pass the token ids."""
    r_NE = F.softplus(x_ND.float() @ w["ffn.gate.weight"].float().T, threshold=1e9).sqrt()
    if ids_N is not None:
        chosen_NE = torch.zeros_like(r_NE).scatter(1, w["ffn.gate.tid2eid"][ids_N], 1.0)
    else:
        # Rank by counting: for a handful of experts this fuses, a top-k kernel would not.
        biased = r_NE.detach() + w["ffn.gate.bias"].detach()
        chosen_NE = ((biased[:, None, :] > biased[:, :, None]).sum(-1) < c.num_experts_per_tok).float()
    gated = r_NE * chosen_NE
    return gated / gated.sum(-1, keepdim=True) * c.routed_scaling_factor, chosen_NE.sum(0)


def moe(x_ND: Tensor, w: Weights, ids_N: Tensor | None, c: NanoConfig) -> tuple[Tensor, Tensor]:
    """All experts on all tokens as three wide GEMMs, the routing weight between them; the shared expert is the last."""
    gate_NE, load_E = route(x_ND, w, ids_N, c)
    w1, w2, w3 = (torch.cat([w[f"ffn.experts.{i}"], w[f"ffn.shared_experts.{i}"][None]]) for i in ("w1", "w2", "w3"))
    # Two GEMMs rather than one: splitting its output would make the backward pass concatenate the gradients.
    a_NI, b_NI = (x_ND @ w1.flatten(0, 1).T).float(), (x_ND @ w3.flatten(0, 1).T).float()
    act_NI = F.silu(a_NI.clamp(max=c.swiglu_limit)) * b_NI.clamp(-c.swiglu_limit, c.swiglu_limit)
    gate_NE = torch.cat([gate_NE, torch.ones_like(gate_NE[:, :1])], 1)
    act_NI = (act_NI.unflatten(1, (c.n_routed_experts + 1, -1)) * gate_NE[..., None]).flatten(1)
    return act_NI.to(x_ND.dtype) @ w2.transpose(1, 2).flatten(0, 1), load_E
