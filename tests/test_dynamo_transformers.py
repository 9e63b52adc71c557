"""transformers' DeepSeek-V4 through `backend="atom"`: exactly what is found in it, and that the numbers stay.

In bf16 transformers rounds where the reference of DeepSeek does not (SwiGLU, the per-head norm of q, the mixing of
streams): that is other mathematics, and is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from atomc import dynamo
from atomc.dynamo import atom, reports

modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

BATCH, TOKENS, WIDTH, STREAMS, HEADS, HEAD_DIM, ROTATED = 2, 7, 32, 4, 4, 16, 8
KINDS = ["sliding", "compressed_sparse", "heavily_compressed", "compressed_sparse"]


def config() -> Any:
    return modeling.DeepseekV4Config(
        vocab_size=96, hidden_size=WIDTH, moe_intermediate_size=24, num_hidden_layers=4, num_attention_heads=HEADS,
        head_dim=HEAD_DIM, q_lora_rank=24, o_groups=2, o_lora_rank=16, n_routed_experts=6, num_local_experts=6,
        num_experts_per_tok=2, sliding_window=8, index_n_heads=4, index_head_dim=16, index_topk=4, hc_mult=STREAMS,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}, hc_sinkhorn_iters=5,
        layer_types=[f"{kind}_attention" for kind in KINDS], mlp_layer_types=["hash_moe", "hash_moe", "moe", "moe"],
        partial_rotary_factor=ROTATED / HEAD_DIM, max_position_embeddings=64, pad_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip


def randomised(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.dtype == torch.long:
                value.copy_(torch.randint(0, 6, value.shape, generator=generator))
            elif "inv_freq" not in name:
                noise = 0.2 * torch.randn(value.shape, generator=generator)
                value.copy_(noise + 1 if "norm" in name else noise)
    return module.eval().to(dtype)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    dynamo.clear_reports()
    yield
    torch._dynamo.reset()


def check(
    fn: Callable[..., Any], *inputs: Tensor, dynamic: bool | None = None, tolerance: float = 1e-5
) -> dict[str, int]:
    """Compile, compare with eager, and return what was found in the one graph there is."""
    with torch.no_grad():
        got = torch.compile(fn, backend=atom, dynamic=dynamic)(*inputs)
        want = fn(*inputs)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    (report,) = reports()
    return {label.removeprefix("fuse_"): n for label, n in report.matches.items()}


def hidden(dtype: torch.dtype) -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH).to(dtype)


def streams(dtype: torch.dtype) -> Tensor:
    return torch.randn(BATCH, TOKENS, STREAMS, WIDTH).to(dtype)


def rotation(heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    theta = torch.randn(BATCH, TOKENS, ROTATED // 2)
    return torch.randn(BATCH, heads, TOKENS, HEAD_DIM).to(dtype), theta.cos().to(dtype), theta.sin().to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return modeling.apply_rotary_pos_emb(x, cos, sin)


def rotated_back(x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return modeling.apply_rotary_pos_emb(x, cos, -sin)


def ids(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return hidden(dtype), torch.randint(0, 96, (BATCH, TOKENS))


Case = tuple[Callable[[], Callable[..., Any]], Callable[[torch.dtype], Any], dict[str, int], dict[str, int]]

# what, its inputs, found in fp32, found in bf16
MODULES: dict[str, Case] = {
    "RMSNorm": (lambda: modeling.DeepseekV4RMSNorm(WIDTH), hidden, {"rms_norm": 1}, {"rms_norm": 1}),
    "UnweightedRMSNorm": (modeling.DeepseekV4UnweightedRMSNorm, hidden, {"rms_norm_unit": 1}, {}),
    "rotary of q": (lambda: rotated, lambda d: rotation(HEADS, d), {"rope": 1}, {"rope": 1}),
    "rotary of kv": (lambda: rotated, lambda d: rotation(1, d), {"rope": 1}, {"rope": 1}),
    "rotary of the output": (
        lambda: rotated_back, lambda d: rotation(HEADS, d), {"rope_inverse": 1}, {"rope_inverse": 1},
    ),
    "MLP": (lambda: modeling.DeepseekV4MLP(config()), hidden, {"swiglu": 1}, {}),
    "TopKRouter": (lambda: modeling.DeepseekV4TopKRouter(config()), hidden, {"route_topk": 1}, {"route_topk": 1}),
    "HashRouter": (lambda: modeling.DeepseekV4HashRouter(config()), ids, {"route_hash": 1}, {"route_hash": 1}),
    "HyperConnection": (lambda: modeling.DeepseekV4HyperConnection(config()), streams, {"hc_pre": 1}, {"hc_pre": 1}),
    "HyperHead": (lambda: modeling.DeepseekV4HyperHead(config()), streams, {"hc_head": 1}, {"hc_head": 1}),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_module(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    make, inputs, fp32, bf16 = MODULES[name]
    fn = make()
    if isinstance(fn, nn.Module):
        fn = randomised(fn, dtype)
    given = inputs(dtype)
    found = check(fn, *(given if isinstance(given, tuple) else (given,)), dynamic=dynamic)
    assert found == (fp32 if dtype == torch.float32 else bf16)


# Per layer: 2 mHC, 2 norms before the sublayers, the q and kv norms, the norm of q's heads, RoPE of q and of kv and the
# inverse, and SwiGLU in the shared and in the routed experts. A compressor adds a norm and a RoPE; CSA has two of them
# and rotates the index queries too. Then the head and the last norm.
COMPRESSORS = {"sliding": 0, "heavily_compressed": 1, "compressed_sparse": 2}
EVERYWHERE = {
    "hc_pre": 8,
    "hc_head": 1,
    "rms_norm": 4 * 4 + sum(COMPRESSORS[kind] for kind in KINDS) + 1,
    "rope_inverse": 4,
    "rope": 2 * 4 + sum(COMPRESSORS[kind] + (kind == "compressed_sparse") for kind in KINDS),
    "route_topk": 2,
    "route_hash": 2,
}
IN_FP32 = {"hc_post": 8, "rms_norm_unit": 4, "swiglu": 8}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_whole_model(dtype: torch.dtype) -> None:
    model = randomised(modeling.DeepseekV4ForCausalLM(config()), dtype)
    tokens = torch.randint(0, 96, (BATCH, 19))
    found = check(lambda i: model(i, use_cache=False).logits, tokens)
    assert found == {**EVERYWHERE, **(IN_FP32 if dtype == torch.float32 else {})}
    assert not [r for row in reports()[0].rows for r in row.report.refusals]
