"""Artifacts on disk: written beside and renamed whole, read back only when every byte is what the manifest says."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from atomc.artifact.manifest import SCHEMA_VERSION, FileEntry, Manifest
from atomc.errors import AtomcError

MANIFEST = "manifest.json"
CHUNK = 1 << 22
T = TypeVar("T")


class ArtifactError(AtomcError):
    """An artifact that cannot be read or written; the message names the file and what is wrong with it."""


def encode(value: object) -> bytes:
    """Canonical, readable JSON: struct order, sorted dict keys, two-space indent."""
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=2) + b"\n"


def decode(data: bytes, kind: type[T], what: str) -> T:
    """Strictly typed JSON; `what` names the file in the error."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise ArtifactError(f"{what} is not a valid {kind.__name__}: {error}. Compile the artifact again.") from error


def hash_file(path: Path) -> FileEntry:
    """sha256 and size, read in chunks."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
            size += len(data)
    return FileEntry(digest.hexdigest(), size)


def files_of(folder: Path) -> list[str]:
    """Every file below the folder but the manifest, as sorted posix paths."""
    paths = (p for p in folder.rglob("*") if not p.is_dir())
    return sorted(r for p in paths if (r := p.relative_to(folder).as_posix()) != MANIFEST)


def artifact_hash(folder: Path) -> str:
    """The artifact's identity: sha256 of its manifest, which holds the hash of everything else."""
    return hash_file(folder / MANIFEST).sha256


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends without an error, and vanishes otherwise.

    An older artifact at `target` is replaced; anything else there is an error.
    """
    if target.exists() and not (target / MANIFEST).is_file():
        raise ArtifactError(f"{target} exists and is not an artifact; choose another output path or remove it.")
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        _remove_abandoned(target)
        beside.mkdir(parents=True)
        yield beside
        _replace(beside, target)
    except OSError as error:
        hint = "Free disk space or choose another output path." if error.errno == errno.ENOSPC else "Check the path."
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}. {hint}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Remove what an interrupted compile of the same target left, if its process is gone."""
    for left in target.parent.glob(f".{target.name}.*.partial"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)


def _replace(beside: Path, target: Path) -> None:
    if not target.exists():
        beside.rename(target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old.partial")
    target.rename(old)
    beside.rename(target)
    shutil.rmtree(old)


def write_manifest(folder: Path, build: Callable[[dict[str, FileEntry]], Manifest]) -> Manifest:
    """Hash every file written so far and write the manifest that lists them."""
    manifest = build({name: hash_file(folder / name) for name in files_of(folder)})
    (folder / MANIFEST).write_bytes(encode(manifest))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact folder."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not an artifact folder; `atomc compile MODEL -o {folder}` makes one.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): {folder} is not a whole artifact.") from error
    manifest = decode(data, Manifest, str(path))
    if manifest.schema != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema {manifest.schema}; this atomc reads {SCHEMA_VERSION}. Compile the artifact again."
        )
    return manifest


def verify(folder: Path, manifest: Manifest, progress: Callable[[str], None] = lambda _: None) -> None:
    """Compare every file with the manifest.

    Raises:
        ArtifactError: lists each missing, changed, truncated or foreign file.
    """
    present = set(files_of(folder))
    problems = [f"{name}: missing" for name in sorted(manifest.files.keys() - present)]
    problems += [f"{name}: not part of the artifact" for name in sorted(present - manifest.files.keys())]
    for name in sorted(present & manifest.files.keys()):
        progress(name)
        expected, size = manifest.files[name], (folder / name).stat().st_size
        if size != expected.bytes:
            problems.append(f"{name}: {size} bytes, expected {expected.bytes}")
        elif (found := hash_file(folder / name)) != expected:
            problems.append(f"{name}: sha256 {found.sha256[:12]}…, expected {expected.sha256[:12]}…")
    if problems:
        listed = "\n".join(f"  {p}" for p in problems[:20])
        raise ArtifactError(f"{folder} is damaged ({len(problems)} problems):\n{listed}\nCompile or copy it again.")
