"""`--bisect`: the fewest tokens that still break a bound, and a script that shows it anywhere."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atomc.ops import OPS
from atomc.verify import VerifyError, examine, observe
from atomc.verify.bisect import bisect, read_repro
from atomc.verify.judge import worst
from atomc.verify.watching import Failure, StepReport
from tests.support.cli import environment
from tests.verify.cases import arguments

PATCH = """
import dataclasses, runpy, sys
from atomc.ops import OPS
right = OPS["rms_norm"].cpu
wrong = lambda x, weight, eps: right(x, weight, eps) * (1 + 1e-3 * (x[:, :1] > 0))
OPS["rms_norm"] = dataclasses.replace(OPS["rms_norm"], cpu=wrong)
sys.argv = ["repro.py"]
runpy.run_path({path!r}, run_name="__main__")
"""


def failure(case: str, tokens: set[str], reserved: frozenset[str] = frozenset()) -> Failure:
    op, given = arguments(case)
    seen = observe(op, given, reserved)
    verdict = worst(examine(seen))
    assert not verdict.ok
    report = StepReport(
        "layer", "step", 3, op, "model.py:7", 1, "layers.0.", "layers.0.norm", ("layers.0.norm",), verdict
    )
    return Failure(report, seen, frozenset(tokens))


def wrong_for_one_token(op: str, token: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator is wrong where the first channel of its first argument is `token`."""
    right, order = OPS[op].cpu, [a.name for a in OPS[op].overload._schema.arguments]

    def run(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(order, args, strict=False)) | kwargs
        first: Tensor = given[order[0]]
        off = (first.flatten(1)[:, :1] == token).float().view(-1, *[1] * (first.dim() - 1))
        found = right(**given)
        return found * (1 + off / 100)

    monkeypatch.setitem(OPS, op, dataclasses.replace(OPS[op], cpu=run))


def test_one_wrong_token_is_all_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = float(arguments("rms_norm")[1]["x"][17, 0])
    wrong_for_one_token("rms_norm", token, monkeypatch)
    torch.manual_seed(0)
    repro = bisect(failure("rms_norm", {"x"}), tmp_path / "repro")
    assert (repro.before, repro.after) == (24, 1)
    left = read_repro(tmp_path / "repro")
    assert left.arguments["x"].shape == (1, 128)
    assert float(left.arguments["x"][0, 0]) == token
    step = json.loads((tmp_path / "repro" / "step.json").read_text())
    assert step["op"] == "atom.rms_norm.default"
    assert "layers.0.norm" in step["error"]


def test_requests_are_cut_with_their_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that reads pages by request, the tables stay and the requests' first tokens move."""
    right = OPS["index_rope_topk"].cpu
    changed = dataclasses.replace(OPS["index_rope_topk"], cpu=lambda *args: right(*args) * 0)
    monkeypatch.setitem(OPS, "index_rope_topk", changed)
    tokens = {"q", "cos", "sin", "weights", "table", "requests", "positions", "query_start"}
    repro = bisect(failure("index packed", tokens), tmp_path / "repro")
    assert repro.after == 1
    assert not repro.verdict.ok
    left = read_repro(tmp_path / "repro").arguments
    assert left["query_start"][-1] == len(left["q"]) == 1
    assert left["table"].shape == (2, 4)


def test_what_is_not_per_token_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = OPS["dequantize"].cpu
    monkeypatch.setitem(OPS, "dequantize", dataclasses.replace(OPS["dequantize"], cpu=lambda *a: right(*a) * 2))
    repro = bisect(failure("dequantize", set()), tmp_path / "repro")
    assert repro.before == repro.after == 256
    kept = read_repro(tmp_path / "repro")
    assert kept.arguments["codes"].dtype == torch.float8_e4m3fn
    assert kept.arguments["scales"].dtype == torch.float8_e8m0fnu
    assert kept.arguments["dtype"] == torch.float32


def test_what_only_went_wrong_in_the_run_is_written_as_it_was(tmp_path: Path) -> None:
    op, given = arguments("rms_norm")
    seen = observe(op, given)
    seen = dataclasses.replace(seen, results=(seen.results[0] * 1.01,))
    report = StepReport("layer", "step", 3, op, "model.py:7", 1, "", "norm", (), worst(examine(seen)))
    repro = bisect(Failure(report, seen, frozenset({"x"})), tmp_path / "repro")
    assert repro.before == repro.after == 24
    assert not examine(read_repro(tmp_path / "repro"))[0].ok


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = OPS["rms_norm"].cpu
    monkeypatch.setitem(OPS, "rms_norm", dataclasses.replace(OPS["rms_norm"], cpu=lambda *a: right(*a) * 2))
    (tmp_path / "file").touch()
    with pytest.raises(VerifyError, match=r"--bisect .*file"):
        bisect(failure("rms_norm", {"x"}), tmp_path / "file" / "below")


@pytest.mark.slow
def test_the_repro_runs_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = OPS["rms_norm"].cpu
    changed = dataclasses.replace(
        OPS["rms_norm"], cpu=lambda x, weight, eps: right(x, weight, eps) * (1 + 1e-3 * (x[:, :1] > 0))
    )
    monkeypatch.setitem(OPS, "rms_norm", changed)
    folder = tmp_path / "repro"
    bisect(failure("rms_norm", {"x"}), folder)
    script = folder / "repro.py"
    assert script.read_text().count("\n") < 30
    right_now = subprocess.run([sys.executable, script], env=environment(), capture_output=True, text=True, timeout=300)
    assert right_now.returncode == 0, right_now.stderr
    assert "recorded: out 0: BROKEN" in right_now.stdout
    assert "relative error 1.0" in right_now.stdout
    assert "now: out 0: ok" in right_now.stdout  # nothing is wrong with that process
    command = [sys.executable, "-c", PATCH.format(path=str(script))]
    wrong_now = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert "now: out 0: BROKEN" in wrong_now.stdout, wrong_now.stderr
