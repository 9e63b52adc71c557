"""The figures that README.md and docs/ state are those of benchmarks/results, rounded as they are stated."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest


def result(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def quantization_rows(root: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["model"], row["name"]): row for row in result(root, "quantization")["rows"]}


def packing_rows(root: Path, scheme: str, scales: str, runs: str = "") -> list[dict[str, Any]]:
    rows = result(root, "pack")["rows"]
    return [row for row in rows if (row["scheme"], row["scales"]) == (scheme, scales) and row["run"].startswith(runs)]


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def readme_lines(root: Path) -> Iterator[str]:
    """The rows of the table of figures, as they follow from the files."""
    compiled = {(row["model"], row["dtype"]): row for row in result(root, "compile_time")["rows"]}
    flash, pro = (compiled[f"deepseek-v4-{name}", "float32"] for name in ("flash", "pro"))
    ratio = pro["seconds"] / flash["seconds"]
    yield f"float32 | {flash['seconds']:.1f} s, {flash['peak_bytes'] / 1e6:.0f} MB at most | [compile_time.json]"
    yield f"the same | {pro['seconds']:.1f} s, {pro['peak_bytes'] / 1e6:.0f} MB: {ratio:.2f}× Flash's time | same"
    one, _, eight, _ = (case["tokens_per_s"] for case in result(root, "generate")["cases"])
    yield f"`--scheme none` | {one:.0f} tokens/s; "
    yield f"`--scheme none` | {eight:.0f} tokens/s in all, {eight / one:.1f}× | same"
    rows = quantization_rows(root)
    native, dense = rows["shipped", "native"], rows["shipped", "bf16"]
    lost = f"+{native['loss']:.4f} ± {native['loss_error']:.4f} bits/byte, KL {native['kl_mean']:.4f}"
    sizes = f"{native['weight_bytes'] / 2**20:.1f} MiB of weights instead of {dense['weight_bytes'] / 2**20:.1f}"
    yield f"| {lost}, {sizes}; "
    yield f"| {result(root, 'eval_nano')['bits_per_byte']:.4f} bits/byte as shipped"


def kernel_lines(root: Path) -> Iterator[str]:
    """What README.md says of compiling for a GPU."""
    yield from importlib.import_module("compile_kernels").prose(result(root, "compile_kernels")["rows"])


def packing_lines(root: Path) -> Iterator[str]:
    """What README.md says of packing."""
    stored = [row for run in ("cold", "warm") for row in packing_rows(root, "native", "amax", run)]
    speeds = [row["mb_per_second"] for row in stored]
    most = max(row["peak_bytes"] for row in packing_rows(root, "native", "amax"))
    size = f"({stored[0]['bytes'] / 1e9:.2f} GB)"
    yield f"layer {size} as stored | {min(speeds):.0f} to {max(speeds):.0f} MB/s, at most {gib(most)} above"
    (amax,), (mse,) = (packing_rows(root, "w4a8", scales) for scales in ("amax", "mse"))
    most = max(row["peak_bytes"] for row in (amax, mse))
    speeds = [row["mb_per_second"] for row in (amax, mse)]
    yield f"`w4a8` | {speeds[0]:.0f} MB/s with scales from amax, {speeds[1]:.0f} with `mse`, at most {gib(most)} above"


def document_lines(root: Path) -> Iterator[str]:
    """The prose of docs/quantization.md."""
    rows = quantization_rows(root)

    def of(name: str, key: str, model: str = "shipped") -> float:
        value: float = rows[model, name][key]
        return value

    bf16_rows = "native --cache-rows bf16 --index-rows bf16"
    yield f"`native` loses {of('native', 'loss'):.4f} ± {of('native', 'loss_error'):.4f} bits/byte"
    yield f"KL is {of(bf16_rows, 'kl_mean'):.4f} with all rows in bf16, {of('native', 'kl_mean'):.4f} as shipped"
    fp8 = "native --index-rows fp8"
    yield f"KL is {of('native', 'kl_mean'):.4f} with them, {of(fp8, 'kl_mean'):.4f} with FP8"
    computed = of("native --index-rows compute", "recall")
    yield f"pick {of(fp8, 'recall'):.0%}, rows as computed {computed:.0%}".replace("%", " %")
    more = of("w4a8", "loss", "rescaled") - of("fp8", "loss", "rescaled")
    yield f"costs {more:.4f} bits/byte more than to FP8"
    yield f"falls from {of('ptpc-fp8', 'loss'):.4f} to {of('ptpc-fp8 --scales mse', 'loss'):.4f}"
    for scales in ("amax", "mse"):
        (row,) = packing_rows(root, "w4a8", scales)
        yield f"{row['seconds']:.0f} s with `{scales}`"
    (row,) = packing_rows(root, "w4a8", "mse")
    yield f"{row['source_bytes'] / 1e9:.1f} GB of bf16 into {row['bytes'] / 1e9:.2f} GB"


def prediction_lines(root: Path) -> Iterator[str]:
    """The table of docs/inspect.md, and what it says of the kernels of a prefill."""
    rows = result(root, "predictions_h100")["rows"]
    for row in rows:
        seconds, known, seen = (row[f"{name}_s"] for name in ("measured", "predicted", "with_rates_of_that_run"))
        time = f"{seconds * 1e3:.{2 if 'decode' in row['step'] else 1}f}"
        shares = [f"{predicted / seconds:.0%}".replace("%", " %") for predicted in (known, seen)]
        yield f"| {time} | {known * 1e3:.2f} | {shares[0]} | {seen * 1e3:.2f} | {shares[1]} |"
    yield f"where the plan has {rows[0]['launches']} of kernels"
    kernels = {name: f"{seconds * 1e3:.1f}" for name, seconds in rows[-1]["kernels"].items()}
    yield f"(predicted {kernels['experts_in']}), experts out 8.8 ({kernels['experts_out']}), FP8 linears 10.6 "
    yield f"FP8 linears 10.6 ({kernels['scaled_gemm']}), attention 9.7 ({kernels['attend']})"


def missing(page: Path, lines: Iterator[str]) -> list[str]:
    """Lines that a page does not have; where it breaks its lines does not matter."""
    text = " ".join(page.read_text(encoding="utf-8").split())
    return [line for line in lines if line not in text]


def test_the_readme_states_what_was_measured(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(repo_root / "benchmarks"), *sys.path])
    assert missing(repo_root / "README.md", kernel_lines(repo_root)) == []
    assert missing(repo_root / "README.md", readme_lines(repo_root)) == []
    assert missing(repo_root / "README.md", packing_lines(repo_root)) == []


def test_the_document_on_quantisation_states_what_was_measured(repo_root: Path) -> None:
    assert missing(repo_root / "docs" / "quantization.md", document_lines(repo_root)) == []
    rows = quantization_rows(repo_root)
    assert rows["shipped", "mxfp4"]["loss"] / rows["shipped", "native"]["loss"] == pytest.approx(10, rel=0.1)


def test_the_document_on_predictions_states_them_beside_what_was_measured(repo_root: Path) -> None:
    assert missing(repo_root / "docs" / "inspect.md", prediction_lines(repo_root)) == []


def test_its_tables_and_its_picture_are_those_of_the_results(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(repo_root / "benchmarks"), *sys.path])
    report = importlib.import_module("quantization_report")
    measured = result(repo_root, "quantization")
    page, picture = (repo_root / "docs" / name for name in ("quantization.md", "quantization_error.svg"))
    shutil.copyfile(page, tmp_path / "page.md")
    report.write_document(tmp_path / "page.md", measured)
    report.write_picture(tmp_path / "picture.svg", measured["rows"], measured["layers"])
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
    assert (tmp_path / "picture.svg").read_bytes() == picture.read_bytes()


def test_stored_results_meet_their_limits(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(repo_root / "benchmarks"), *sys.path])
    packed = result(repo_root, "pack")
    assert max(row["peak_bytes"] for row in packed["rows"]) < packed["limit_bytes"]
    verdicts = importlib.import_module("compile_time").verdicts(result(repo_root, "compile_time")["rows"])
    assert len(verdicts) == 10
    assert all(line.startswith("met") for line in verdicts)
    verdicts = importlib.import_module("compile_kernels").verdicts(result(repo_root, "compile_kernels")["rows"])
    assert len(verdicts) == 12
    assert all(line.startswith("met") for line in verdicts)
    measured = result(repo_root, "quantization")
    assert importlib.import_module("quantization").verdict(measured["rows"]) == ""


# -- a limit that is missed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missed", [False, True])
@pytest.mark.parametrize("name", ["pack", "compile_time", "compile_kernels", "quantization"])
def test_a_missed_limit_ends_with_1_and_nothing_is_written(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, missed: bool
) -> None:
    monkeypatch.setattr(sys, "path", [str(repo_root / "benchmarks"), *sys.path])
    bench, rows, out = importlib.import_module(name), result(repo_root, name)["rows"], tmp_path / "out.json"
    if missed:
        at = next(i for i, row in enumerate(rows) if name != "quantization" or row["name"] == "native")
        rows[at] |= {"peak_bytes": 7 << 30, "loss": 0.011}
    arguments = ["--out", str(out)]
    if name == "pack":
        monkeypatch.setattr(bench, "measure", lambda *_: rows)
    elif name == "compile_kernels":
        monkeypatch.setattr(bench, "measure", lambda model, _: [row for row in rows if row["model"] == model])
    elif name == "compile_time":
        found = iter(sorted(rows, key=lambda row: (row["dtype"] == "bfloat16", row["model"])))
        monkeypatch.setattr(bench, "measure", lambda *_: next(found))
    else:
        arguments += ["--text", "unread", "--docs", str(tmp_path)]
        for part in ("load_text", "Bench", "write"):
            monkeypatch.setattr(bench, part, MagicMock(return_value=MagicMock(**{"check_copy.return_value": {}})))
        monkeypatch.setattr(bench, "described", lambda *_: {})
        monkeypatch.setattr(bench, "run", lambda *_: rows)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    assert bench.main() == missed
    assert out.exists() != missed
    assert missed or json.loads(out.read_text())["rows"] == rows
