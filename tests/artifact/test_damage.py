"""Damaged and foreign artifacts: each file truncated, changed by one bit, removed; links, escapes, edited manifests."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atomc.artifact.store import MANIFEST, ArtifactError, files_of, read_manifest, verify
from atomc.runtime.loader import load
from tests.support.sealed import copy_of, edit, reseal


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, truncate, empty, Path.unlink])
def test_every_file_is_needed_bit_by_bit(artifact: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = copy_of(artifact, tmp_path)
    for name in files_of(artifact):
        damage(folder / name)
        with pytest.raises(ArtifactError) as raised:
            load(folder)
        assert name in raised.value.message
        assert "1 problem" in raised.value.message
        shutil.copyfile(artifact / name, folder / name)
    load(folder)


def test_a_damaged_manifest_is_refused(artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(artifact, tmp_path)
    whole = (artifact / MANIFEST).read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 3):
        (folder / MANIFEST).write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=r"manifest\.json is not a valid"):
            load(folder)
    for text in (b"\xff\xfe", b"[" * 100_000, b"null", b"{}", b'{"schema": "1"}', b'{"schema": 4}'):
        (folder / MANIFEST).write_bytes(text)
        with pytest.raises(ArtifactError, match=r"manifest\.json is not a valid"):
            load(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=r"not a whole artifact"):
        load(folder)


def test_one_bit_of_the_manifest_is_found(artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(artifact, tmp_path)
    whole = (artifact / MANIFEST).read_bytes()
    for _ in range(300):
        (folder / MANIFEST).write_bytes(whole)
        flip(folder / MANIFEST)
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            read_manifest(folder)


def test_another_spelling_of_the_manifest_is_not_the_manifest(artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(artifact, tmp_path)
    value = json.loads((folder / MANIFEST).read_bytes())
    for text in (json.dumps(value), json.dumps(value, indent=2) + "\n\n"):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(ArtifactError, match="it is not as it was written"):
            read_manifest(folder)


def test_what_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not an artifact folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="not a whole artifact"):
        load(tmp_path)


def test_foreign_files_are_refused(artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(artifact, tmp_path)
    (folder / "plan" / "extra.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"plan/extra\.json: not part of the artifact"):
        load(folder)


@pytest.mark.parametrize("what", ["file", "folder", "manifest", "dangling", "pipe"])
def test_links_and_special_files_are_refused(artifact: Path, tmp_path: Path, what: str) -> None:
    folder = copy_of(artifact, tmp_path)
    match what:
        case "file":
            (folder / "config.json").unlink()
            (folder / "config.json").symlink_to(artifact / "config.json")
        case "folder":
            shutil.rmtree(folder / "plan")
            (folder / "plan").symlink_to(artifact / "plan", target_is_directory=True)
        case "manifest":
            (folder / MANIFEST).unlink()
            (folder / MANIFEST).symlink_to(artifact / MANIFEST)
        case "dangling":
            (folder / "x").symlink_to("nowhere")
        case _:
            os.mkfifo(folder / "x")
    with pytest.raises(ArtifactError, match=r"is a link|is no regular file"):
        load(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "plan/../config.json", "./config.json", "a//b", ""])
def test_paths_that_leave_the_artifact_are_refused(artifact: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(artifact, tmp_path)
    (tmp_path / "outside").write_text("x")

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}

    edit(folder, MANIFEST, change)
    with pytest.raises(ArtifactError, match="not a path inside the artifact"):
        load(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schema", 5, "schema 5; this atomc reads 4"),
        ("target", "mi355x", "do not go together"),
        ("arch", "gfx950", "do not go together"),
        ("with_weights", False, "--no-weights"),
        ("config_sha256", "0" * 64, "not the hash of config.json"),
        ("limits", {"max_context": 1}, "not a valid Manifest"),
        ("surprise", 1, "unknown field"),
    ],
)
def test_manifest_fields(artifact: Path, tmp_path: Path, field: str, value: object, message: str) -> None:
    folder = copy_of(artifact, tmp_path)
    edit(folder, MANIFEST, lambda manifest: manifest.update({field: value}))
    with pytest.raises(ArtifactError) as raised:
        load(folder)
    assert message in raised.value.message


def test_an_artifact_for_another_machine(artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(artifact, tmp_path)
    edit(folder, MANIFEST, lambda manifest: manifest.update({"target": "mi300x", "arch": "gfx942"}))
    with pytest.raises(ArtifactError, match=r"compiled for mi300x \(gfx942\), and this machine has"):
        load(folder)


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("max_batch_tokens", 4096), ("max_requests", 1000), ("window", 10_000), ("window_page", 0), ("csa_ratio", -4),
        ("csa_ratio", 8), ("hca_ratio", 24), ("window_table_width", 1), ("block_table_width", 100), ("vocab_size", 9),
        ("max_context", 1 << 20), ("block_tokens", 0),
    ],
)  # fmt: skip
def test_serving_facts_that_the_plan_does_not_have(artifact: Path, tmp_path: Path, fact: str, value: int) -> None:
    folder = copy_of(artifact, tmp_path)

    def change(manifest: dict[str, Any]) -> None:
        manifest["serving"][fact] = value
        if fact in manifest["limits"]:
            manifest["limits"][fact] = value

    edit(folder, MANIFEST, change)
    with pytest.raises(ArtifactError, match="the plan cannot run"):
        load(folder)


def test_weights_that_are_no_safetensors(artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(artifact, tmp_path)
    shard = next((folder / "weights").iterdir())
    for data in (b"", b"\x00" * 64, shard.read_bytes()[:-1]):
        shard.write_bytes(data)
        reseal(folder)
        with pytest.raises(ArtifactError, match="cannot be read"):
            load(folder)


def test_a_tensor_in_two_files(artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(artifact, tmp_path)
    shard = next((folder / "weights").iterdir())
    shutil.copyfile(shard, shard.with_name("99999.safetensors"))
    reseal(folder)
    with pytest.raises(ArtifactError, match="is in two files"):
        load(folder)


def test_verify_reports_all_problems_at_once(artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(artifact, tmp_path)
    (folder / "config.json").unlink()
    flip(folder / "report.md")
    (folder / "stray").write_text("x")
    with pytest.raises(ArtifactError) as raised:
        verify(folder, read_manifest(folder))
    for part in ("3 problems", "config.json: missing", "report.md: ", "stray: not part"):
        assert part in raised.value.message


def test_the_manifest_lists_every_file(artifact: Path) -> None:
    manifest = json.loads((artifact / MANIFEST).read_bytes())
    assert sorted(manifest["files"]) == files_of(artifact)
