"""Artifacts with nothing wrong: every scheme, every step within its bound, every weight as the checkpoint has it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from atomc.errors import AtomcError
from atomc.verify import Options, VerifyError, verify_artifact
from tests.support.tiny import random_checkpoint, tiny_config
from tests.support.tokenizer import write_tokenizer
from tests.verify.conftest import CONFIG, Compiled, compile_quietly

SCHEMES = ("w4a8", "fp8", "mxfp4", "ptpc-fp8", "bf16", "none")
# Steps that may take all of their bound: half a unit of one rounding, or a value inside that was undecided.
WHOLE = ("atom.dequantize.default", "aten.to.dtype", "atom.moe_experts_quant.default")


def within(artifact: Path, checkpoint: Path | str | None, tokens: int = 120) -> None:
    found = verify_artifact(artifact, (), Options(tokens, None if checkpoint is None else str(checkpoint)))
    assert found.ok, found.problems
    assert found.first is None
    assert found.weights
    assert max(s.worst.use for s in found.steps if s.op not in WHOLE) < 0.75
    assert found.judged > 1000


def test_the_checkpoints_own_scheme_keeps_every_bound(compiled: Compiled) -> None:
    within(compiled.artifact, compiled.checkpoint, 300)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_keeps_every_bound(compiled: Compiled, tmp_path: Path, scheme: str) -> None:
    within(compile_quietly(compiled.checkpoint, tmp_path / "model.atom", scheme=scheme), compiled.checkpoint)


def test_scales_by_least_squares_keep_the_bounds(compiled: Compiled, tmp_path: Path) -> None:
    artifact = compile_quietly(compiled.checkpoint, tmp_path / "model.atom", scheme="ptpc-fp8", scales="mse")
    within(artifact, compiled.checkpoint, 40)


@pytest.mark.parametrize("scales", ["amax", "mse"])
def test_a_checkpoint_in_full_is_compared_within_half_a_spacing(tmp_path: Path, scales: str) -> None:
    checkpoint = random_checkpoint(tmp_path / "checkpoint", tiny_config(**CONFIG), quantized=False)
    write_tokenizer(checkpoint)
    artifact = compile_quietly(checkpoint, tmp_path / "model.atom", scheme="w4a8", scales=scales)
    found = verify_artifact(artifact, (), Options(40, str(checkpoint)))
    assert found.ok, found.problems
    rounded = [w for w in found.weights or () if w.origin == "quantized"]
    assert len(rounded) > 20
    assert all(0 < w.error < 0.2 for w in rounded)


def test_bfloat16_keeps_the_bounds(compiled: Compiled, tmp_path: Path) -> None:
    artifact = compile_quietly(compiled.checkpoint, tmp_path / "model.atom", dtype="bfloat16")
    found = verify_artifact(artifact, (), Options(80, str(compiled.checkpoint)))
    assert found.ok, found.problems


@pytest.mark.parametrize("scheme", ["native", "none"])
def test_the_bundled_model_keeps_every_bound(tmp_path: Path, scheme: str) -> None:
    artifact = compile_quietly(Path("deepseek-v4-nano"), tmp_path / "nano.atom", scheme=scheme)
    within(artifact, None, 300)


# -- what cannot be compared is said -----------------------------------------------------------------------------------


def test_without_a_checkpoint_weights_are_not_compared(compiled: Compiled) -> None:
    assert verify_artifact(compiled.artifact, (), Options(20)).weights is None


def test_another_models_checkpoint_is_refused(compiled: Compiled) -> None:
    with pytest.raises(VerifyError, match="its configuration is not the one"):
        verify_artifact(compiled.artifact, (), Options(20, "deepseek-v4-nano"))


def test_an_unknown_region_is_refused(compiled: Compiled) -> None:
    with pytest.raises(VerifyError, match="--region nowhere: no such region; choose one of"):
        verify_artifact(compiled.artifact, (), Options(20, None, "nowhere"))


def test_only_the_region_asked_for_is_judged(compiled: Compiled) -> None:
    found = verify_artifact(compiled.artifact, (), Options(20, None, "head"))
    assert {s.region for s in found.steps} == {"head"}


def test_too_little_text_is_refused(compiled: Compiled) -> None:
    with pytest.raises(VerifyError, match="at least 8 are needed"):
        verify_artifact(compiled.artifact, ("Hi",), Options(20))


def test_a_damaged_artifact_is_refused_before_anything_runs(compiled: Compiled, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compiled.artifact, tmp_path / "copy"))
    (folder / "layouts.json").write_text("{}")
    with pytest.raises(AtomcError, match="is damaged"):
        verify_artifact(folder)
