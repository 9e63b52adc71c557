"""Quantisation formats, the training mix and the training step of deepseek-v4-nano, on small data."""

from pathlib import Path

import numpy as np
import pytest
import torch

from atomc.models.nano.config import NanoConfig, read_config, write_config
from atomc.models.nano.data import DOMAIN_SHARE, Corpus, domain, source_shares
from atomc.models.nano.optim import orthogonalize
from atomc.models.nano.quant import dequantize_fp4, dequantize_fp8, quantize_fp4, quantize_fp8, round_trip
from atomc.models.nano.trainer import Settings, Trainer, lr_at
from atomc.models.nano.weights import WeightSpec, balanced_hash_table

TINY = NanoConfig(
    vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, head_dim=32, qk_rope_head_dim=16,
    q_lora_rank=32, o_groups=2, o_lora_rank=32, sliding_window=16, compress_ratios=(0, 4, 8, 0), index_n_heads=2,
    index_head_dim=32, index_topk=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
)  # fmt: skip


def test_fp8_scale_is_the_smallest_power_of_two_that_does_not_saturate() -> None:
    weight = torch.zeros(130, 128)
    weight[0, 0], weight[1, 1], weight[129, 5] = 448.0, -449.0, 0.875
    quantized = quantize_fp8(weight)
    assert quantized.scale.view(torch.uint8).tolist() == [[128], [127 - 9]]
    assert dequantize_fp8(quantized)[[0, 129], [0, 5]].tolist() == [448.0, 0.875]


def test_fp4_packs_the_even_column_low() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([6.0, -0.5, 1.5, 4.0])
    quantized = quantize_fp4(weight)
    assert quantized.values.view(torch.uint8)[0, :2].tolist() == [0x97, 0x63]
    assert quantized.scale.view(torch.uint8).tolist() == [[127]]
    torch.testing.assert_close(dequantize_fp4(quantized), weight)


@pytest.mark.parametrize("format_", ["fp8", "fp4"])
def test_round_trip_is_what_the_checkpoint_holds_and_is_stable(format_: str) -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * 0.03
    spec = WeightSpec((256, 384), "fp8" if format_ == "fp8" else "fp4")
    once = round_trip(weight, spec)
    stored = dequantize_fp8(quantize_fp8(weight)) if format_ == "fp8" else dequantize_fp4(quantize_fp4(weight))
    assert torch.equal(once, stored)
    assert torch.equal(round_trip(once, spec), once)
    assert (once - weight).norm() / weight.norm() < (0.03 if format_ == "fp8" else 0.12)


def test_shares_follow_the_domains() -> None:
    shares = source_shares({"py-numpy": 10, "py-sympy": 20, "sotu": 5, "cmake-help": 1})
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["py-numpy"] == pytest.approx(shares["py-sympy"])
    for name, share in DOMAIN_SHARE.items():
        assert sum(value for source, value in shares.items() if domain(source) == name) == pytest.approx(share)


def small_corpus() -> Corpus:
    tokens = torch.randint(3, 40, (6000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return Corpus(tokens, np.array([0, 2000]), np.array([2000, 4000]), np.array([0.25, 0.75]), 3.5)


def test_crops_follow_the_mix_and_need_no_state() -> None:
    corpus = small_corpus()
    tagged = Corpus(torch.arange(6000, dtype=torch.int32), corpus.start_S, corpus.length_S, corpus.share_S, 3.5)
    starts = tagged.crops(0, 400, 10)[:, 0]
    assert (starts < 2000).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(tagged.crops(100, 8, 10), tagged.crops(0, 400, 10)[100:108])


def test_hash_table_balances_by_frequency() -> None:
    counts = 1e6 / (torch.arange(512, dtype=torch.float64) + 1)
    table = balanced_hash_table(counts, experts=8, top_k=2, seed=0)
    load = torch.zeros(8, dtype=torch.float64).index_add(0, table.flatten(), counts.repeat_interleave(2))
    assert load.max() / load.mean() < 1.5
    assert torch.all(table[:, 0] != table[:, 1])


def test_orthogonalize_flattens_the_spectrum() -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 48, 32, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.5 and values.max() < 1.3


def test_rate_ends_at_zero() -> None:
    settings = Settings(1, 16, None, 100, 1.0, 0.1, 0)
    assert lr_at(0.3, 500, settings)["muon"] == pytest.approx(0.02)
    assert lr_at(0.7, 500, settings)["muon"] == pytest.approx(0.01)
    assert lr_at(1.0, 500, settings)["muon"] == 0


def test_training_lowers_the_loss_and_resumes_exactly(tmp_path: Path) -> None:
    settings = Settings(batch=2, context=64, minutes=None, steps=40, lr_scale=10.0, weight_decay=0.1, seed=0)
    trainer = Trainer(settings, TINY, small_corpus(), torch.device("cpu"), compiled=False)
    losses = [trainer.step()[0].item() for _ in range(32)]
    assert losses[-1] < losses[0] - 0.3
    trainer.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(settings, TINY, small_corpus(), torch.device("cpu"), compiled=False)
    resumed.load(tmp_path / "checkpoint.pt")
    assert torch.equal(trainer.step(), resumed.step())


@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel"])
def test_sinkhorn_kernels_compile_for_hopper(name: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from atomc.models.nano import sinkhorn_cuda

    kernel = getattr(sinkhorn_cuda, name)
    types = {"count": "i32", "eps": "fp32", "ITERATIONS": "constexpr", "BLOCK": "constexpr"}
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={"ITERATIONS": 20, "BLOCK": 64})
    assert "cubin" in compile(source, target=GPUTarget("cuda", 90, 32)).asm


def test_config_round_trip(tmp_path: Path) -> None:
    write_config(TINY, tmp_path / "config.json")
    assert read_config(tmp_path / "config.json") == TINY
