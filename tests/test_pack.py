"""Packing: what is written is what the recipes mean; an interruption costs the shard being written and nothing else."""

from __future__ import annotations

import ast
import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import atomc
from atomc.artifact.manifest import FileEntry
from atomc.artifact.shards import DTYPE_NAMES
from atomc.artifact.store import ArtifactError, artifact_hash, files_of, hash_file, remove_abandoned, writing
from atomc.compiler import Options, Result, compile_model
from atomc.errors import CheckpointError, RecipeError
from atomc.formats import FP8_TILE, MXFP4
from atomc.pack import (
    JOURNAL,
    Packed,
    Packing,
    Shelf,
    Weight,
    code_files,
    fingerprint,
    parts,
    plan_shards,
    shelf_of,
    weights_of,
)  # fmt: skip
from atomc.recipes import (
    Cast,
    Concat,
    Load,
    Part,
    Permute,
    Quantize,
    Recipe,
    Reshape,
    Slice,
    Stack,
    TensorSpec,
    evaluate,
    instantiate,
)
from tests.support.artifact import LIMITS, ONE_LAYER, write_checkpoint
from tests.support.cli import Cli
from tests.support.packing import (
    CALLS,
    EXPERTS,
    LAYERS,
    RECIPES,
    SHARD,
    Checkpoint,
    fails_at,
    interrupted,
    pack,
    read,
    shelved,
    some_tensors,
    weights,
)  # fmt: skip
from tests.support.tiny import same_bits


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    (tmp_path / "checkpoint").mkdir()
    return Checkpoint(tmp_path / "checkpoint", some_tensors())


# -- what is written ---------------------------------------------------------------------------------------------------


def test_every_weight_is_what_its_recipe_means(checkpoint: Checkpoint, tmp_path: Path) -> None:
    packed = pack(checkpoint, tmp_path / "a.atom")
    found = read(tmp_path / "a.atom")
    for region, prefix in CALLS:
        for name, recipe in RECIPES[region].items():
            expected = evaluate(instantiate(recipe, prefix), checkpoint.tensors.__getitem__)
            assert same_bits(found.pop(prefix + name), expected), prefix + name
    assert not found
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "a.atom" / "weights").iterdir()}
    assert {name: entry.bytes for name, entry in packed.files.items()} == sizes
    assert (packed.bytes, packed.shards, packed.resumed) == (sum(sizes.values()), len(sizes), 0)
    assert packed.mb_per_second > 0
    assert shelved(tmp_path / "a.atom") == []


def online(checkpoint: Checkpoint) -> list[Weight]:
    """Experts stacked and a plain weight, quantised when they are packed; the plain one's scales come first."""
    parts: list[Part] = ["codes", "scales"]
    names = [f"layers.0.experts.{e}.w1.weight" for e in range(EXPERTS)]
    recipes: dict[str, Recipe] = {
        f"experts.{part}": Stack(tuple(Quantize(Load(name), str(MXFP4), part, "mse") for name in names))
        for part in parts
    }
    recipes |= {f"embed.{part}": Quantize(Load("embed"), str(FP8_TILE), part) for part in reversed(parts)}
    return weights_of([("all", "")], {"all": recipes}, checkpoint.spec)


@pytest.mark.parametrize("size", [10, 10_000])  # a shard for each weight, and one for all
def test_a_weight_that_is_quantised_is_read_once(tmp_path: Path, size: int) -> None:
    tensors = {f"layers.0.experts.{e}.w1.weight": torch.randn(8, 64).bfloat16() for e in range(EXPERTS)}
    checkpoint = Checkpoint(tmp_path, tensors | {"embed": torch.randn(130, 16)})
    made = online(checkpoint)
    pack(checkpoint, tmp_path / "a.atom", made, size)
    assert sorted(checkpoint.loads) == sorted(checkpoint.tensors)
    found = read(tmp_path / "a.atom")
    for weight in made:
        assert same_bits(found[weight.name], evaluate(weight.recipe, checkpoint.tensors.__getitem__)), weight.name


