"""The MTP block against a dense reading of the specification in float64 (2.9; blocks: 2.1-2.4, 2.8), cut in any way."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from atomc.models.bundled import bundled_config
from atomc.models.deepseek_v4.attention import Rope
from atomc.models.deepseek_v4.checkpoint import expected_tensors
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.hyper_connection import Residual
from atomc.models.deepseek_v4.layers import angles, inverse_frequencies
from atomc.models.deepseek_v4.model import MTPBlock
from atomc.models.deepseek_v4.weights import official_parameter, official_storage, weight_recipe
from atomc.recipes import instantiate, output_spec, sources
from tests.support.eager import Step, chunks, make_batch, new_caches, randomise
from tests.support.transformers_oracle import TOLERANCE
from tests.support.v4_configs import cuts, interleavings, tiny

WITH_MTP = {"compress_ratios": [4, 0], "num_nextn_predict_layers": 1, "num_hash_layers": 0}


class Dense:
    """One sequence at once, no caches, no operators: names of the checkpoint, formulas of the specification."""

    def __init__(self, config: DeepseekV4Config, weights: dict[str, Tensor]) -> None:
        self.c, self.w = config, {name: value.double() for name, value in weights.items()}
        self.margin = math.inf  # by how little the router decided

    def norm(self, x: Tensor, weight: str | None = None) -> Tensor:
        y = x / (x.pow(2).mean(-1, keepdim=True) + self.c.rms_norm_eps).sqrt()
        return y if weight is None else y * self.w[f"{weight}.weight"]

    def mtp(self, h: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Streams [T, n, D], embeddings of the next tokens [T, D] -> logits [T, V], streams [T, n, D]."""
        e = self.norm(embedded, "enorm") @ self.w["e_proj.weight"].T
        h = torch.stack([e + self.norm(h[:, j], "hnorm") @ self.w["h_proj.weight"].T for j in range(h.shape[1])], 1)
        for name in ("attn", "ffn"):
            x, post, comb = self.mixed(h, f"hc_{name}")
            y = getattr(self, name)(self.norm(x, f"{name}_norm"))
            h = torch.stack(
                [
                    post[:, k, None] * y + sum(comb[:, j, k, None] * h[:, j] for j in range(h.shape[1]))
                    for k in range(h.shape[1])
                ],
                1,
            )
        mix = self.mix(h, "hc_head")
        pre = torch.sigmoid(mix * self.w["hc_head_scale"] + self.w["hc_head_base"]) + self.c.hc_eps
        x = (pre[..., None] * h).sum(1)
        return self.norm(x, "norm") @ self.w["head.weight"].T, h

    def mix(self, h: Tensor, name: str) -> Tensor:
        return self.norm(h.flatten(1)) @ self.w[f"{name}_fn"].T

    def mixed(self, h: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        n, eps = h.shape[1], self.c.hc_eps
        mix, base, scale = self.mix(h, name), self.w[f"{name}_base"], self.w[f"{name}_scale"]
        pre = 1 / (1 + torch.exp(-(mix[:, :n] * scale[0] + base[:n]))) + eps
        post = 2 / (1 + torch.exp(-(mix[:, n : 2 * n] * scale[1] + base[n : 2 * n])))
        a = (mix[:, 2 * n :] * scale[2] + base[2 * n :]).view(-1, n, n)
        a = a.exp() / a.exp().sum(2, keepdim=True) + eps
        a = a / (a.sum(1, keepdim=True) + eps)
        for _ in range(self.c.hc_sinkhorn_iters - 1):
            a = a / (a.sum(2, keepdim=True) + eps)
            a = a / (a.sum(1, keepdim=True) + eps)
        return (pre[..., None] * h).sum(1), post, a

    def rope(self, x: Tensor, sign: int) -> Tensor:
        """x [T, ..., d]: the last rd channels as complex pairs, turned by sign * t * theta^(-2i/rd)."""
        rd = self.c.qk_rope_head_dim
        frequency = self.c.rope_theta ** (-torch.arange(0, rd, 2, dtype=torch.float64) / rd)
        turn = torch.polar(torch.ones(()).double(), sign * torch.arange(len(x)).double()[:, None] * frequency)
        pairs = torch.view_as_complex(x[..., -rd:].unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * turn.view(len(x), *[1] * (x.dim() - 2), rd // 2)
        return torch.cat((x[..., :-rd], torch.view_as_real(turned).flatten(-2)), -1)

    def attn(self, x: Tensor) -> Tensor:
        c, t = self.c, torch.arange(len(x))
        latent = self.norm(x @ self.w["attn.wq_a.weight"].T, "attn.q_norm")
        q = self.norm((latent @ self.w["attn.wq_b.weight"].T).view(len(x), c.num_attention_heads, c.head_dim))
        q = self.rope(q, 1)
        kv = self.rope(self.norm(x @ self.w["attn.wkv.weight"].T, "attn.kv_norm"), 1)
        scores = torch.einsum("thd,sd->hts", q, kv) / math.sqrt(c.head_dim)
        age = t[:, None] - t
        p = scores.exp() * ((age >= 0) & (age < c.sliding_window))
        p = p / (p.sum(-1, keepdim=True) + self.w["attn.attn_sink"].exp()[:, None, None])
        o = self.rope(torch.einsum("hts,sd->thd", p, kv), -1).flatten(1).chunk(c.o_groups, -1)
        z = [part @ w.T for part, w in zip(o, self.w["attn.wo_a.weight"].chunk(c.o_groups), strict=True)]
        return torch.cat(z, -1) @ self.w["attn.wo_b.weight"].T

    def ffn(self, x: Tensor) -> Tensor:
        c, k = self.c, self.c.num_experts_per_tok
        r = torch.log1p((x @ self.w["ffn.gate.weight"].T).exp()).sqrt()
        ranked = (r + self.w["ffn.gate.bias"]).sort(-1, descending=True)
        if k < c.n_routed_experts:
            self.margin = min(self.margin, (ranked.values[:, k - 1] - ranked.values[:, k]).min().item())
        chosen = torch.zeros_like(r).scatter(1, ranked.indices[:, :k], 1.0) * r
        weights = chosen / chosen.sum(-1, keepdim=True) * c.routed_scaling_factor
        w1, w3 = self.w["ffn.experts.w13"].chunk(2, 1)
        y = torch.stack(
            [self.expert(x, w1[e], self.w["ffn.experts.w2"][e], w3[e]) for e in range(c.n_routed_experts)], 1
        )
        shared = [self.w[f"ffn.shared_experts.w{i}.weight"] for i in (1, 2, 3)]
        return (weights[..., None] * y).sum(1) + self.expert(x, *shared)

    def expert(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        a, b = (x @ w1.T).clamp(max=self.c.swiglu_limit), (x @ w3.T).clamp(-self.c.swiglu_limit, self.c.swiglu_limit)
        return (a / (1 + torch.exp(-a)) * b) @ w2.T


@dataclass
class Inputs:
    """What the MTP block reads of one sequence: the residual after the last layer, embeddings of the ids at t + 1."""

    residual: Residual
    embedded: Tensor

    @staticmethod
    def random(config: DeepseekV4Config, length: int, generator: torch.Generator) -> Inputs:
        n, d = config.hc_mult, config.hidden_size

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        residual = Residual(normal(length, n, d), normal(length, d), normal(length, n), normal(length, n, n).softmax(1))
        return Inputs(residual, normal(length, d))

    def streams(self) -> Tensor:
        """The streams that the residual stands for (spec 2.1, HC_post)."""
        h, y, post, comb = (part.double() for part in self.residual)
        return post[..., None] * y[:, None] + torch.einsum("tjk,tjd->tkd", comb, h)


def run_mtp(block: MTPBlock, config: DeepseekV4Config, inputs: list[Inputs], steps: list[Step]) -> list[list[Tensor]]:
    """[logits, streams] of each sequence, fed step by step."""
    caches = new_caches(
        config,
        len(inputs),
        max(len(one.embedded) for one in inputs),
        longest_step=max(n for step in steps for _, n in step),
        ratios=[0],
    )
    frequencies = inverse_frequencies(config, compressed=False)
    done = [0] * len(inputs)
    parts: list[list[list[Tensor]]] = [[] for _ in inputs]
    for step in steps:
        batch = make_batch(config, [(i, done[i], torch.zeros(n, dtype=torch.long)) for i, n in step], caches)
        rows = [slice(done[i], done[i] + n) for i, n in step]
        fed = [inputs[i] for i, _ in step]
        residual = Residual(
            *(
                torch.cat([one.residual[field][part] for one, part in zip(fed, rows, strict=True)])
                for field in range(len(Residual._fields))
            )
        )
        embedded = torch.cat([one.embedded[part] for one, part in zip(fed, rows, strict=True)])
        at = angles(batch.positions, frequencies)
        logits, out = block(residual, embedded, batch, Rope(at, at), caches.states[0])
        sizes = [n for _, n in step]
        for (i, n), *both in zip(step, logits.split(sizes), out.streams().split(sizes), strict=True):
            parts[i].append(both)
            done[i] += n
    return [[torch.cat(kind) for kind in zip(*mine, strict=True)] for mine in parts]


def make(config: DeepseekV4Config, seed: int) -> tuple[MTPBlock, Dense]:
    block = MTPBlock(config, torch.float32)
    randomise(block, seed)
    return block, Dense(config, {official_parameter(name): value for name, value in block.named_parameters()})


def worst(found: list[Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """Largest absolute difference, of the logits (std 1) and of the streams relative to theirs; NaN is infinite."""
    errors = [(a - b).abs().max() / b.std() for a, b in zip(found, expected, strict=True)]
    return max(error.nan_to_num(nan=torch.inf).item() for error in errors)


@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_like_the_dense_formulas_however_it_is_fed(data: st.DataObject, seed: int) -> None:
    config = tiny(
        **WITH_MTP,
        sliding_window=data.draw(st.sampled_from([1, 3, 8, 16])),
        hc_mult=data.draw(st.sampled_from([4, 2])),
        hc_eps=data.draw(st.sampled_from([1e-6, 1e-2])),
    )
    block, dense = make(config, seed)
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    steps = data.draw(interleavings([data.draw(cuts(size)) for size in sizes]))
    generator = torch.Generator().manual_seed(seed)
    inputs = [Inputs.random(config, size, generator) for size in sizes]
    for one, found in zip(inputs, run_mtp(block, config, inputs, steps), strict=True):
        expected = dense.mtp(one.streams(), one.embedded.double())
        if dense.margin < 1e-5:
            reject()  # two experts are equals up to rounding: either answer is right
        assert worst(found, expected) <= TOLERANCE


def test_chained() -> None:
    """A second draft step reads the block's own output streams (spec 2.9)."""
    config = tiny(**WITH_MTP)
    block, dense = make(config, 0)
    first = Inputs.random(config, 30, torch.Generator().manual_seed(1))
    embedded = torch.randn(30, config.hidden_size, generator=torch.Generator().manual_seed(2))
    _, streams = dense.mtp(first.streams(), first.embedded.double())
    expected = dense.mtp(streams, embedded.double())
    caches = new_caches(config, 1, 30, longest_step=30, ratios=[0, 0])
    batch = make_batch(config, [(0, 0, torch.zeros(30, dtype=torch.long))], caches)
    at = angles(batch.positions, inverse_frequencies(config, compressed=False))
    _, out = block(first.residual, first.embedded, batch, Rope(at, at), caches.states[0])
    logits, again = block(out, embedded, batch, Rope(at, at), caches.states[1])
    assert worst([logits, again.streams()], expected) <= TOLERANCE


@pytest.mark.parametrize("wrong", ["e_proj.weight", "enorm.weight", "hnorm.weight", "head.norm.weight"])
def test_the_comparison_can_fail(wrong: str) -> None:
    config = tiny(**WITH_MTP)
    block, dense = make(config, 0)
    inputs = Inputs.random(config, 30, torch.Generator().manual_seed(1))
    expected = dense.mtp(inputs.streams(), inputs.embedded.double())
    assert worst(run_mtp(block, config, [inputs], chunks(30, 30))[0], expected) <= TOLERANCE
    block.get_parameter(wrong).mul_(1.01)
    assert worst(run_mtp(block, config, [inputs], chunks(30, 30))[0], expected) > 10 * TOLERANCE


@pytest.mark.parametrize("size", ["flash", "pro"])
def test_parameters_of_the_released_sizes_are_the_tensors_of_the_checkpoint(size: str) -> None:
    """Every tensor `mtp.0.*` and the shared head is used just once, in its own shape and dtype."""
    config = bundled_config(f"deepseek-v4-{size}")
    expected = expected_tensors(config)
    with torch.device("meta"):
        block = MTPBlock(config, torch.bfloat16)
    used: list[str] = []
    for name, parameter in block.named_parameters():
        recipe = weight_recipe(config, name, "bfloat16", stored=official_storage(config, name))
        recipe = instantiate(recipe, "mtp.0.")
        spec = output_spec(recipe, expected.__getitem__)
        assert (spec.shape, spec.dtype) == (tuple(parameter.shape), parameter.dtype), name
        used += sources(recipe)
    assert sorted(used) == sorted(["head.weight", *(name for name in expected if name.startswith("mtp."))])
