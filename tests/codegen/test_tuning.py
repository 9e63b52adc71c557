"""Tuned configurations: which entry a bucket takes, what is said of it, and that the tables are what they say."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import msgspec
import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")

from atomc.codegen.device import Recorder
from atomc.codegen.kernels import gemm
from atomc.codegen.kernels.gemm import Tiles
from atomc.codegen.tuning import FOLDER, STATIC, Entry, Table, table_of, trial, tuned
from atomc.targets import TARGETS, get_target
from benchmarks.tune import write

HEAD = {"n": 129280, "k": 4096, "groups": 1, "x": "bf16", "w": "bf16"}


NEAREST = [(16, 16), (8, 16), (64, 64), (65, 256), (200, 256), (600, 1024), (32768, 8192)]
UNKNOWN = [(1 << 20, {}), (1, {}), (16, {"n": 129281}), (16, {"groups": 2}), (16, {"x": "fp32"})]


@pytest.mark.parametrize(("tokens", "entry"), NEAREST)
def test_a_bucket_takes_the_nearest_entry(tokens: int, entry: int) -> None:
    table = table_of(get_target("h100"))
    assert table is not None
    known = {e.tokens: e.config for e in table.entries if e.problem == HEAD and e.kernel == "gemm"}
    assert tuned(get_target("h100"), "gemm", tokens, HEAD) == (
        known[entry],
        f"tuned on {table.device} with Triton {table.triton}",
    )


@pytest.mark.parametrize(("tokens", "change"), UNKNOWN)
def test_what_nobody_measured_is_the_static_models(tokens: int, change: dict[str, int | str]) -> None:
    assert tuned(get_target("h100"), "gemm", tokens, {**HEAD, **change}) is None


def test_a_gpu_without_a_table_takes_that_of_its_instruction_set() -> None:
    assert tuned(get_target("h200"), "gemm", 16, HEAD) == tuned(get_target("h100"), "gemm", 16, HEAD)
    for name in ("mi355x", "mi300x", "b200"):
        assert tuned(get_target(name), "gemm", 16, HEAD) is None


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_a_table_is_of_its_gpu_and_its_configurations_are_whole(path: object) -> None:
    name = path.stem  # type: ignore[attr-defined]
    table = table_of(TARGETS[name])
    assert table is not None and table.target == name and table.entries
    names = {f.name for f in fields(Tiles)} - {"origin"}
    for entry in table.entries:
        assert set(entry.config) == names and 0 < entry.seconds <= entry.static_seconds
        assert Tiles(**entry.config).rows in (64, 128, 256)  # type: ignore[arg-type]
    keys = [(e.kernel, tuple(sorted(e.problem.items())), e.tokens) for e in table.entries]
    assert len(keys) == len(set(keys))


def linear(tokens: int, n: int, k: int) -> tuple[Recorder, Tiles]:
    device = Recorder(get_target("h100"), tokens)
    x, w = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((tokens, k), (n, k)))
    gemm.linear(device, x, w)
    return device, gemm.choose(device, "gemm", n, k, 2, 1, "bf16", "bf16")


def test_a_trial_takes_the_place_of_the_table() -> None:
    _, table = linear(16, 2048, 4096)
    assert table.origin.startswith("tuned on")
    with trial("gemm", None):
        _, static = linear(16, 2048, 4096)
    assert static.origin == STATIC
    mine = {f.name: getattr(table, f.name) for f in fields(Tiles) if f.name != "origin"} | {"splits": 2}
    with trial("gemm", mine):
        device, tiles = linear(16, 2048, 4096)
    assert (tiles.splits, tiles.origin) == (2, "trial")
    assert dict(device.launches[0][0].constants)["SPLITS"] == 2


def test_a_second_run_is_put_beside_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr("sys.argv", ["tune", "--models", "m"])
    path = tmp_path / "tuned" / "h100.json"
    first, second, again = (
        Entry("gemm", {"n": n}, 16, {"rows": rows}, 1e-6, 2e-6) for n, rows in [(1, 64), (2, 64), (1, 32)]
    )
    write(path, "h100", [first, second])
    write(path, "h100", [again])
    table = msgspec.json.decode(path.read_bytes(), type=Table)
    assert table.entries == [again, second]
    assert table.commands == ["benchmarks/tune.py --models m"] * 2
