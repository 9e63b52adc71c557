"""The peers of `benchmarks/stacks.py` compute the model, caches can be put back, and a part that fails is told."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from atomc.models.bundled import bundled_config
from atomc.models.deepseek_v4.config import DeepseekV4Config
from tests.support.v4_configs import tiny


@pytest.fixture(autouse=True)
def benchmarks(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(repo_root / "benchmarks"), *sys.path])


def small() -> DeepseekV4Config:
    """A layer of each kind; windows of 4 and 128, as transformers knows no others."""
    return tiny(compress_ratios=[0, 4, 128, 4], num_hash_layers=1, hidden_size=64)


def test_a_step_that_never_waits_is_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = importlib.import_module("stack_torch")
    torch.manual_seed(0)
    model, step = stack.build(small(), "cpu"), stack.Step(small(), 3, 128, 1, "cpu")
    batch, others = step.batch(127, 1), copy.deepcopy(step.states)
    with torch.no_grad():
        expected = model(batch, step.states)
        with stack.unwaiting(128):
            found = model(batch, others)
    assert torch.equal(found, expected)
    for mine, theirs in zip(step.states, others, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_a_repeated_cache_is_that_of_the_prompt_and_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = importlib.import_module("stack_transformers")
    monkeypatch.setattr(theirs, "CHUNK", 64)
    torch.manual_seed(0)
    config = small()
    stack = theirs.Stack(theirs.build(config, "cpu"), config, "cpu")
    stack.model.set_experts_implementation("eager")
    ids, fed = stack.ids(1, 130), stack.new_cache()
    for start in (0, 64, 128):
        stack.feed(ids[:, start : min(start + 64, 129)], start, fed)
    holder = theirs.Cache(fed)
    holder.repeated(2)
    restore, last = holder.kept(), ids[:, 129:].expand(2, 1)
    first = stack.feed(last, 129, holder.cache)
    restore()
    again = stack.feed(last, 129, holder.cache)
    assert torch.equal(first, again)
    whole = stack.feed(ids, 0, stack.new_cache())
    # bf16: a sequence at once and in pieces are rounded apart.
    assert torch.nn.functional.cosine_similarity(first[1, -1].float(), whole[0, -1].float(), dim=0) > 0.98


def test_operations_of_a_token_are_twice_the_active_parameters() -> None:
    roofline = importlib.import_module("stack_roofline")
    found = roofline.operations(bundled_config("deepseek-v4-flash"), 1, 1, 1)
    assert sum(found.values()) == pytest.approx(2 * 13.27e9, rel=0.01)
    longer = roofline.operations(bundled_config("deepseek-v4-flash"), 1, 1, 4096)
    assert longer["fp8"] == found["fp8"]
    assert longer["bf16"] > found["bf16"]
    assert roofline.least(2e12, {"fp8": 1e15, "bf16": 1e14}, {"copy": 4e12, "fp8": 1e15, "bf16": 1e15}) == 1.1


def test_rows_of_a_part_that_fails_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks = importlib.import_module("stacks")
    config, out = tmp_path / "config.json", tmp_path / "out.json"
    config.write_text(json.dumps(small().to_dict()))
    row = {"who": "transformers", "step": "decode", "requests": 1, "device_s": 0.5}

    def run(part: str, options: argparse.Namespace, limit: float) -> tuple[list[dict[str, Any]], str]:
        if part == "device":
            return [{"device": "none", "torch": "0"}], ""
        return [row], "ended with 1"

    monkeypatch.setattr(stacks, "run", run)
    monkeypatch.setattr(sys, "argv", ["stacks.py", str(config), "--parts", "transformers", "--out", str(out)])
    assert stacks.main() == 0
    written = json.loads(out.read_text())
    assert written["rows"] == [{"part": "transformers", **row}]
    assert written["parts"] == {"transformers": "ended with 1"}
    assert written["layers"] == [0, 4, 128, 4]
    monkeypatch.setattr(sys, "argv", ["stacks.py", str(config), "--parts", "torch", "--add", "--out", str(out)])
    assert stacks.main() == 0
    assert [found["part"] for found in json.loads(out.read_text())["rows"]] == ["transformers", "torch"]
    out.write_text(json.dumps({**written, "device": "another"}))
    with pytest.raises(SystemExit, match="is of device another"):
        stacks.main()


def test_a_part_runs_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks = importlib.import_module("stacks")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(small().to_dict()))
    given = [str(config), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["stacks.py", *given])
    options = stacks.arguments().parse_args(given)
    (facts,), why = stacks.run("device", options, 120)
    assert (facts["torch"], why) == (torch.__version__, "")
    _, why = stacks.run("atomc", options, 120)
    assert why.startswith("ended with")
