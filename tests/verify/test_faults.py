"""Seeded faults: each is refused, or found by `atomc verify`, and the message names the tensor. None slips through."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from atomc.errors import AtomcError
from atomc.verify import Options, Verification, verify_artifact
from tests.support.sealed import copy_of, edit, reseal
from tests.support.tiny import random_checkpoint, tiny_config
from tests.support.tokenizer import write_tokenizer
from tests.verify import seeds
from tests.verify.conftest import CONFIG, Compiled, compile_quietly


def verified(artifact: Path, checkpoint: Path | None) -> Verification:
    return verify_artifact(artifact, (), Options(80, None if checkpoint is None else str(checkpoint)))


def names(found: Verification) -> str:
    return "\n".join(found.problems)


# -- bytes of the artifact ---------------------------------------------------------------------------------------------

BYTES = [(kind, name) for kind in seeds.FP8 for name in seeds.ARTIFACT_FP8]
BYTES += [(kind, name) for kind in seeds.FP4 for name in seeds.ARTIFACT_FP4]


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in BYTES}))
def test_a_fault_in_the_artifacts_weights_is_found(compiled: Compiled, tmp_path: Path, kind: str) -> None:
    folder = copy_of(compiled.artifact, tmp_path)
    ours = [name for known, name in BYTES if known == kind]
    pairs = {
        (f"{name}.weight" if name in seeds.ARTIFACT_FP8 else name):
        (f"{name}.scale", (seeds.FP8 if name in seeds.ARTIFACT_FP8 else seeds.FP4)[kind])
        for name in ours
    }  # fmt: skip
    seeds.edit_tensors(folder, seeds.damaged(pairs))
    reseal(folder)
    found = verified(folder, compiled.checkpoint)
    assert {w.name for w in found.weights or () if not w.ok} == set(pairs)
    assert all(f"weight {name} " in names(found) for name in pairs)


def test_a_fault_in_weights_that_the_compiler_rounded_is_found(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "checkpoint", tiny_config(**CONFIG), quantized=False)
    write_tokenizer(checkpoint)
    artifact = compile_quietly(checkpoint, tmp_path / "model.atom", scheme="w4a8")
    pairs = {
        weight: (f"{name}.scale", (seeds.FP4 if "experts" in name else seeds.FP8)[kind])
        for (kind, name), weight in seeds.ROUNDED.items()
    }
    seeds.edit_tensors(artifact, seeds.damaged(pairs))
    reseal(artifact)
    found = verified(artifact, checkpoint)
    assert {w.name for w in found.weights or () if not w.ok} == set(pairs)


def test_a_dialect_that_the_plan_does_not_name_is_refused(compiled: Compiled, tmp_path: Path) -> None:
    folder, name = copy_of(compiled.artifact, tmp_path), "layers.0.attn.wq_b.weight"
    change = seeds._set(lambda w: w.view(torch.uint8).view(torch.float8_e4m3fnuz))
    seeds.edit_tensors(folder, {name: lambda tensors: change(tensors, name)})
    reseal(folder)
    with pytest.raises(AtomcError, match=re.escape(repr(name))):
        verified(folder, compiled.checkpoint)


# -- bytes of the checkpoint -------------------------------------------------------------------------------------------


def test_faults_in_a_copy_of_the_checkpoint_are_found_by_the_original(compiled: Compiled, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(compiled.checkpoint, tmp_path / "copy"))
    pairs = {}
    for kind, name in seeds.CHECKPOINT:
        table = seeds.FP4 if ".experts." in name and "shared" not in name else seeds.FP8
        pairs[f"{name}.weight"] = f"{name}.scale", table[kind]
    seeds.edit_tensors(copy, seeds.damaged(pairs))
    artifact = compile_quietly(copy, tmp_path / "model.atom")
    found = verified(artifact, compiled.checkpoint)
    assert {w.name for w in found.weights or () if not w.ok} == set(seeds.CHECKPOINT.values())


@pytest.mark.parametrize("seed", seeds.REFUSED, ids=lambda s: f"{s.kind}, {s.tensor}")
def test_a_checkpoint_that_is_not_the_format_is_refused(
    compiled: Compiled, tmp_path: Path, seed: seeds.Refused
) -> None:
    copy = Path(shutil.copytree(compiled.checkpoint, tmp_path / "copy"))
    seeds.edit_tensors(copy, {seed.tensor: lambda tensors: seed.change(tensors, seed.tensor)})
    with pytest.raises(AtomcError) as raised:
        compile_quietly(copy, tmp_path / "model.atom")
    assert seed.tensor.rpartition(".")[0] in raised.value.message, raised.value.message


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", seeds.PLANS, ids=lambda s: f"{s.kind}, {s.region}")
def test_a_fault_in_the_plan_is_refused_when_it_is_loaded(compiled: Compiled, tmp_path: Path, seed: seeds.Edit) -> None:
    folder = copy_of(compiled.artifact, tmp_path)
    plan = f"plan/{seed.region}.json"
    expected = (
        seed.expected if isinstance(seed.expected, str) else seed.expected(json.loads((folder / plan).read_text()))
    )
    edit(folder, plan, seed.change)
    with pytest.raises(AtomcError, match="the plan cannot run") as raised:
        verified(folder, compiled.checkpoint)
    assert expected in raised.value.message, raised.value.message
    assert seed.region in raised.value.message


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_a_recipe_that_transposes_scales_is_found(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atomc.passes import quantize
    from atomc.recipes import Load, Permute

    right = quantize.pair_of

    def wrong(*args: object) -> object:
        pair = right(*args)  # type: ignore[arg-type]
        square = isinstance(pair.scales, Load) and ("wo_b" in pair.scales.name or "attn.wq_b" in pair.scales.name)
        return dataclasses.replace(pair, scales=Permute(pair.scales, (1, 0))) if square else pair

    monkeypatch.setattr(quantize, "pair_of", wrong)
    found = verified(compile_quietly(compiled.checkpoint, tmp_path / "model.atom"), compiled.checkpoint)
    expected = {f"layers.{n}.attn.{w}.weight" for n in range(3) for w in ("wo_b", "wq_b")}
    assert {w.name for w in found.weights or () if not w.ok} == expected


def test_an_expansion_with_scales_off_by_one_is_found(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP4 into FP8 tiles, as the fp8 scheme does, where nothing but the numbers says that it went wrong."""
    evaluate = importlib.import_module("atomc.recipes.evaluate")
    right = evaluate.expand_mxfp4

    def wrong(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return seeds.off_by_one(*right(codes, scales))

    monkeypatch.setattr(evaluate, "expand_mxfp4", wrong)
    artifact = compile_quietly(compiled.checkpoint, tmp_path / "model.atom", scheme="fp8")
    found = verified(artifact, compiled.checkpoint)
    expected = {f"layers.{n}.ffn.experts.{w}" for n in range(3) for w in ("w13", "w2")}
    assert {w.name for w in found.weights or () if not w.ok} == expected


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", seeds.MISTAKES, ids=lambda s: f"{s.kind}, {s.put.__name__}, {s.expected[0]}")
def test_a_mistake_in_the_code_is_found(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch, seed: seeds.Mistake
) -> None:
    seed.put(monkeypatch)
    found = verified(compiled.artifact, None)
    assert found.first is not None
    assert set(seed.expected) <= {s.tensor for s in found.steps if not s.ok}, names(found)


@pytest.mark.parametrize("name", seeds.OPERATORS)
def test_a_mistake_in_an_operator_is_found_at_its_step(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    op, tensor, changed = seeds.OPERATORS[name]
    seeds._argument(op, **changed)(monkeypatch)
    found = verified(compiled.artifact, None)
    assert found.first is not None
    broken = [s for s in found.steps if not s.ok]
    assert {s.op for s in broken} == {f"atom.{op}.default"}
    assert any(s.prefix + tensor in (s.tensor, *s.reads) and f"{s.prefix}{tensor}" in s.message() for s in broken)
    assert "deepseek_v4/" in found.first.report.source


# -- all of them -------------------------------------------------------------------------------------------------------


def test_every_kind_is_seeded_for_several_tensors() -> None:
    count = Counter(kind for kind, _ in BYTES)
    count += Counter(kind for kind, _ in (*seeds.CHECKPOINT, *seeds.ROUNDED))
    for seed in (*seeds.REFUSED, *seeds.PLANS):
        count[seed.kind] += 1
    for mistake in seeds.MISTAKES:
        count[mistake.kind] += len(mistake.expected)
    count["dialect mismatch"] += 1
    count["scale transposed"] += 6  # by recipe
    count["E8M0 off by one"] += 6
    assert set(count) == set(seeds.KINDS)
    assert dict(count) == {
        "scale transposed": 19, "E8M0 off by one": 28, "FNUZ read as OCP": 11, "nibbles swapped": 10,
        "dialect mismatch": 10, "missing scale": 15, "Hadamard on one side": 4, "group 32 read as 128": 13,
    }  # fmt: skip
    assert count.total() == 110
    assert min(count.values()) >= 4
