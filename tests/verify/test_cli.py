"""`atomc verify` as a user sees it: tables, JSON, exit codes, the repro."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.verify import seeds
from tests.verify.conftest import Compiled


def test_a_right_artifact_exits_with_0(cli: Cli, compiled: Compiled, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    where = tmp_path / "repro"
    ran = cli("verify", compiled.artifact, "--text", text, "--tokens", "40", "--bisect", where)
    assert ran.code == 0, ran.err
    assert "weights  not compared: give --checkpoint" in ran.out
    assert "all within their bounds" in ran.out
    assert "atom.sparse_attention" in ran.out
    assert not where.exists()


def test_json_holds_every_step(cli: Cli, compiled: Compiled) -> None:
    ran = cli("verify", compiled.artifact, "--tokens", "40", "--checkpoint", compiled.checkpoint, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert found["ok"] is True
    assert (found["problems"], found["first"], found["repro"]) == ([], None, None)
    assert {s["phase"] for s in found["steps"]} == {"prepare", "step"}
    assert all(s["error"] <= s["bound"] or s["use"] <= 1 for s in found["steps"])
    assert all(w["ok"] and w["error"] == 0 for w in found["weights"])


def test_a_broken_bound_exits_with_1_and_names_the_step(
    cli: Cli, compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds._argument("moe_experts_quant", limit=100.0)(monkeypatch)
    ran = cli("verify", compiled.artifact, "--tokens", "40", "--bisect", tmp_path / "repro")
    assert ran.code == 1
    assert "Traceback" not in ran.err
    assert "The first step that breaks its bound: step " in ran.err
    assert "of layer_swa_hash (atom.moe_experts_quant, deepseek_v4/moe.py:" in ran.err
    assert "layers.0.ffn.experts.w13" in ran.err
    assert "BROKEN" in ran.out
    assert {p.name for p in (tmp_path / "repro").iterdir()} == {"step.json", "inputs.safetensors", "repro.py"}
    step = json.loads((tmp_path / "repro" / "step.json").read_text())
    assert step["op"] == "atom.moe_experts_quant.default"
    assert step["layouts"]["layout"] == "e4m3:1x128:e8m0:0.0001"
    assert step["arguments"]["codes"]["shape"][0] == 1


def test_a_broken_bound_is_one_json_document(cli: Cli, compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds._argument("qk_norm_rope_insert", sin=lambda s: -s)(monkeypatch)
    ran = cli("verify", compiled.artifact, "--tokens", "40", "--region", "layer_swa_hash", "--json")
    assert ran.code == 1
    assert ran.json["ok"] is False
    assert ran.json["first"]["tensor"] == "layers.0.window"
    assert "qk_norm_rope_insert" in ran.json["first"]["op"]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--region", "nowhere"], 1, "choose one of"),
        (["--text", "nowhere.txt"], 2, "cannot be read"),
        (["--tokens", "2"], 2, "8"),
        (["--checkpoint", "nowhere"], 3, "neither a checkpoint folder nor a bundled model"),
    ],
)
def test_a_wrong_option_is_named(cli: Cli, compiled: Compiled, args: list[str], code: int, said: str) -> None:
    ran = cli("verify", compiled.artifact, *args)
    ran.failed(code, said)