def test_what_is_quantised_goes_on_after_an_interruption(tmp_path: Path) -> None:
    """The codes are there from before: nothing is kept for them, and their scales are made from the source again."""
    tensors = {f"layers.0.experts.{e}.w1.weight": torch.randn(8, 64).bfloat16() for e in range(EXPERTS)}
    checkpoint = Checkpoint(tmp_path, tensors | {"embed": torch.randn(130, 16)})
    made = online(checkpoint)
    pack(checkpoint, tmp_path / "whole.atom", made, 10)
    checkpoint.loads, checkpoint.fail = [], fails_at(EXPERTS + 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint, tmp_path / "a.atom", made, 10)
    checkpoint.loads, checkpoint.fail = [], lambda _: None
    assert pack(checkpoint, tmp_path / "a.atom", made, 10).resumed == 2
    assert checkpoint.loads == ["embed"]
    assert artifact_hash(tmp_path / "a.atom") == artifact_hash(tmp_path / "whole.atom")


ANY: list[Recipe] = [
    Stack((Stack((Load("a"), Load("b"))), Stack((Load("c"), Load("d"))))),
    Stack((Concat((Load("a"), Load("b")), 1), Concat((Load("c"), Load("d")), 1))),
    Stack((Load("a"), Load("b")), 1),
    Stack((Load("a"), Load("b")), -1),
    Stack((Load("a"), Load("b")), -3),
    Concat((Load("a"), Slice(Load("b"), 0, 1, 1), Slice(Load("c"), 0, 1, 3)), 0),
    Concat((Stack((Load("a"),)), Stack((Load("b"), Load("c")))), 0),
    Stack((Permute(Load("a"), (1, 0)), Permute(Load("b"), (1, 0)))),
    Permute(Stack((Load("a"), Load("b"))), (2, 0, 1)),
    Reshape(Concat((Load("a"), Load("b")), 0), (2, -1)),
    Reshape(Slice(Slice(Load("a"), 0, 1, 2), 1, 2, 3), ()),
    Stack((Reshape(Slice(Slice(Load("a"), 0, 1, 2), 1, 2, 3), ()),) * 2),
    Slice(Load("a"), 1, 2, 2),
]


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES), ids=DTYPE_NAMES.values())
def test_any_recipe_over_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    top = 2 if dtype == torch.bool else 256
    raw = [torch.randint(0, top, (3 * 5 * dtype.itemsize,), dtype=torch.uint8) for _ in "abcd"]
    source = Checkpoint(tmp_path, {n: r.view(dtype).reshape(3, 5) for n, r in zip("abcd", raw, strict=True)})
    made = weights_of([("r", "")], {"r": {str(i): recipe for i, recipe in enumerate(ANY)}}, source.spec)
    pack(source, tmp_path / "a.atom", made)
    found = read(tmp_path / "a.atom")
    for i, recipe in enumerate(ANY):
        assert same_bits(found[str(i)], evaluate(recipe, source.tensors.__getitem__)), recipe


