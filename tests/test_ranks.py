"""What a compile does for many ranks: which numbers a layout has to divide, what is refused, what is proven."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from atomc.compiler import Options, Result, compile_model
from atomc.models.deepseek_v4.sharding import placement_of
from atomc.models.source import open_model
from atomc.ops.placement import REPLICATE, Shard
from atomc.parallel.layout import LayoutError, ModelSizes
from atomc.passes import shard
from atomc.passes.graph import PassError
from atomc.passes.scheme import get_scheme
from atomc.ranks import check_parallel, layout_for, model_sizes

STOP = Options(with_weights=False, stop_after="dead_code")


def sizes(model: str, scheme: str) -> ModelSizes:
    return model_sizes(open_model(model, with_weights=False).config, get_scheme(scheme))


def test_the_numbers_that_a_layout_divides() -> None:
    flash = ModelSizes(heads=64, groups=8, experts=256, inner=2048, vocabulary=129280, block=128)
    assert sizes("deepseek-v4-flash", "native") == flash
    assert sizes("deepseek-v4-flash", "none") == replace(flash, block=1)
    assert sizes("deepseek-v4-flash", "ptpc-fp8").block == 2048  # scales of whole rows
    assert sizes("deepseek-v4-pro", "mxfp4").block in (32, 128)
    assert sizes("deepseek-v4-nano", "native").block == 128


def test_a_cut_through_a_block_is_refused() -> None:
    nano = open_model("deepseek-v4-nano", with_weights=False).config
    assert layout_for("dp=8,moe=tp", nano, get_scheme("none")).ranks == 8
    assert layout_for("", nano, get_scheme("native")).ranks == 1
    with pytest.raises(LayoutError, match=r"256 columns in blocks of 128 of an expert \(moe=tp\); nearest legal: dp=2"):
        layout_for("dp=8,moe=tp", nano, get_scheme("native"))


def test_what_cannot_be_done_yet_is_refused() -> None:
    check_parallel("", None)
    check_parallel("dp=1", None)
    check_parallel("dp=8", "dead_code")
    with pytest.raises(LayoutError, match=r"an artifact is for one rank as yet\. With --stop-after dead_code"):
        check_parallel("dp=8", None)
    with pytest.raises(LayoutError, match="batches cannot be overlapped yet"):
        check_parallel("dp=8,tbo=all", "dead_code")


def test_hints_follow_the_reference() -> None:
    """Spec 3.7: wq_b and wo_a by outputs, wo_b by inputs, the vocabulary by rows; the rest is whole."""
    whole = ("attn.wq_a|attn.wkv.weight", "attn.indexer.wq_b.weight", "ffn.gate.weight", "ffn.shared_experts.w2.weight")
    assert all(placement_of(path, axis, "tp") == REPLICATE for path in whole for axis in ("dp", "tp"))
    for path in ("attn.wq_b.weight", "attn.wq_b.scale", "attn.wo_a.weight", "attn.attn_sink", "embed.weight"):
        assert placement_of(path, "tp", "tp") == Shard(0)
        assert placement_of(path, "dp", "tp") == REPLICATE
    assert placement_of("attn.wo_b.scale", "tp", "ep") == Shard(1)
    for axis in ("dp", "tp"):
        assert placement_of("ffn.experts.w13.scale", axis, "tp") == Shard(1, parts=2)
        assert placement_of("ffn.experts.w2", axis, "tp") == Shard(2)
        assert placement_of("ffn.experts.w2.scale", axis, "ep") == Shard(0)


def compiled(tmp_path: Path, parallel: str, target: str = "cpu", model: str = "deepseek-v4-nano") -> Result:
    dtype = "float32" if target == "cpu" else "bfloat16"
    return compile_model(model, target, tmp_path / "a.atom", replace(STOP, parallel=parallel, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "mi355x"])
def test_a_compile_proves_what_the_ranks_issue(tmp_path: Path, target: str) -> None:
    result = compiled(tmp_path, "dp=2,moe=ep", target)
    assert result.ranks is not None
    found = {name: [c.kind for c in issued] for name, issued in result.ranks.collectives.items()}
    assert found.pop("prologue") == found.pop("head") == []
    assert all(kinds == ["all_gather", "reduce_scatter"] for kinds in found.values())
    assert result.ranks.proof.longest == 2 * 5
    assert result.ranks.proof.pairs > 1000
    assert not (tmp_path / "a.atom").exists()


@pytest.mark.slow
def test_sums_over_ranks_are_in_float32(tmp_path: Path) -> None:
    ranks = compiled(tmp_path, "tp=2", "mi355x").ranks
    assert ranks is not None
    layer = ranks.collectives["layer_csa_topk"]
    assert [(c.kind, c.dtype) for c in layer] == [("all_reduce", "float32")] * 2
    assert ranks.collectives["prologue"][0].dtype == "bfloat16"  # one rank's row and zeros: nothing is rounded


@pytest.mark.slow
def test_a_pass_that_forgets_a_sum_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard._Sharding, "row_parallel", lambda _self, _node: None)
    with pytest.raises(PassError, match=r"hc_post\w* \(deepseek_v4/\w+\.py:\d+\): a Partial\(sum\) is used as a full"):
        compiled(tmp_path, "tp=2")
