"""Calibration: the mean squares of what enters each product, kept in a file, and used where scales are chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from atomc.calibrate import calibrate
from atomc.calibration import SPACE, Calibration, CalibrationError, write_calibration
from atomc.compiler import CompileError, Options, compile_model
from atomc.models.deepseek_v4.config import load_config
from atomc.models.deepseek_v4.model import DeepseekV4
from atomc.models.deepseek_v4.reader import CheckpointReader
from atomc.models.deepseek_v4.weights import load_parameters
from atomc.recipes import Load, Quantize
from atomc.runtime.capacity import open_executor
from atomc.runtime.detokenize import Vocabulary
from tests.support.artifact import ONE_LAYER
from tests.support.eager import chunks, run
from tests.support.tiny import random_checkpoint, tiny_config

TEXT = "def load(path):\n    return open(path).read()\n" * 3


@pytest.fixture(scope="module")
def means(artifact: Path) -> dict[str, torch.Tensor]:
    executor, _ = open_executor(artifact)
    return calibrate(executor, [TEXT, TEXT[5:90]])


@pytest.mark.slow
def test_mean_squares_are_those_of_the_models_inputs(
    means: dict[str, torch.Tensor], artifact: Path, model_folder: Path
) -> None:
    config = load_config(model_folder / "checkpoint")
    model = DeepseekV4(config)
    load_parameters(model, config, CheckpointReader(model_folder / "checkpoint"), "float32")
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("wq_a", "wq_b", "wkv", "wo_b", "shared_experts.w1", "shared_experts.w2")):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    vocabulary = Vocabulary.from_file(artifact / "tokenizer.json")
    with torch.no_grad():
        for text in (TEXT, TEXT[5:90]):
            ids = torch.tensor([0, *vocabulary.encode(text)])[:-1]
            run(model, [ids], chunks(len(ids), 40))
    for name, parts in seen.items():
        expected = torch.cat(parts).double().square().mean(0).float()
        torch.testing.assert_close(means[f"{name}.weight"], expected, rtol=1e-4, atol=1e-7)
    experts = {n for n in means if ".experts." in n}
    assert {n.rpartition("experts.")[2].partition(".")[2] for n in experts} == {"w1.weight", "w2.weight", "w3.weight"}


@pytest.mark.slow
def test_scales_follow_the_calibration(tmp_path: Path, means: dict[str, torch.Tensor]) -> None:
    """Channels that nothing enters cost nothing: the scales fit the others."""
    checkpoint = random_checkpoint(tmp_path / "plain", tiny_config(**ONE_LAYER), quantized=False)
    width = 64
    importance = torch.ones(width)
    importance[::2] = 0
    write_calibration(tmp_path / "c.safetensors", {"layers.0.attn.wq_a.weight": importance})
    results = {}
    for name, calibration in (("without", None), ("with", tmp_path / "c.safetensors")):
        limits = {"max_context": 320, "max_batch_tokens": 48, "max_requests": 4, "max_logit_rows": 40}
        options = Options(scheme="ptpc-fp8", scales="mse", calibration=calibration, **limits)  # type: ignore[arg-type]
        compile_model(str(checkpoint), "cpu", tmp_path / f"{name}.atom", options)
        with safe_open(tmp_path / f"{name}.atom" / "weights" / "00001.safetensors", framework="pt") as file:
            names = [k for k in file.keys() if k.endswith(".scale")]  # noqa: SIM118
            results[name] = {k: file.get_tensor(k) for k in names}
    assert results["with"].keys() == results["without"].keys()
    changed = {k for k, v in results["with"].items() if not torch.equal(v, results["without"][k])}
    assert changed == {"layers.0.attn.wq_a|attn.wkv.scale"}


def test_a_weight_needs_a_calibration_in_every_block(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    write_calibration(path, {"layers.0.a.weight": torch.ones(4), "layers.1.a.weight": torch.ones(4)})
    known = Calibration(path)
    assert known.importance(["layers.0.", "layers.1."], "{prefix}a.weight") == Load(SPACE + "{prefix}a.weight")
    assert known.importance(["layers.0.", "layers.2."], "{prefix}a.weight") is None
    assert Quantize(Load("w"), "e4m3:1x*:float32", "codes", "mse", Load("i")).importance == Load("i")


def test_files_that_are_no_calibration(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration(tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("{}")
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration(tmp_path / "text.safetensors")
    for bad in (torch.ones(2, 2), torch.ones(4).half(), torch.tensor([1.0, -1.0]), torch.tensor([torch.nan])):
        save_file({"w": bad}, tmp_path / "bad.safetensors")
        with pytest.raises(CalibrationError, match="w is no vector of mean squares"):
            Calibration(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("means", "scheme", "reason"),
    [({"layers.9.attn.wq_a.weight": torch.ones(64)}, "w4a8", "fits none of the"),
     ({"layers.0.attn.wq_a.weight": torch.ones(64)}, "bf16", "is not needed: scheme bf16 rounds no weight")],
)  # fmt: skip
def test_a_calibration_without_use_is_refused(
    tmp_path: Path, means: dict[str, torch.Tensor], scheme: str, reason: str
) -> None:
    checkpoint = random_checkpoint(tmp_path / "plain", tiny_config(**ONE_LAYER), quantized=False)
    write_calibration(tmp_path / "c.safetensors", means)
    options = Options(scheme=scheme, calibration=tmp_path / "c.safetensors", stop_after="dead_code")
    with pytest.raises(CompileError, match=f"--calibration .*{reason}"):
        compile_model(str(checkpoint), "cpu", tmp_path / "a.atom", options)


@pytest.mark.slow
def test_a_quantised_artifact_is_refused(native_artifact: Path) -> None:
    executor, _ = open_executor(native_artifact)
    with pytest.raises(CalibrationError, match="has the scheme native: what enters its products is rounded"):
        calibrate(executor, [TEXT])