def test_one_part_of_a_stack_is_held_and_files_are_unmapped(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atomc.pack.UNMAP_BYTES", 100)
    pack(checkpoint, tmp_path / "a.atom")
    assert checkpoint.most_alive == 1
    assert checkpoint.closed >= sum(t.nbytes for t in checkpoint.tensors.values()) // 500
    assert len(list(parts(weights(checkpoint)[2].recipe))) == 2 * EXPERTS


def test_progress_moves_with_every_part(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atomc.pack.MIB", 1)
    seen: list[tuple[str, int, int]] = []
    with Packing(tmp_path / "a.atom") as packing:
        made = weights(checkpoint)
        packing.pack(checkpoint, made, tmp_path / "weights", lambda *what: seen.append(what))
    total = sum(w.spec.nbytes for w in made)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1:] == (total, total)
    assert sum(stage == "pack (MiB) layers.1.w13.values" for stage, _, _ in seen) == 2 * EXPERTS


def test_shards_end_before_they_are_too_large() -> None:
    sizes = {"a": 60, "b": 40, "c": 1, "d": 250, "e": 30, "f": 0, "g": 70, "h": 1}
    made = [Weight(n, Load(n), TensorSpec((size,), torch.uint8)) for n, size in sizes.items()]
    plan = plan_shards(made, 100)
    assert ["".join(w.name for w in shard) for shard in plan.values()] == ["ab", "c", "d", "efg", "h"]
    assert list(plan) == [f"0000{i}.safetensors" for i in range(1, 6)]


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(checkpoint: Checkpoint, tmp_path: Path) -> tuple[str, list[str], Packed]:
    """Hash, loads and outcome of a packing that nothing interrupts."""
    packed = pack(checkpoint, tmp_path / "whole.atom")
    loads, checkpoint.loads = checkpoint.loads, []
    return artifact_hash(tmp_path / "whole.atom"), loads, packed


def test_an_interruption_anywhere_costs_one_shard(
    checkpoint: Checkpoint, tmp_path: Path, whole: tuple[str, list[str], Packed]
) -> None:
    digest, loads, packed = whole
    assert packed.shards >= 4
    resumed: set[int] = set()
    for at in range(1, len(loads) + 1):
        output = tmp_path / f"{at}.atom"
        error = interrupted(checkpoint, output, at, KeyboardInterrupt())
        left = shelved(output)
        finished = [name for name in left if name.endswith(".safetensors")]
        assert left == sorted([*finished, JOURNAL, "lock"] if finished else [])
        assert bool(finished) == bool(getattr(error, "__notes__", ()))
        assert not output.exists()
        again = pack(checkpoint, output)
        assert (again.shards, again.resumed) == (packed.shards, len(finished))
        assert again.bytes == sum(e.bytes for n, e in packed.files.items() if n not in finished)
        assert artifact_hash(output) == digest
        assert len(checkpoint.loads) < len(loads) or not finished
        assert shelved(output) == []
        resumed.add(len(finished))
    assert resumed == set(range(packed.shards))


def test_a_note_says_what_is_kept(checkpoint: Checkpoint, tmp_path: Path) -> None:
    error = interrupted(checkpoint, tmp_path / "a.atom", 12, OSError(errno.EIO, "Input/output error"))
    (note,) = error.__notes__
    assert note.startswith("kept: 1 shard of finished weights (")
    assert note.endswith(f" B) in {shelf_of(tmp_path / 'a.atom')}; the same compile goes on from there.")


def test_an_error_after_packing_keeps_all(
    checkpoint: Checkpoint, tmp_path: Path, whole: tuple[str, list[str], Packed]
) -> None:
    output = tmp_path / "a.atom"

    def fail() -> None:
        with Packing(output, SHARD) as packing, writing(output) as folder:
            packing.pack(checkpoint, weights(checkpoint), folder / "weights")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    checkpoint.loads = []
    packed = pack(checkpoint, output)
    assert (packed.bytes, packed.mb_per_second) == (0, 0)
    assert packed.resumed == packed.shards
    assert checkpoint.loads == []
    assert artifact_hash(output) == whole[0]


def other_recipe(checkpoint: Checkpoint, output: Path) -> Packed:
    made = weights(checkpoint)
    made[-1] = made[-1]._replace(recipe=Cast(Cast(Load(f"layers.{LAYERS - 1}.norm"), "float16"), "float32"))
    return pack(checkpoint, output, made)


def other_order(checkpoint: Checkpoint, output: Path) -> Packed:
    return pack(checkpoint, output, weights(checkpoint)[::-1])


def other_plan(checkpoint: Checkpoint, output: Path) -> Packed:
    return pack(checkpoint, output, size=SHARD * 2)


def other_time(checkpoint: Checkpoint, output: Path) -> Packed:
    os.utime(checkpoint.files[0], ns=(10**18, 10**18 + 1))
    return pack(checkpoint, output)


def other_header(checkpoint: Checkpoint, output: Path) -> Packed:
    """A tensor under another name: the file is as large as before."""
    renamed = {name.replace("0.norm", "0.nurm"): tensor for name, tensor in checkpoint.tensors.items()}
    save_file(renamed, checkpoint.files[0])
    os.utime(checkpoint.files[0], ns=(10**18, 10**18))
    return pack(checkpoint, output)


def other_name(checkpoint: Checkpoint, output: Path) -> Packed:
    checkpoint.files = (checkpoint.files[0].rename(checkpoint.files[0].with_name("other.safetensors")),)
    return pack(checkpoint, output)


def other_code(checkpoint: Checkpoint, output: Path) -> Packed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atomc.__version__", "0")
        return pack(checkpoint, output)


# What the modules that decide the bytes use of others: nothing that gives or moves a value of a tensor.
NO_BYTES = {
    "atomc": "the version",
    "atomc.errors": "errors",
    "atomc.artifact.facts": "how sizes are written out",
    "atomc.artifact.manifest": "names, hashes and sizes of files",
    "atomc.artifact.store": "hashes, errors",
    "atomc.models.deepseek_v4.config": "what tensors there should be",
}


def imported(file: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "atomc"}


def test_every_module_that_decides_bytes_is_in_the_fingerprint(repo_root: Path) -> None:
    root = repo_root / "atomc"
    files = code_files(root)
    names = {".".join(("atomc", *file.relative_to(root).with_suffix("").parts)) for file in files}
    known = {name.removesuffix(".__init__") for name in names}
    assert {"atomc.pack", "atomc.calibration", "atomc.models.deepseek_v4.reader"} <= known
    assert {name for file in files for name in imported(file)} <= known | set(NO_BYTES)


def test_a_change_of_any_such_module_is_another_fingerprint(
    checkpoint: Checkpoint, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = plan_shards(weights(checkpoint), SHARD)
    marks = {fingerprint(shards, checkpoint.files)}
    files = code_files(Path(atomc.__file__).parent)
    for changed in files:
        other = functools.partial(
            lambda changed, file: FileEntry("0", 0) if file == changed else hash_file(file), changed
        )
        monkeypatch.setattr("atomc.pack.hash_file", other)
        marks.add(fingerprint(shards, checkpoint.files))
    assert len(marks) == len(files) + 1


@pytest.mark.parametrize(
    "other", [other_recipe, other_order, other_plan, other_time, other_header, other_name, other_code]
)
def test_shards_of_something_else_are_discarded(
    checkpoint: Checkpoint, tmp_path: Path, other: Callable[[Checkpoint, Path], Packed]
) -> None:
    interrupted(checkpoint, tmp_path / "a.atom", 20, KeyboardInterrupt())
    assert "00001.safetensors" in shelved(tmp_path / "a.atom")
    assert other(checkpoint, tmp_path / "a.atom").resumed == 0
    assert shelved(tmp_path / "a.atom") == []


def test_a_compile_without_weights_discards_them_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    interrupted(checkpoint, tmp_path / "a.atom", 20, KeyboardInterrupt())
    with pytest.raises(SystemExit), Packing(tmp_path / "a.atom"):
        raise SystemExit
    assert "00001.safetensors" in shelved(tmp_path / "a.atom")
    with Packing(tmp_path / "a.atom"):
        pass
    assert shelved(tmp_path / "a.atom") == []


def flipped(shelf: Path) -> None:
    data = bytearray((shelf / "00001.safetensors").read_bytes())
    data[-1] ^= 1
    (shelf / "00001.safetensors").write_bytes(data)


def truncated(shelf: Path) -> None:
    os.truncate(shelf / "00001.safetensors", 100)


def removed(shelf: Path) -> None:
    (shelf / "00001.safetensors").unlink()


def strangers(shelf: Path) -> None:
    (shelf / "00009.safetensors").write_text("not in the journal")
    (shelf / "00002.safetensors.tmp").write_text("half")
    flipped(shelf)


@pytest.mark.parametrize("damage", [flipped, truncated, removed, strangers])
def test_a_damaged_shard_is_made_again(
    checkpoint: Checkpoint, tmp_path: Path, whole: tuple[str, list[str], Packed], damage: Callable[[Path], None]
) -> None:
    interrupted(checkpoint, tmp_path / "a.atom", 25, KeyboardInterrupt())
    finished = sum(name.endswith(".safetensors") for name in shelved(tmp_path / "a.atom"))
    assert finished >= 2
    damage(shelf_of(tmp_path / "a.atom"))
    assert pack(checkpoint, tmp_path / "a.atom").resumed == finished - 1
    assert artifact_hash(tmp_path / "a.atom") == whole[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fingerprint": "x"}', '{"fingerprint": 1, "shards": {}}', "\xff"])
def test_a_journal_that_cannot_be_read_is_discarded(
    checkpoint: Checkpoint, tmp_path: Path, whole: tuple[str, list[str], Packed], text: str
) -> None:
    interrupted(checkpoint, tmp_path / "a.atom", 25, KeyboardInterrupt())
    (shelf_of(tmp_path / "a.atom") / JOURNAL).write_bytes(text.encode("latin-1"))
    assert pack(checkpoint, tmp_path / "a.atom").resumed == 0
    assert artifact_hash(tmp_path / "a.atom") == whole[0]


@pytest.mark.slow
def test_a_killed_process_leaves_whole_shards(
    checkpoint: Checkpoint, tmp_path: Path, whole: tuple[str, list[str], Packed]
) -> None:
    """Killed in the middle of a shard: no handler runs."""
    code = (
        "import os, signal; from pathlib import Path\n"
        "from safetensors.torch import load_file\n"
        "from tests.support.packing import Checkpoint, pack\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "source = Checkpoint(folder / 'checkpoint', load_file(folder / 'checkpoint' / 'model.safetensors'))\n"
        "source.fail = lambda _: os.kill(os.getpid(), signal.SIGKILL) if len(source.loads) == 25 else None\n"
        "pack(source, folder / 'a.atom')\n"
    )
    root = Path(__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert ran.returncode == -signal.SIGKILL
    assert not (tmp_path / "a.atom").exists()
    left = shelved(tmp_path / "a.atom")
    assert len([name for name in left if name.endswith(".tmp")]) == 1
    assert pack(checkpoint, tmp_path / "a.atom").resumed == sum(name.endswith(".safetensors") for name in left) > 0
    assert artifact_hash(tmp_path / "a.atom") == whole[0]
    assert sorted(os.listdir(tmp_path)) == ["a.atom", "checkpoint", "whole.atom"]


# -- two at once -------------------------------------------------------------------------------------------------------


def test_two_packings_of_one_output_do_not_meet(
    checkpoint: Checkpoint, tmp_path: Path, whole: tuple[str, list[str], Packed]
) -> None:
    """The second begins in the middle of the first, and ends before it."""
    output, hashes = tmp_path / "a.atom", []

    def meanwhile(_: str) -> None:
        if len(checkpoint.loads) == 25:
            checkpoint.fail = lambda _: None
            before = shelved(output)
            assert pack(checkpoint, output).resumed == 0
            assert shelved(output) == before
            hashes.append(artifact_hash(output))

    checkpoint.fail = meanwhile
    pack(checkpoint, output)
    assert [*hashes, artifact_hash(output)] == [whole[0]] * 2
    assert sorted(os.listdir(tmp_path)) == ["a.atom", "checkpoint", "whole.atom"]
    assert files_of(output) == files_of(tmp_path / "whole.atom")


def test_a_shelf_that_cannot_be_locked_is_not_used(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[str, list[str], Packed]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    error = interrupted(checkpoint, tmp_path / "a.atom", 25, KeyboardInterrupt())
    assert not hasattr(error, "__notes__")
    assert pack(checkpoint, tmp_path / "a.atom").resumed == 0
    assert artifact_hash(tmp_path / "a.atom") == whole[0]


def test_a_disk_without_hard_links(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[str, list[str], Packed]
) -> None:
    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    pack(checkpoint, tmp_path / "a.atom")
    assert artifact_hash(tmp_path / "a.atom") == whole[0]
    assert shelved(tmp_path / "a.atom") == []


def test_the_artifact_has_its_shards_to_itself(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pack(checkpoint, tmp_path / "a.atom")
    assert {p.stat().st_nlink for p in (tmp_path / "a.atom" / "weights").iterdir()} == {1}


def test_a_shelf_on_its_way_out_is_swept_up_with_the_partial_folders(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    (tmp_path / f".a.atom.{int(dead.stdout)}.7.packing.partial").mkdir()
    shelf_of(tmp_path / "a.atom").mkdir()
    remove_abandoned(tmp_path / "a.atom")
    assert os.listdir(tmp_path) == [".a.atom.packing"]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_source_that_does_not_fit_its_recipe_is_refused_before_anything_is_written(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint.tensors["layers.1.experts.2.w1.weight"] = torch.ones(3, 16, dtype=torch.int8)
    with pytest.raises(RecipeError, match=r"weight layers\.1\.w13\.values: recipe step Stack over layers\.1\.experts"):
        pack(checkpoint, tmp_path / "a.atom")
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_source_that_is_not_what_it_was_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    made = weights(checkpoint)
    checkpoint.tensors["layers.0.experts.2.w1.weight"] = torch.ones(1, 16, dtype=torch.int8)
    message = r"weight layers\.0\.w13\.values of .* does not fit: 176 bytes were given, its header says 192.*changed"
    with pytest.raises(ArtifactError, match=message):
        pack(checkpoint, tmp_path / "a.atom", made)
    assert shelved(tmp_path / "a.atom") == ["00001.safetensors", JOURNAL, "lock"]


def test_a_weight_that_is_made_twice(checkpoint: Checkpoint) -> None:
    with pytest.raises(RecipeError, match=r"weight embed is made twice; two calls of the program share"):
        weights_of([*CALLS, CALLS[0]], RECIPES, checkpoint.spec)


def test_an_unreadable_source_is_said_as_the_reader_says_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    problem = CheckpointError("model", ["embed (model.safetensors): cannot be read (EIO)"])
    assert interrupted(checkpoint, tmp_path / "a.atom", 1, problem) is problem
    checkpoint.files[0].unlink()
    with pytest.raises(
        ArtifactError, match=r"model\.safetensors cannot be read \(No such file.*\); weights are packed"
    ):
        pack(checkpoint, tmp_path / "a.atom")
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_disk_that_will_be_full_is_said_first(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(w.spec.nbytes for w in weights(checkpoint))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 0, total - 1))  # type: ignore[attr-defined]
    with pytest.raises(ArtifactError, match=r"bytes of weights do not fit into the .* that are free\. Free disk space"):
        pack(checkpoint, tmp_path / "a.atom")
    assert checkpoint.loads == []
    assert os.listdir(tmp_path) == ["checkpoint"]
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 0, total))  # type: ignore[attr-defined]
    pack(checkpoint, tmp_path / "a.atom")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_keeps_what_is_whole(
    checkpoint: Checkpoint, tmp_path: Path, whole: tuple[str, list[str], Packed]
) -> None:
    output = tmp_path / "a.atom"

    def fill(_: str) -> None:
        if (shelf_of(output) / "00002.safetensors").exists():
            checkpoint.fail = lambda _: None
            (shelf_of(output) / "00004.safetensors.tmp").symlink_to("/dev/full")

    checkpoint.fail = fill
    with pytest.raises(ArtifactError, match=r"00004\.safetensors \(its end\): No space left on device\. Free disk"):
        pack(checkpoint, output)
    assert not output.exists()
    assert shelved(output) == [f"0000{i}.safetensors" for i in (1, 2, 3)] + [JOURNAL, "lock"]
    assert pack(checkpoint, output).resumed == 3
    assert artifact_hash(output) == whole[0]


# -- compiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_compile_is_the_same_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atomc.compiler.Packing", functools.partial(Packing, shard_bytes=60_000))
    model = write_checkpoint(tmp_path / "model", **ONE_LAYER)
    options = Options(max_context=320, max_batch_tokens=48, max_requests=4, max_logit_rows=40)

    def compiled(output: Path, stop: int) -> Result:
        def progress(stage: str, done: int, total: int) -> None:
            shards = len([name for name in shelved(output) if name.endswith(".safetensors")])
            if stage.startswith("pack") and shards == stop:
                raise KeyboardInterrupt

        return compile_model(str(model), "cpu", output, options, progress)

    whole = compiled(tmp_path / "whole.atom", -1)
    assert whole.packed is not None
    assert whole.packed.shards >= 3
    with pytest.raises(KeyboardInterrupt):
        compiled(tmp_path / "a.atom", 2)
    again = compiled(tmp_path / "a.atom", -1)
    assert again.packed is not None
    assert (again.packed.resumed, again.hash) == (2, whole.hash)
    assert sorted(os.listdir(tmp_path)) == ["a.atom", "model", "whole.atom"]


@pytest.mark.slow
def test_the_command_line_says_what_is_kept_and_what_was_taken_over(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atomc.compiler.Packing", functools.partial(Packing, shard_bytes=60_000))
    model = write_checkpoint(tmp_path / "model", **ONE_LAYER)
    record = Shelf.record

    def stop_after_two(self: Shelf, name: str, entry: FileEntry) -> None:
        record(self, name, entry)
        if name == "00002.safetensors":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Shelf, "record", stop_after_two)
        cli("compile", model, "-o", tmp_path / "a.atom", *LIMITS).failed(
            130, "kept: 2 shards of finished weights (", ".a.atom.packing; the same compile goes on", "interrupted."
        )
    packed = cli("compile", model, "-o", tmp_path / "a.atom", *LIMITS, "--json").json["packed"]
    assert packed["resumed_shards"] == 2
    ran = cli("compile", model, "-o", tmp_path / "b.atom", *LIMITS)
    assert f"{packed['shards']} shards, " in ran.out and " MB/s)" in ran.out
