"""Artifacts on disk: whole or not there; what was written last wins; leftovers of the dead are removed."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from atomc.artifact.store import MANIFEST, ArtifactError, check_output, files_of, remove_abandoned, writing


def write(target: Path, text: str = "new") -> None:
    with writing(target) as folder:
        (folder / MANIFEST).write_text(text)


@contextmanager
def interrupted(target: Path, error: type[BaseException] | BaseException) -> Iterator[None]:
    """Half an artifact, then an error."""
    with writing(target) as folder:
        (folder / "half").write_text("x")
        yield
        raise error


def test_a_block_that_ends_becomes_the_artifact(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "a.atom")
    assert (tmp_path / "deep" / "a.atom" / MANIFEST).read_text() == "new"
    assert os.listdir(tmp_path / "deep") == ["a.atom"]


def test_an_older_artifact_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.atom"
    write(target, "old")
    (target / "extra").write_text("x")
    write(target)
    assert files_of(target) == []
    assert (target / MANIFEST).read_text() == "new"
    assert os.listdir(tmp_path) == ["a.atom"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_block_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.atom"
    write(target, "old")
    with pytest.raises(error), interrupted(target, error):
        pass
    assert (target / MANIFEST).read_text() == "old"
    assert os.listdir(tmp_path) == ["a.atom"]


def test_an_older_artifact_comes_back_if_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.atom"
    write(target, "old")
    rename = Path.rename

    def fails(self: Path, to: Path) -> Path:
        if to == target and self.name.endswith(".0.partial"):
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ArtifactError, match="cannot write"):
        write(target)
    assert (target / MANIFEST).read_text() == "old"
    assert os.listdir(tmp_path) == ["a.atom"]


def test_errors_of_the_block_itself_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path / "a.atom"):
        (tmp_path / "no such file").read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device")
    message = r"cannot write .* No space left on device\. Free disk space"
    with pytest.raises(ArtifactError, match=message), interrupted(tmp_path / "a.atom", full):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling"])
def test_anything_else_is_left_alone(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "thing"
    match kind:
        case "file":
            target.write_text("mine")
        case "folder":
            target.mkdir()
        case "link":
            target.symlink_to(tmp_path)
        case _:
            target.symlink_to(tmp_path / "nowhere")
    before = target.lstat()
    for attempt in (check_output, write):
        with pytest.raises(ArtifactError, match="exists and is not an artifact"):
            attempt(target)
    assert target.lstat() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(ArtifactError, match="not a folder that you can write"):
            check_output(tmp_path / "deep" / "a.atom")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="not a folder that you can write"):
        check_output(tmp_path / "file" / "a.atom")


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    names = {
        "dead": f".a[1].atom.{int(dead.stdout)}.0.partial",
        "alive": f".a[1].atom.{os.getpid()}.0.partial",
        "old": f".a[1].atom.{int(dead.stdout)}.0.old.partial",
        "other": f".b.atom.{int(dead.stdout)}.0.partial",
        "strange": ".a[1].atom.x.partial",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
    remove_abandoned(tmp_path / "a[1].atom")
    assert set(os.listdir(tmp_path)) == {names["alive"], names["other"], names["strange"]}


def test_two_writers_of_one_place_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "a.atom"
    with writing(target) as first, writing(target) as second:
        assert first != second
        (first / MANIFEST).write_text("first")
        (second / MANIFEST).write_text("second")
    assert (target / MANIFEST).read_text() == "first"
    assert os.listdir(tmp_path) == ["a.atom"]
