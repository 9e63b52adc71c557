"""Cases of the router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atomc.codegen.device import Device
from atomc.codegen.kernels import router
from atomc.ops.router import route_topk as reference
from tests.support.kernel_cases import Case

F32 = torch.float32
SCALE, EPS = 2.5, 1e-20


def as_reference(device: Device, logits: Tensor, bias: Tensor, k: int, *rest: float) -> tuple[Tensor, Tensor]:
    """The kernel's choices in the order of the reference's, which is unspecified; the kernel's own: largest first."""
    weights, indices = router.route_topk(device, logits, bias, k, *rest)
    rank = (torch.nn.functional.softplus(logits).sqrt() + bias).gather(1, indices)
    assert bool((rank.diff(dim=1) <= 0).all())
    wanted = reference(logits.cpu(), bias.cpu(), k, *rest)[1].to(indices.device)
    found = (indices[:, None, :] == wanted[:, :, None]).int()
    assert bool((found.sum(2) == 1).all())
    at = found.argmax(2)
    return weights.gather(1, at), indices.gather(1, at)


def topk(t: int, e: int, k: int, size: float, spread: float = 1.0) -> Callable[[], list[Any]]:
    # Scores of very negative logits differ by less than a unit: a bias of its own keeps ties away.
    return lambda: [torch.randn(t, e) * size, torch.randn(e) * spread, k, SCALE, EPS]


def lowest_first(device: Device, logits: Tensor, bias: Tensor, k: int, *rest: float) -> tuple[Tensor, Tensor]:
    """Of equal scores the lowest indices, in order."""
    weights, indices = router.route_topk(device, logits, bias, k, *rest)
    assert torch.equal(indices.cpu(), torch.arange(k).expand_as(indices)), indices
    wanted = reference(logits.cpu(), bias.cpu(), k, *rest)[1]
    return weights, wanted.to(indices.device)


def table(t: int, e: int, k: int, vocab: int, ids: torch.dtype, entries: torch.dtype) -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        chosen = torch.stack([torch.randperm(e)[:k] for _ in range(vocab)]).to(entries)
        return [torch.randn(t, e) * 4, torch.randint(vocab, (t,)).to(ids), chosen, SCALE, EPS]

    return make


CASES = [
    *(Case(f"topk {t} of {e} by {k}, {size}", "route_topk", as_reference, topk(t, e, k, size), tokens=max(t, 16))
      for t, e, k, size in [(1, 256, 6, 1.0), (5, 384, 6, 4.0), (3, 8, 4, 30.0), (2, 8, 8, 1.0), (9, 13, 1, 1.0)]),
    Case("topk many tokens", "route_topk", as_reference, topk(11, 100, 6, 2.0), tokens=8192),
    Case("topk equal scores", "route_topk", lowest_first,
         lambda: [torch.zeros(3, 24), torch.zeros(24), 4, SCALE, EPS]),
    *(Case(f"hash {t} {str(ids)[6:]} {str(entries)[6:]}", "route_hash", router.route_hash,
           table(t, e, k, 50, ids, entries), tokens=tokens)
      for t, e, k, ids, entries, tokens in [
          (1, 256, 6, torch.int64, torch.int32, 1), (7, 384, 6, torch.int32, torch.int32, 16),
          (33, 8, 4, torch.int64, torch.int64, 8192)]),
]  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _route(device: Device) -> None:
    t = device.tokens
    for experts, scale in [(256, 1.5), (384, 2.5)]:
        logits = meta(t, experts)
        router.route_topk(device, logits, meta(experts), 6, scale, EPS)
        ids, chosen = meta(t, dtype=torch.int32), meta(129280, 6, dtype=torch.int32)
        router.route_hash(device, logits, ids, chosen, scale, EPS)


AOT = [(f"router {tokens}", _route) for tokens in (1, 16, 64, 8192)]
