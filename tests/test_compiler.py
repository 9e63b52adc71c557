"""`compile_model`: what it refuses, what it leaves behind, and that equal inputs give equal bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from atomc.artifact.kernels import check_kernels, read_kernels
from atomc.artifact.store import MANIFEST, ArtifactError, artifact_hash, files_of, read_manifest
from atomc.codegen import hosts
from atomc.codegen.aot import Store
from atomc.codegen.missing import MissingKernelsError, is_view, missing_kernels
from atomc.compiler import CompileError, Options, Result, compile_model
from atomc.errors import AtomcError
from atomc.runtime.loader import load, read_plan
from atomc.targets import get_target
from tests.support.artifact import ONE_LAYER, write_checkpoint

SMALL = Options(max_context=320, max_batch_tokens=48, max_requests=4, max_logit_rows=40)
PLAN_ONLY = replace(SMALL, with_weights=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("one") / "checkpoint", **ONE_LAYER)


def compiled(checkpoint: Path, output: Path, options: Options = PLAN_ONLY, target: str = "cpu") -> Result:
    return compile_model(str(checkpoint), target, output, options)


# -- refusals before any work ------------------------------------------------------------------------------------------


def no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be refused at once must be."""

    def trace(*_: object) -> None:
        raise AssertionError("the model was captured before the error")

    monkeypatch.setattr("atomc.compiler.trace", trace)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_context": -1}, "--max-context -1 is out of range: 1 to 4096"),
        ({"max_context": 4097}, "--max-context 4097 is out of range: 1 to 4096"),
        ({"max_batch_tokens": 0}, "--max-batch-tokens 0 is out of range"),
        ({"max_requests": 0}, "--max-requests 0 is out of range"),
        ({"max_requests": 49}, "--max-requests 49 exceeds --max-batch-tokens 48"),
        ({"max_logit_rows": 49}, "--max-logit-rows 49 is out of range: 1 to 48"),
        ({"dtype": "float8"}, "--dtype float8 is unknown; choose one of float32, bfloat16"),
        ({"stop_after": "nothing"}, "--stop-after nothing: no such pass; choose one of canonicalize, "),
    ],
)
def test_options_that_no_compile_satisfies(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, int | str], message: str
) -> None:
    no_capture(monkeypatch)
    with pytest.raises(CompileError) as raised:
        compiled(checkpoint, tmp_path / "a.atom", replace(SMALL, **change))  # type: ignore[arg-type]
    assert message in raised.value.message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("model", ["nothing", "deepseek-v4-flash"])
def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    no_capture(monkeypatch)
    with pytest.raises(AtomcError, match=r"neither a checkpoint folder nor|a configuration without weights"):
        compile_model(model, "cpu", tmp_path / "a.atom", SMALL)
    assert os.listdir(tmp_path) == []


