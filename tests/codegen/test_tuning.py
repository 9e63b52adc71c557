"""Tuned configurations: which entry a bucket takes, what is said of it, and that the tables are what they say."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")

from atomc.codegen import tuning
from atomc.codegen.device import Recorder
from atomc.codegen.kernels import gemm
from atomc.codegen.kernels.gemm import Tiles
from atomc.codegen.kernels.moe_config import Config, Part
from atomc.codegen.tuning import FOLDER, STATIC, Entry, Table, table_of, trial, tuned
from atomc.targets import TARGETS, get_target
from benchmarks import tune_experts
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
        assert 0 < entry.seconds <= entry.static_seconds
        if entry.kernel == "experts":
            assert Config.of(entry.config, "").table == entry.config
        else:
            assert set(entry.config) == names
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


class Origins(Recorder):
    """Keeps who chose each launch."""

    def launch(self, kernel: Any, grid: Any, args: Any, constants: Any, *rest: Any, **more: Any) -> None:
        super().launch(kernel, grid, args, constants, *rest, **more)
        origin = rest[2] if len(rest) > 2 else more.get("origin", STATIC)
        self.origins = {
            **getattr(self, "origins", {}),
            kernel.fn.__name__: (origin, dict(self.launches[-1][0].constants)),
        }


@pytest.mark.parametrize("tokens", [16, 64])
def test_experts_take_what_was_measured_for_them(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    problem = next(p for p in tune_experts.problems(["deepseek-v4-flash"]) if p.tokens == tokens)
    config = Config(8, Part(64, 4, 5, splits=2, blocks=2), Part(32, 2, 3), fused=False)
    entry = Entry("experts", problem.key, tokens, config.table, 1.0, 1.0)
    monkeypatch.setattr(tuning, "table_of", lambda _: Table("h100", "this", "", "3", [], "", [entry]))
    device = Origins(get_target("h100"), tokens)
    problem.calls(device, 2, "meta")[0]()
    told = "tuned on this with Triton 3"
    origin, constants = device.origins["experts_in"]
    assert origin == told and (constants["BM"], constants["BN"], constants["BK"], constants["SPLIT"]) == (8, 64, 256, 2)
    origin, constants = device.origins["experts_out"]
    assert origin == told and (constants["BM"], constants["BN"], constants["BK"]) == (8, 32, 128)
    assert device.origins["inner_rows"][0] == told and device.origins["inner_rows"][1]["SPLIT"] == 2
    assert device.origins["sort_few"][1]["BM"] == 8
    assert [(v.warps, v.stages) for v in device.variants if v.name in tune_experts.PRODUCTS] == [(4, 5), (2, 3)]


def test_candidates_of_experts_begin_with_the_static_model() -> None:
    for problem in tune_experts.problems(["deepseek-v4-flash", "deepseek-v4-pro"]):
        device = Recorder(get_target("h100"), problem.tokens)
        found = problem.candidates(device)
        assert found[0].origin == STATIC and len(found) == len(set(found)) > 4
        with trial("experts", found[-1].table):
            problem.calls(device, 1, "meta")[0]()
        launched = {variant.name: dict(variant.constants) for variant in device.variants}
        assert launched["experts_in"]["BN"] == found[-1].first.rows
        assert launched["experts_out"]["BN"] == found[-1].second.rows


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
