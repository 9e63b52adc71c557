"""Wrong DeepSeek-V4s: every formula of the specification, and every use of state, broken in one way (spec 7, 9)."""

from __future__ import annotations
import __future__

import importlib
import inspect
import sys
import textwrap
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from atomc.ops.registry import NAMESPACE, OPS

# What a mutation is to be judged on: a whole prefill, one in cuts, a mixed batch, large epsilons, a tight tolerance.
WHOLE, CUT, BATCH, EPS, TIGHT = "whole", "cut", "batch", "eps", "tight"


@dataclass(frozen=True)
class Mutation:
    """Edits (old, new) of the source of `place`, "module:qualified.name", or other values in the configuration."""

    name: str
    place: str = ""
    edits: tuple[tuple[str, str], ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    scenario: str = WHOLE


def edit(name: str, place: str, *edits: tuple[str, str], scenario: str = WHOLE) -> Mutation:
    return Mutation(name, place, edits, scenario=scenario)


def configured(name: str, scenario: str = WHOLE, **config: Any) -> Mutation:
    return Mutation(name, config=config, scenario=scenario)


HC, ATTENTION, LAYERS = "hyper_connection", "attention", "layers"
ATTEND, COMPRESSOR, INDEXER, CACHE = "ops.attention", "ops.compressor", "ops.indexer", "ops.cache"
YARN = {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 65536}

COMPRESS_LATE = """if self.compressor is not None:
        self.compressor(x_TD, batch, rope.rows, state.rows, state.partial)
    return self.output("""

HYPER_CONNECTIONS = [
    edit("comb untransposed", f"{HC}:Residual.streams", ("self.comb.transpose(-1, -2)", "self.comb")),
    edit(
        "Sinkhorn ends with rows", f"{HC}:HyperConnection.sinkhorn",
        ("return a", "return a / (a.sum(dim=-1, keepdim=True) + self.hc_eps)"),
    ),
    edit(
        "Sinkhorn starts with columns", f"{HC}:HyperConnection.sinkhorn",
        ("torch.softmax(a, dim=-1)", "torch.softmax(a, dim=-2)"),
    ),
    configured("3 Sinkhorn iterations", hc_sinkhorn_iters=3),
    configured("19 Sinkhorn iterations", hc_sinkhorn_iters=19),
    configured("hc_eps 0", TIGHT, hc_eps=0.0),
    configured("hc_eps 0 instead of 1e-2", EPS, hc_eps=0.0),
    edit(
        "no eps on pre", f"{HC}:HyperConnection.forward",
        ("torch.sigmoid(pre_m * pre_s + pre_b) + self.hc_eps", "torch.sigmoid(pre_m * pre_s + pre_b)"), scenario=EPS,
    ),
    edit("no eps on the head's pre", f"{HC}:HyperHead.forward", (" + self.hc_eps", ""), scenario=EPS),
    edit(
        "eps on post", f"{HC}:HyperConnection.forward",
        ("2 * torch.sigmoid(post_m * post_s + post_b)", "2 * torch.sigmoid(post_m * post_s + post_b) + self.hc_eps"),
        scenario=EPS,
    ),
    edit(
        "no eps after the softmax", f"{HC}:HyperConnection.sinkhorn",
        ("torch.softmax(a, dim=-1) + self.hc_eps", "torch.softmax(a, dim=-1)"), scenario=EPS,
    ),
    edit("post without its 2", f"{HC}:HyperConnection.forward", ("2 * torch.sigmoid", "torch.sigmoid")),
    edit("scales swapped", f"{HC}:HyperConnection.forward", ("pre_s, post_s, comb_s =", "post_s, pre_s, comb_s =")),
    edit(
        "mixing logits not normalised", f"{HC}:mix_logits",
        (" * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)", ""),
    ),
    edit("streams added without comb", f"{HC}:Residual.streams", ("+ mixed", "+ self.h.float()")),
]  # fmt: skip

ROPE = [
    edit(
        "no inverse RoPE", f"{ATTENTION}:Attention.forward", ("rotate(o_THd, rope.tokens, inverse=True)", "o_THd")
    ),
    edit("forward instead of inverse RoPE", f"{ATTENTION}:Attention.forward", (", inverse=True", "")),
    edit(
        "half-split RoPE", f"{LAYERS}:rotate",
        ("pe[..., 0::2], pe[..., 1::2]", "pe.chunk(2, dim=-1)"), ("dim=-1)\n    else", "dim=-2)\n    else"),
        ("im * cos + re * sin), dim=-1)", "im * cos + re * sin), dim=-2)"),
    ),
    edit(
        "RoPE on the leading channels", f"{LAYERS}:rotate",
        ("x[..., :-rd], x[..., -rd:]", "x[..., rd:], x[..., :rd]"),
        ("torch.cat((nope, turned.flatten(-2).to(x.dtype)), dim=-1)",
         "torch.cat((turned.flatten(-2).to(x.dtype), nope), dim=-1)"),
    ),
    configured("no YaRN", rope_scaling=None),
    configured("YaRN factor 8", rope_scaling={**YARN, "factor": 8}),
    configured("compress_rope_theta 1e4", compress_rope_theta=1e4),
    configured("rope_theta 1.6e5 in SWA layers", rope_theta=1.6e5),
    edit("YaRN in SWA layers", "model:StepAngles.of", ("Rope(self.plain, self.plain)", "Rope(self.yarn, self.yarn)")),
    edit("plain RoPE in CSA and HCA layers", "model:StepAngles.of", ("Rope(self.yarn,", "Rope(self.plain,")),
    edit("compressed row at its window's end", "model:Prologue.angles", (" - (ratio - 1)", "")),
]  # fmt: skip

ATTENTION_PROPER = [
    edit("no sink", f"{ATTEND}:_attend", ("scores[..., -1] = sink", 'scores[..., -1] = float("-inf")')),
    edit("sink scaled", f"{ATTEND}:_attend", ("scores[..., -1] = sink", "scores[..., -1] = sink * scale")),
    edit("no per-head q norm", f"{ATTENTION}:Attention.forward",
         ("unit_rms(self.wq_b(qn).unflatten(-1, (self.heads, self.head_dim)), self.eps)",
          "self.wq_b(qn).unflatten(-1, (self.heads, self.head_dim))")),
    edit("no q_norm", f"{ATTENTION}:Attention.forward", ("self.q_norm(self.wq_a(x_TD))", "self.wq_a(x_TD)")),
    edit("no kv_norm", f"{ATTENTION}:Attention.forward", ("self.kv_norm(self.wkv(x_TD))", "self.wkv(x_TD)")),
    edit("RMSNorm without eps", f"{LAYERS}:RMSNorm.forward", (" + self.eps", ""), scenario=EPS),
    edit("q norm without eps", f"{LAYERS}:unit_rms", (" + eps", ""), scenario=EPS),
    edit("window one too long", f"{ATTENTION}:Attention.forward", ("self.window_size,", "self.window_size + 1,")),
    edit("window one too short", f"{ATTENTION}:Attention.forward", ("self.window_size,", "self.window_size - 1,")),
    edit("visibility floor(t/m) in attention", f"{ATTEND}:_compressed_rows",
         ("(positions.long() + 1) // ratio", "positions.long() // ratio")),
    edit("visibility floor(t/m) in the indexer", f"{INDEXER}:index_topk",
         ("(positions.long() + 1) // ratio", "positions.long() // ratio")),
    edit("HCA rows not attended", f"{ATTENTION}:Attention.forward", ("state.rows, batch.block_table, topk",
         "state.rows if topk is not None else None, batch.block_table, topk")),
    edit("scale of the channels without RoPE", f"{ATTENTION}:Attention.forward",
         ("self.head_dim**-0.5", "(self.head_dim - 16) ** -0.5")),
    edit("output groups interleaved", f"{ATTENTION}:Attention.output",
         ("o_THd.flatten(-2).unflatten(-1, (self.groups, -1)).transpose(0, 1)",
          "o_THd.unflatten(1, (-1, self.groups)).transpose(1, 2).flatten(-2).transpose(0, 1)")),
]  # fmt: skip

COMPRESSED = [
    edit("CSA halves swapped", f"{COMPRESSOR}:compressor_pool",
         ("(kv_w[:, :m, :d], kv_w[:, m:, d:])", "(kv_w[:, :m, d:], kv_w[:, m:, :d])"),
         ("(logits[:, :m, :d], logits[:, m:, d:])", "(logits[:, :m, d:], logits[:, m:, :d])")),
    edit("no overlap with the window before", f"{COMPRESSOR}:compressor_pool",
         ("torch.cat((logits[:, :m, :d],", "torch.cat((logits[:, :m, :d] - torch.inf,")),
    edit("slots before the start count", f"{COMPRESSOR}:compressor_pool",
         ('logits.masked_fill((position < 0)[..., None], float("-inf"))',
          "logits.masked_fill((position < 0)[..., None], 0.0)")),
    edit("no ape", f"{COMPRESSOR}:compressor_pool", (" + ape[position % m]", "")),
    edit("ape one off", f"{COMPRESSOR}:compressor_pool", ("ape[position % m]", "ape[(position + 1) % m]")),
    edit("mean pooling", f"{COMPRESSOR}:compressor_pool",
         ("torch.softmax(logits, dim=1)", "torch.softmax(logits.clamp(-1e9, 0) // 1e8, dim=1)")),
    edit("softmax over channels", f"{COMPRESSOR}:compressor_pool",
         ("torch.softmax(logits, dim=1)", "torch.softmax(logits, dim=2).nan_to_num()")),
    edit("compressed rows not normed", f"{ATTENTION}:Compressor.forward",
         ("self.norm(pooled_Nd.to(cache.dtype))", "pooled_Nd.to(cache.dtype)")),
    edit("compressed rows not rotated", f"{ATTENTION}:Compressor.forward",
         ("rotate(self.norm(pooled_Nd.to(cache.dtype)), at)", "self.norm(pooled_Nd.to(cache.dtype))")),
    edit("no relu", f"{INDEXER}:index_topk", ("torch.relu(q[part].float() @ keys.T)", "(q[part].float() @ keys.T)")),
    edit("index heads not weighted", f"{INDEXER}:index_topk",
         ("weights[part].float()", "weights[part].float() * 0 + 1")),
    edit("index weights positive", f"{INDEXER}:index_topk", ("weights[part].float()", "weights[part].float().abs()")),
    edit("index queries not rotated", f"{ATTENTION}:Indexer.forward",
         ("rotate(self.wq_b(qn).unflatten(-1, (self.heads, self.dim)), rope.tokens)",
          "self.wq_b(qn).unflatten(-1, (self.heads, self.dim))")),
    edit("index queries from the unnormed latent", f"{ATTENTION}:Attention.forward",
         ("self.indexer(x_TD, qn,", "self.indexer(x_TD, self.wq_a(x_TD),")),
    configured("index top-k one smaller", index_topk=5),
    configured("index top-k one larger", index_topk=7),
]  # fmt: skip

EXPERTS = [
    edit("router bias ignored", "moe:Gate.forward", ("scores + self.bias", "scores")),
    edit("router bias in the weights", "moe:Gate.forward",
         ("weights = scores.gather", "scores += 0 if self.hash_routing else self.bias\n    weights = scores.gather")),
    edit("softplus without its root", "moe:Gate.forward", (".sqrt()", "")),
    edit("sigmoid scores", "moe:Gate.forward",
         ("F.softplus(F.linear(x_TD.float(), self.weight)).sqrt()",
          "torch.sigmoid(F.linear(x_TD.float(), self.weight))")),
    edit("routing weights not normalised", "moe:Gate.forward",
         (" / (weights.sum(-1, keepdim=True) + WEIGHT_SUM_EPS)", "")),
    edit("no routed_scaling_factor", "moe:Gate.forward", (" * self.scale", "")),
    edit("hash layers route by another token id", "moe:Gate.forward",
         ("self.tid2eid[ids_T]", "self.tid2eid[ids_T - 1]")),
    configured("experts per token one fewer", num_experts_per_tok=2),
    configured("one hash layer fewer", num_hash_layers=1),
    configured("no clamp", swiglu_limit=1e9),
    edit("gate clamped from below too", f"{LAYERS}:swiglu",
         ("gate.float().clamp(max=limit)", "gate.float().clamp(min=-limit, max=limit)")),
    edit("up clamped from above only", f"{LAYERS}:swiglu", ("clamp(min=-limit, max=limit)", "clamp(max=limit)")),
    edit("gate and up swapped", "moe:Experts.forward", ("gate, up =", "up, gate =")),
    edit("no shared expert", "moe:MoE.forward", ("routed + self.shared_experts(x_TD).float()", "routed")),
    edit("routing weights unused", "moe:Experts.forward", (" * weights_Tk.unsqueeze(-1)", "")),
]  # fmt: skip

STATE = [
    edit("compressor_update forgotten", f"{COMPRESSOR}:compressor_update",
         ("token = ", "return\n    token = "), scenario=CUT),
    edit("compressor ring off by one", f"{COMPRESSOR}:compressor_update",
         ("positions[keep].long() % ring", "(positions[keep].long() + 1) % ring"), scenario=CUT),
    edit("compressor_update before the pool", f"{ATTENTION}:Compressor.forward",
         ("pooled_Nd = ", "torch.ops.atom.compressor_update(partial, kv, gate, *where)\n    pooled_Nd = "),
         ("overlap)\n    torch.ops.atom.compressor_update(partial, kv, gate, *where)", "overlap)"), scenario=CUT),
    edit("a step's own tokens read from the ring", f"{COMPRESSOR}:compressor_pool",
         ("token >= query_start[request][:, None]", "token > end[:, None]"), scenario=CUT),
    edit("window rows inserted after attention", f"{ATTENTION}:Attention.forward",
         ("torch.ops.atom.cache_insert(", "late = ("),
         ("return self.output(", "torch.ops.atom.cache_insert(*late)\n    return self.output("), scenario=CUT),
    edit("compressed rows inserted after attention", f"{ATTENTION}:Attention.forward",
         ("if self.compressor is not None:", "if False:"), ("return self.output(", COMPRESS_LATE), scenario=CUT),
    edit("window rows one place off", f"{ATTEND}:_window_rows",
         ("gather_rows(window, flat,", "gather_rows(window, flat - 1,"), scenario=CUT),
    edit("window ring one page short", f"{CACHE}:physical_rows",
         ("remainder_(table.shape[1])", "remainder_(max(table.shape[1] - 2, 1))"), scenario=CUT),
    edit("positions counted from the step's start", "model:Prologue.angles",
         ("plain=angles(batch.positions,", "plain=angles(batch.positions - batch.positions[0],"), scenario=CUT),
    edit("another request's tokens pooled", f"{COMPRESSOR}:compressor_pool",
         ("token >= query_start[request][:, None]", "token >= 0"), scenario=BATCH),
    edit("slots ignored", f"{COMPRESSOR}:compressor_pool",
         ("state[slots[request].long()[:, None],", "state[request[:, None],"), scenario=BATCH),
    edit("block table ignored", f"{CACHE}:physical_rows",
         ("table[requests, column].long()", "column.long()"), scenario=BATCH),
    edit("index keys of the first request", f"{INDEXER}:index_topk",
         ("torch.full_like(numbers, request)", "torch.zeros_like(numbers)"), scenario=BATCH),
    edit("rows of the batch's longest request visible", f"{ATTEND}:_compressed_rows",
         ("(rows < visible)", "(rows < visible.max())"), scenario=BATCH),
    edit("window before the start visible", f"{ATTEND}:_window_rows", ("rows >= 0", "rows >= -1"), scenario=BATCH),
]  # fmt: skip

MUTATIONS = HYPER_CONNECTIONS + ROPE + ATTENTION_PROPER + COMPRESSED + EXPERTS + STATE


def apply(mutation: Mutation, patch: pytest.MonkeyPatch) -> None:
    """Put the edited function in the place of the original, for the model and for operators alike."""
    module_name, path = mutation.place.split(":")
    package = "atomc." if module_name.startswith("ops.") else "atomc.models.deepseek_v4."
    module = importlib.import_module(package + module_name)
    owner, _, name = path.rpartition(".")
    holder = getattr(module, owner) if owner else module
    source = textwrap.dedent(inspect.getsource(inspect.getattr_static(holder, name)))
    source = source[source.index("def ") :]  # an operator's decorator would register it again
    for old, new in mutation.edits:
        assert source.count(old) == 1, f"{mutation.name}: {old!r} stands {source.count(old)} times in {path}"
        source = source.replace(old, new)
    scope: dict[str, Any] = {}
    flags = __future__.annotations.compiler_flag
    exec(compile(source, f"<{mutation.name}>", "exec", flags, dont_inherit=True), vars(module), scope)
    if owner:
        patch.setattr(holder, name, scope[name])
        return
    if name in OPS:
        patch.setattr(getattr(torch.ops, NAMESPACE), name, scope[name])
    original = getattr(module, name)
    for user in [m for key, m in sys.modules.items() if key.startswith("atomc.")]:
        if vars(user).get(name) is original:  # functions are imported by name
            patch.setattr(user, name, scope[name])
