"""Chooses the next token of each request from its logits: greedy, temperature, top-k, top-p, seeded.

Contract:
    Random numbers come from a counter, not from a generator with state: the uniform number of a token is a hash of
    (the request's seed, how many tokens it generated before). So a request's tokens depend on nothing else in the
    batch, and a request that was preempted and recomputed continues as if nothing had happened.

Terms:
    L rows of logits, V vocabulary. The row operations are done for the whole batch, for as few rows as need them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from atomc.runtime.request import Request, TokenLogprob

_MASK = 2**64 - 1
# Below float64's 53 bits, so that u * total can never round up to total.
_UNIFORM_BITS = 48
_NARROW = 64
# Greedy in all but name, and logits of any size stay finite when divided by it.
_LEAST_TEMPERATURE = 1e-20


class Sample(NamedTuple):
    """The token chosen for one request; it means nothing when `broken`: the logits had no finite maximum."""

    token: int
    logprob: TokenLogprob | None
    broken: bool


def uniform(seed: int, counter: int, attempt: int = 0) -> float:
    """A number in [0, 1), the same for the same arguments: three rounds of splitmix64 (Steele et al., 2014)."""
    state = seed & _MASK
    for value in (counter, attempt, 0):
        state = (state + 0x9E3779B97F4A7C15 * (value + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> (64 - _UNIFORM_BITS)) * 2.0**-_UNIFORM_BITS


def sample(logits_LV: torch.Tensor, requests: Sequence[Request]) -> list[Sample]:
    """One token for each of the L requests; logits float32 [L, V], any device. The logits are not changed."""
    peaks, greedy = logits_LV.max(dim=-1)
    tokens = greedy
    drawn = [row for row, request in enumerate(requests) if request.params.temperature > 0]
    if drawn:
        chosen = [requests[row] for row in drawn]
        if len(drawn) == len(requests):
            tokens = _draw(logits_LV, chosen)
        else:
            index = torch.tensor(drawn, device=logits_LV.device)
            tokens = greedy.index_copy(0, index, _draw(logits_LV[index], chosen))
    logprobs = _logprobs(logits_LV, tokens, requests)
    broken = (~peaks.isfinite()).tolist()
    return [Sample(token, logprobs.get(row), broken[row]) for row, token in enumerate(tokens.tolist())]


def _draw(logits_NV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """[N] tokens, one for each row, from the distribution its request asks for."""
    params = [request.params for request in requests]
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=logits_NV.device)
    scaled_NV = logits_NV / temperature.clamp_(min=_LEAST_TEMPERATURE)[:, None]
    _keep_top_k(scaled_NV, [p.top_k for p in params])
    probs_NV = scaled_NV.softmax(dim=-1)
    wide = _keep_top_p(probs_NV, [p.top_p for p in params])
    cdf_NV = probs_NV.cumsum(dim=-1, dtype=torch.float64)
    tokens_N = _invert(cdf_NV, requests)
    attempt = 0
    while wide:  # the tokens outside the nucleus are still there: draw again until one inside comes
        index = torch.tensor(wide, device=logits_NV.device)
        part = probs_NV[index]
        above = torch.where(part > part.gather(1, tokens_N[index][:, None]), part, 0).sum(dim=-1, dtype=torch.float64)
        wide = [row for row, mass in zip(wide, above.tolist(), strict=True) if mass >= params[row].top_p]
        if wide:
            attempt += 1
            index = torch.tensor(wide, device=logits_NV.device)
            tokens_N[index] = _invert(cdf_NV[index], [requests[row] for row in wide], attempt)
    return tokens_N


def _invert(cdf_NV: torch.Tensor, requests: Sequence[Request], attempt: int = 0) -> torch.Tensor:
    """[N] tokens: the first whose cumulated mass exceeds the request's uniform number, so never one of mass zero."""
    uniforms = [uniform(request.seed, request.generated, attempt) for request in requests]
    draws = torch.tensor(uniforms, dtype=torch.float64, device=cdf_NV.device) * cdf_NV[:, -1]
    return torch.searchsorted(cdf_NV, draws[:, None], right=True)[:, 0].clamp_(max=cdf_NV.shape[1] - 1)


def _keep_top_k(scaled_NV: torch.Tensor, top_ks: Sequence[int]) -> None:
    """In place: -inf wherever a row's value is below its k-th largest."""
    vocab = scaled_NV.shape[1]
    ks = [k if 0 < k < vocab else 0 for k in top_ks]
    if not any(ks):
        return
    largest = scaled_NV.topk(max(ks), dim=-1).values
    kth = torch.tensor([max(k - 1, 0) for k in ks], device=scaled_NV.device)
    floor = largest.gather(1, kth[:, None])
    unlimited = torch.tensor([k == 0 for k in ks], device=scaled_NV.device)
    floor.masked_fill_(unlimited[:, None], -torch.inf)
    scaled_NV.masked_fill_(scaled_NV < floor, -torch.inf)


def _keep_top_p(probs_NV: torch.Tensor, top_ps: Sequence[float]) -> list[int]:
    """In place: 0 wherever a row's probability is below its nucleus' smallest. Returns the rows left undone.

    Sorting a vocabulary costs more than all else here. A nucleus is mostly among the `_NARROW` largest values; a row
    where it is not is left as it is, to be drawn from by rejection: a token is in the nucleus if the mass of those
    more likely is below top_p, and one drawn from the whole row is in it with probability top_p or more.
    """
    rows = [row for row, top_p in enumerate(top_ps) if top_p < 1]
    if not rows:
        return []
    index = torch.tensor(rows, device=probs_NV.device)
    wanted = torch.tensor([top_ps[row] for row in rows], dtype=torch.float64, device=probs_NV.device)[:, None]
    largest = (probs_NV[index] if len(rows) < len(top_ps) else probs_NV).topk(min(_NARROW, probs_NV.shape[1])).values
    mass = largest.cumsum(dim=-1, dtype=torch.float64)
    # Rounding may leave a whole vocabulary's mass below a top_p close to 1: then all of it is the nucleus.
    wide = (mass[:, -1:] < wanted) & (probs_NV.shape[1] > _NARROW)
    last = (mass < wanted).sum(dim=-1, keepdim=True).clamp_(max=largest.shape[1] - 1)
    floor = torch.zeros(len(top_ps), 1, dtype=probs_NV.dtype, device=probs_NV.device)
    floor[index] = largest.gather(1, last).masked_fill_(wide, 0)
    probs_NV.masked_fill_(probs_NV < floor, 0)
    return [row for row, is_wide in zip(rows, wide[:, 0].tolist(), strict=True) if is_wide]


def _logprobs(logits_LV: torch.Tensor, tokens_L: torch.Tensor, requests: Sequence[Request]) -> dict[int, TokenLogprob]:
    """For the rows that asked: the log-probability of the chosen token and of the most likely ones."""
    rows = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
    if not rows:
        return {}
    index = torch.tensor(rows, device=logits_LV.device)
    log_NV = logits_LV[index].log_softmax(dim=-1)
    counts = [min(requests[row].params.logprobs or 0, log_NV.shape[1]) for row in rows]
    chosen = log_NV.gather(1, tokens_L[index][:, None])[:, 0].tolist()
    top = log_NV.topk(max(counts), dim=-1)
    values, indices = top.values.tolist(), top.indices.tolist()
    ids = tokens_L[index].tolist()
    return {
        row: TokenLogprob(ids[i], chosen[i], tuple(zip(indices[i][: counts[i]], values[i][: counts[i]], strict=True)))
        for i, row in enumerate(rows)
    }
