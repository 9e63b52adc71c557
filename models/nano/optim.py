"""Muon for the hidden matrices, AdamW for the rest, over fp32 masters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from atomc.models.nano.config import NanoConfig
from atomc.models.nano.weights import WeightSpec

# Decay relative to the rate. The corpus is seen many times: the head is what would overfit first.
ADAM_DECAY = {"embed": 0.02, "head": 0.1, "scalar": 0.0}

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix, batched `[n, r, c]`, in bf16 on a GPU."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.transpose(-1, -2) if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    result: Tensor = x.transpose(-1, -2) if tall else x
    return result.float()


def matrix_rows(name: str, spec: WeightSpec, config: NanoConfig) -> int | None:
    """Rows of one orthogonalised matrix inside the weight; None if Muon does not apply.

    Stacked projections are split into what acts as one matrix: per head, per output group, per compressor half.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("wkv", "wgate"):
        return config.index_head_dim if ".indexer." in name else config.head_dim
    if spec.format not in ("fp8", "fp4"):
        return None
    if leaf == "wq_b":
        return config.index_head_dim if ".indexer." in name else config.head_dim
    return config.o_lora_rank if leaf == "wo_a" else spec.shape[-2]


class MuonGroup:
    """All matrices of one shape in one buffer `[n, r, c]`; the masters of its weights are views of it."""

    def __init__(self, masters: dict[str, Tensor], rows: dict[str, int]) -> None:
        self.rows = rows
        self.buffer = torch.cat([masters[name].reshape(-1, r, masters[name].shape[-1]) for name, r in rows.items()])
        self.momentum = torch.zeros_like(self.buffer)
        start = 0
        for name, r in rows.items():
            count = masters[name].numel() // (r * self.buffer.shape[-1])
            masters[name] = self.buffer[start : start + count].view(masters[name].shape)
            start += count

    def step(self, grads: Mapping[str, Tensor], lr: Tensor, momentum: Tensor, decay: float) -> None:
        width = self.buffer.shape[-1]
        grad = torch.cat([grads[name].reshape(-1, r, width) for name, r in self.rows.items()]).float()
        self.momentum.lerp_(grad, 1 - momentum)
        update = orthogonalize(grad.lerp_(self.momentum, momentum))
        scale = max(1.0, self.buffer.shape[-2] / width) ** 0.5
        self.buffer.mul_(1 - lr * decay).sub_(update * (lr * scale))


class Optimizer:
    """Owns the step; `masters` is updated in place and its Muon entries become views of the group buffers.

    Rates are tensors, so that a captured CUDA graph of the step follows a schedule.
    """

    def __init__(self, masters: dict[str, Tensor], specs: Mapping[str, WeightSpec], config: NanoConfig) -> None:
        by_shape: dict[tuple[int, int], dict[str, int]] = {}
        self.adam_names: list[str] = []
        for name, spec in specs.items():
            rows = matrix_rows(name, spec, config)
            if rows is not None:
                by_shape.setdefault((rows, spec.shape[-1]), {})[name] = rows
            elif spec.format != "i64" and not name.endswith("gate.bias"):
                self.adam_names.append(name)
        self.groups = [MuonGroup(masters, rows) for rows in by_shape.values()]
        self.masters, device = masters, masters["embed"].device
        self.lr = {kind: torch.zeros((), device=device) for kind in ("muon", "embed", "head", "scalar")}
        self.momentum = torch.zeros((), device=device)
        scalars = [name for name in self.adam_names if name not in ("embed", "head")]
        self.adam_kinds = {"embed": ["embed"], "head": ["head"], "scalar": scalars}
        cuda = device.type == "cuda"
        self.adam = torch.optim.AdamW(
            [{"params": [masters[name] for name in names], "weight_decay": ADAM_DECAY[kind]}
             for kind, names in self.adam_kinds.items()],
            betas=(0.9, 0.95), eps=1e-10, fused=cuda, capturable=cuda,
        )  # fmt: skip
        self._bind_rates()

    def _bind_rates(self) -> None:
        for kind, settings in zip(self.adam_kinds, self.adam.param_groups, strict=True):
            settings["lr"] = self.lr[kind]

    def set_rates(self, lr: Mapping[str, float], momentum: float) -> None:
        for kind, value in lr.items():
            self.lr[kind].fill_(value)
        self.momentum.fill_(momentum)

    def step(self, grads: Mapping[str, Tensor], decay: float) -> None:
        for group in self.groups:
            group.step(grads, self.lr["muon"], self.momentum, decay)
        for name in self.adam_names:
            self.masters[name].grad = grads[name].float()
        self.adam.step()

    def state(self) -> dict[str, Any]:
        return {"momentum": [group.momentum for group in self.groups], "adam": self.adam.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        for group, momentum in zip(self.groups, state["momentum"], strict=True):
            group.momentum.copy_(momentum)
        self.adam.load_state_dict(state["adam"])
        self._bind_rates()
