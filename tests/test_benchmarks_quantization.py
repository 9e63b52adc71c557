"""The measures of `benchmarks/quantization.py` against plain loops, and the document and picture it writes."""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from atomc.models.deepseek_v4.config import load_config
from atomc.models.deepseek_v4.reader import CheckpointReader
from atomc.models.deepseek_v4.schema import entries
from tests.support.tiny import random_checkpoint, tiny_config

REPO = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules beside the script, as it imports them."""
    import importlib

    monkeypatch.setattr(sys, "path", [str(REPO / "benchmarks"), *sys.path])
    names = ("metrics", "copies", "report")
    return {name: importlib.import_module(f"quantization_{name}") for name in names}


def test_divergence_is_the_sum_over_the_vocabulary(bench: dict[str, ModuleType]) -> None:
    a, b = torch.randn(5, 11).log_softmax(-1), torch.randn(5, 11).log_softmax(-1)
    rows = zip(a.tolist(), b.tolist(), strict=True)
    expected = [sum(math.exp(p) * (p - q) for p, q in zip(x, y, strict=True)) for x, y in rows]
    assert bench["metrics"].divergence(a, b).tolist() == pytest.approx(expected, abs=1e-6)
    assert bench["metrics"].divergence(a, a).tolist() == [0.0] * 5


def test_shared_picks_count_tokens_that_had_a_choice(bench: dict[str, ModuleType]) -> None:
    a = torch.stack([torch.randperm(9)[:4] for _ in range(30)])
    b = torch.stack([torch.randperm(9)[:4] for _ in range(30)])
    visible = torch.arange(30) % 9
    pairs = zip(a.tolist(), b.tolist(), visible.tolist(), strict=True)
    expected = [len(set(x) & set(y)) / 4 for x, y, seen in pairs if seen > 4]
    assert bench["metrics"].shared(a, b, visible).tolist() == pytest.approx(expected)
    padded = torch.tensor([[0, 1, -1, -1]])
    assert bench["metrics"].shared(padded, padded, torch.tensor([2])).tolist() == []


def test_relative_error_is_over_all_streams_of_a_token(bench: dict[str, ModuleType]) -> None:
    a = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]]])
    b = a + torch.tensor([[[0.0, 0.5], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert bench["metrics"].relative_error(a, b).tolist() == pytest.approx([0.1, 0.0])


def test_agreement_ends_at_the_first_difference(bench: dict[str, ModuleType]) -> None:
    agreement = bench["metrics"].agreement
    assert [agreement([1, 2, 3], other) for other in ([1, 2, 3], [1, 9, 3], [0, 2, 3])] == [3, 1, 0]
    with pytest.raises(ValueError, match="shorter"):
        agreement([1, 2, 3], [1, 2])


def test_the_error_of_a_ratio_is_that_of_a_mean_where_documents_are_equal(bench: dict[str, ModuleType]) -> None:
    values = torch.randn(12, dtype=torch.float64)
    ones = torch.ones(12, dtype=torch.float64)
    assert bench["metrics"].ratio_error(values, ones) == pytest.approx(float(values.std()) / math.sqrt(12))


def test_a_rescaled_copy_is_plain_and_off_the_grid(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    copies = bench["copies"]
    source = random_checkpoint(tmp_path / "source", tiny_config())
    plain = copies.plain_copy(str(source), tmp_path / "plain")
    moved = copies.plain_copy(str(source), tmp_path / "moved", copies.Rescaling(load_config(source)))
    assert not load_config(moved).quantized
    with CheckpointReader(plain) as one, CheckpointReader(moved) as other:
        for entry in entries(load_config(source)):
            assert entry.scale_name == entry.name or entry.scale_name not in one
        maker, reader = "layers.0.attn.wo_a.weight", "layers.0.attn.wo_b.weight"
        a, b = one.load(reader).double(), one.load(maker).double()
        c, d = other.load(reader).double(), other.load(maker).double()
        assert not torch.equal(a, c)
        # Every weight of the copy is rounded to bf16, by at most 2^-9 of itself, and in float32 before, by 2^-24.
        bound = (1 + 2**-9 + 2**-23) ** 2 - 1
        assert bool(((c @ d - a @ b).abs() <= bound * (a.abs() @ b.abs())).all())


def rows() -> list[dict[str, Any]]:
    """A row for each line of the picture, and a baseline."""
    sizes = {"weight_bytes": 4096, "weight_bytes_by_layout": {"e4m3": 4000, "bfloat16": 96},
             "state_bytes_per_request": 1024,
             "state_bytes_per_1024_tokens": 2048.0, "bits_per_byte": 1.0}  # fmt: skip
    figures = {"loss": 0.01, "loss_error": 0.001, "kl_mean": 0.002, "kl_p99": 0.03, "top1": 0.97, "recall": 0.9,
               "greedy_median": 8.5, "greedy_mean": 20.0, "stream_errors": [0.0, 0.01, 0.02, 0.03, 0.04]}  # fmt: skip
    made: list[dict[str, Any]] = [{"name": "bf16", "model": "shipped", "options": {"scheme": "bf16"}, **sizes}]
    return made + [
        {"name": name, "model": model, "options": {"scheme": name}, **sizes, **figures}
        for model, names in (
            ("shipped", ("mxfp4", "native", "fp8", "ptpc-fp8", "native --cache-rows bf16 --index-rows bf16", "none")),
            ("rescaled", ("mxfp4", "w4a8", "w4a8 --scales mse", "fp8", "ptpc-fp8")),
        )
        for name in names
    ]


def test_the_document_keeps_what_is_around_the_tables(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    report, page = bench["report"], tmp_path / "page.md"
    text = {"documents": 2, "tokens": 10, "bytes": 36, "prompts": 3, "prompt_tokens": 4, "answer_tokens": 5}
    machine = {"threads": 1, "cpu": "CPU", "torch": "2"}
    result = {"text": text, "machine": machine, "rows": rows()}
    page.write_text(f"# Page\n\nabove\n\n{report.BEGIN}\nold\n{report.END}\n\nbelow\n")
    report.write_document(page, result)
    once = page.read_text()
    assert once.startswith("# Page\n\nabove\n") and once.endswith("\nbelow\n") and "old" not in once
    assert "| native | 4.0 KiB | 1.0 + 2.0 | 1.0000 | +0.0100 ± 0.0010 |" in once
    report.write_document(page, result)
    assert page.read_text() == once


def test_the_picture_is_an_svg_with_a_line_for_each_scheme(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    bench["report"].write_picture(tmp_path / "p.svg", rows(), ("swa", "csa"))
    root = ET.parse(tmp_path / "p.svg").getroot()
    drawn = sum(map(len, bench["report"].DRAWN.values()))
    assert len(root.findall("{*}polyline")) == drawn
    assert {"layer 0, SWA", "layer 1, CSA", "1 %"} <= {text.text for text in root.findall("{*}text")}