def test_an_unknown_target(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_capture(monkeypatch)
    with pytest.raises(AtomcError, match="abacus"):
        compiled(checkpoint, tmp_path / "a.atom", target="abacus")


@pytest.mark.parametrize("kind", ["file", "folder", "below a file"])
def test_outputs_that_are_in_the_way(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    no_capture(monkeypatch)
    output = tmp_path / "thing"
    if kind == "folder":
        output.mkdir()
        (output / "mine").write_text("x")
    else:
        output.write_text("mine")
    target = output / "a.atom" if kind == "below a file" else output
    with pytest.raises(ArtifactError, match=r"exists and is not an artifact|is not a folder that you can write"):
        compiled(checkpoint, target)
    assert os.listdir(tmp_path) == ["thing"]
    assert (output / "mine").exists() if kind == "folder" else output.read_text() == "mine"


# -- kernels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["mi355x", "h100"])
def test_missing_kernels_are_listed_and_nothing_is_written(
    checkpoint: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {"atom.moe_experts.default", "aten.bmm.default", "aten.reshape.default"}
    for op in expected:
        monkeypatch.delitem(hosts.HOSTS, op)
    with pytest.raises(MissingKernelsError) as raised:
        compiled(checkpoint, tmp_path / "gpu.atom", replace(PLAN_ONLY, scheme="none"), target=target)
    assert os.listdir(tmp_path) == []
    assert {m.op for m in raised.value.missing} == expected
    lines = raised.value.message.splitlines()
    assert lines[0] == f"target {target}: no kernel for {len(expected)} operators, so nothing was written:"
    found = {words[0]: int(words[1]) for words in (line.split() for line in lines[1:-1])}
    assert found == dict.fromkeys(expected, 1)


@pytest.mark.parametrize("target", ["mi355x", "h100"])
def test_an_artifact_for_a_gpu_has_every_kernel_that_its_plan_launches(
    checkpoint: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")
    store = Store(tmp_path / "store")
    monkeypatch.setattr("atomc.compiler.default_store", lambda: store)
    folder, options = tmp_path / "gpu.atom", replace(SMALL, scheme="native", max_batch_tokens=16, max_logit_rows=16)
    built = compiled(checkpoint, folder, options, target=target)
    facts, launched, computed = read_kernels(folder), set(), 0
    assert built.kernels == facts
    for region in built.regions.values():
        assert missing_kernels(region, get_target(target)) == []
        for step in region.steps:
            launched |= {launch.kernel for bucket in step.buckets for launch in bucket.every_launch}
            computed += bool(step.buckets)
            assert [b.tokens for b in step.buckets] in ([], [16])
            assert step.buckets or is_view(step, region), step.op
            made = [slot for slot in step.outputs if slot is not None and step.buckets]
            assert all(region.slots[s].offset is not None or s in region.outputs.values() for s in made), step.op
    assert computed > 30 and launched == set(facts)
    generated = [(folder / "kernels" / f"{key}.py").exists() for key in facts]
    assert 5 < sum(generated) < len(facts) / 2
    for key, known in facts.items():
        assert (folder / "kernels" / f"{key}.bin").read_bytes()[:4] == b"\x7fELF"
        assert known.target == target and known.spills == 0 and known.shared <= get_target(target).shared_bytes

    check_kernels(folder, built.regions)

    def never(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr("atomc.codegen.aot.build", never)
    again = compiled(checkpoint, tmp_path / "again.atom", options, target=target)
    assert again.hash == built.hash


# -- plans without weights, and parts of a compile ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_plan_without_weights_is_the_same_plan(checkpoint: Path, tmp_path: Path) -> None:
    whole = compiled(checkpoint, tmp_path / "whole.atom", SMALL)
    plan = compiled(checkpoint, tmp_path / "plan.atom")
    changed = differing(tmp_path / "whole.atom", tmp_path / "plan.atom")
    assert changed == {MANIFEST, "weights/00001.safetensors"}
    assert whole.hash != plan.hash
    with pytest.raises(ArtifactError, match="--no-weights and can only be inspected"):
        load(tmp_path / "plan.atom")
    assert read_plan(tmp_path / "plan.atom") == read_plan(tmp_path / "whole.atom")


def test_stopping_after_a_pass_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    result = compiled(checkpoint, tmp_path / "a.atom", replace(PLAN_ONLY, stop_after="canonicalize"))
    assert (result.output, result.hash) == (None, None)
    assert {row.name for table in result.explanation.values() for row in table} == {"canonicalize"}
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_dumping_graphs_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    plain = compiled(checkpoint, tmp_path / "plain.atom")
    dumped = compiled(checkpoint, tmp_path / "dumped.atom", replace(PLAN_ONLY, dump_ir=tmp_path / "ir"))
    assert plain.hash == dumped.hash
    assert sorted(p.name for p in (tmp_path / "ir").iterdir()) == sorted(plain.regions)


@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.param(MemoryError, marks=pytest.mark.slow)])
def test_an_interrupted_compile_leaves_nothing(checkpoint: Path, tmp_path: Path, error: type[BaseException]) -> None:
    seen: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "pack (MiB) norm.weight":
            seen.extend(p.name for p in tmp_path.rglob("*.partial"))
            raise error

    with pytest.raises(error):
        compile_model(str(checkpoint), "cpu", tmp_path / "a.atom", SMALL, progress)
    assert seen == [f".a.atom.{os.getpid()}.0.partial"]
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_what_a_killed_compile_left_is_removed_by_the_next(checkpoint: Path, repo_root: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from atomc.compiler import Options, compile_model\n"
        "kill = lambda stage, *_: os._exit(9) if stage.startswith('pack') else None\n"
        f"compile_model({str(checkpoint)!r}, 'cpu', Path({str(tmp_path / 'a.atom')!r}), Options(), kill)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path.parent, env=isolated(repo_root), capture_output=True
    )
    assert ran.returncode == 9, ran.stderr.decode()
    assert {Path(left).suffix for left in os.listdir(tmp_path)} == {".packing", ".partial"}
    compiled(checkpoint, tmp_path / "a.atom")
    assert os.listdir(tmp_path) == ["a.atom"]


def isolated(package: Path) -> dict[str, str]:
    """What another process of a test is given: the package at `package`, one thread, and nothing else of this one."""
    return {"PATH": os.defpath, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}


# -- equal inputs, equal bytes -----------------------------------------------------------------------------------------


def differing(a: Path, b: Path) -> set[str]:
    """Files that are not the same in two artifacts."""
    names = {*files_of(a), *files_of(b), MANIFEST}
    return {
        n for n in names if not ((a / n).exists() and (b / n).exists() and (a / n).read_bytes() == (b / n).read_bytes())
    }


def apart(package: Path, checkpoint: Path, output: Path, seed: str) -> None:
    """Compile in another process, folder and hash seed, with the package at `package`."""
    code = (
        "import sys; from pathlib import Path; import atomc\n"
        "from atomc.compiler import Options, compile_model\n"
        f"assert Path(atomc.__file__).is_relative_to({str(package)!r}), atomc.__file__\n"
        f"options = Options(max_context=320, max_batch_tokens=48, max_requests=4, max_logit_rows=40)\n"
        f"compile_model({checkpoint.name!r}, 'cpu', Path({str(output)!r}), options)\n"
    )
    environment = {**isolated(package), "PYTHONHASHSEED": seed, "COLUMNS": "40", "LANG": "C"}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=checkpoint.parent, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_equal_inputs_give_equal_bytes_everywhere(checkpoint: Path, repo_root: Path, tmp_path: Path) -> None:
    """Another process, working folder, hash seed, copy of the checkpoint, copy of the compiler: one hash."""
    here = compiled(checkpoint, tmp_path / "here.atom", SMALL)
    package = tmp_path / "a copy" / "of the house"
    for room in ("atomc", "passes", "codegen", "runtime", "models"):
        ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(repo_root / room, package / room, symlinks=True, ignore=ignore)
    moved = shutil.copytree(checkpoint, tmp_path / "else" / "where" / checkpoint.name)
    for seed in ("1", "4294967295"):
        apart(package, moved, tmp_path / f"{seed}.atom", seed)
        assert differing_facts(tmp_path / "here.atom", tmp_path / f"{seed}.atom") == set()
        assert artifact_hash(tmp_path / f"{seed}.atom") == here.hash


def test_no_file_names_a_place_of_this_machine(checkpoint: Path, repo_root: Path, tmp_path: Path) -> None:
    compiled(checkpoint, tmp_path / "a.atom")
    places = {str(p) for p in (repo_root, tmp_path, checkpoint.parent, Path(sys.prefix), Path.home())}
    for name in files_of(tmp_path / "a.atom"):
        text = (tmp_path / "a.atom" / name).read_text()
        assert not [p for p in places if len(p) > 1 and p in text], name
        assert "site-packages" not in text, name


ALL_PLANS = {"plan/program.json", "plan/prologue.json", "plan/layer_swa_hash.json", "plan/head.json"}
QUANTISED = {"plan/program.json", "plan/layer_swa_hash.json", "graph/layer_swa_hash.py", "explain.json", "layouts.json",
             "weights/00001.safetensors"}  # fmt: skip
ALL_GRAPHS = {"graph/prologue.py", "graph/layer_swa_hash.py", "graph/head.py"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "may_differ"),
    [
        (
            lambda o: replace(o, dtype="bfloat16"),
            ALL_PLANS | ALL_GRAPHS | {"explain.json", "layouts.json"},
        ),
        (lambda o: replace(o, scheme="fp8"), QUANTISED),
        (lambda o: replace(o, index_rows="fp8"), set()),  # this model has none
        (lambda o: replace(o, rows="bf16"), QUANTISED - {"weights/00001.safetensors"}),
        (lambda o: replace(o, scales="mse"), set()),  # nothing is quantised anew
        (lambda o: replace(o, max_context=640), ALL_GRAPHS | {"plan/layer_swa_hash.json"}),
        (lambda o: replace(o, max_batch_tokens=64), ALL_PLANS | ALL_GRAPHS),
        (lambda o: replace(o, max_requests=5), {"plan/program.json", "plan/prologue.json"}),
        (lambda o: replace(o, max_logit_rows=41), {"plan/program.json", "plan/head.json"}),
        (lambda o: replace(o, with_weights=False), {"weights/00001.safetensors"}),
    ],
    ids=[
        "dtype",
        "scheme",
        "index_rows",
        "rows",
        "scales",
        "max_context",
        "max_batch_tokens",
        "max_requests",
        "max_logit_rows",
        "no_weights",
    ],
)
def test_one_changed_flag_changes_only_what_it_should(
    checkpoint: Path, tmp_path: Path, change: Callable[[Options], Options], may_differ: set[str]
) -> None:
    """`manifest.json` states the flag; `report.md` states sizes. Everything else is in the list."""
    compiled(checkpoint, tmp_path / "a.atom", SMALL)
    compiled(checkpoint, tmp_path / "b.atom", change(SMALL))
    found = differing(tmp_path / "a.atom", tmp_path / "b.atom")
    assert MANIFEST in found
    assert found <= may_differ | {MANIFEST, "report.md"}
    same = differing_facts(tmp_path / "a.atom", tmp_path / "b.atom")
    changed = {"dtype", "scheme", "scales", "limits", "serving", "with_weights", "passes", "recipes", "files", "seal"}
    assert same <= changed


def differing_facts(a: Path, b: Path) -> set[str]:
    """Fields of the manifest that are not the same."""
    left, right = (json.loads((folder / MANIFEST).read_bytes()) for folder in (a, b))
    return {name for name in left if left[name] != right[name]}


@pytest.mark.slow
def test_the_name_of_the_folder_is_the_name_of_the_model(checkpoint: Path, tmp_path: Path) -> None:
    renamed = shutil.copytree(checkpoint, tmp_path / "mine")
    compiled(checkpoint, tmp_path / "a.atom")
    compiled(renamed, tmp_path / "b.atom")
    assert differing(tmp_path / "a.atom", tmp_path / "b.atom") == {MANIFEST, "report.md"}
    assert read_manifest(tmp_path / "b.atom").serving.model_name == "mine"
