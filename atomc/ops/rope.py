"""Rotary position embedding on the trailing channels, interleaved pairs (spec 2.2), forward and inverse."""

from __future__ import annotations

import torch

from atomc.ops.registry import define


@define("rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor", tokens="x", spec="2.2, 2.4")
def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    """Rotate channels (d-rd+2i, d-rd+2i+1) of x by the angle of pair i; the leading channels pass unchanged.

    Args:
        x: [..., d], any float dtype; the rotation is computed in fp32.
        cos, sin: broadcastable to [..., rd/2], fp32.
        inverse: rotate by the negative angle (spec 2.4: the attention output, at the query's position).
    """
    pairs = cos.shape[-1]
    nope, pe = x[..., : -2 * pairs], x[..., -2 * pairs :].float()
    even, odd = pe[..., 0::2], pe[..., 1::2]
    if inverse:
        turned = torch.stack((even * cos + odd * sin, odd * cos - even * sin), dim=-1)
    else:
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((nope, turned.flatten(-2).to(x.dtype)), dim=-1)
