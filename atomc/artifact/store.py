"""Artifacts on disk: written beside and renamed whole, read back only when every byte is what the manifest says."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
from safetensors import SafetensorError

from atomc.artifact.manifest import SCHEMA_VERSION, FileEntry, Manifest
from atomc.errors import AtomcError

MANIFEST = "manifest.json"
CHUNK = 1 << 22
T = TypeVar("T")


class ArtifactError(AtomcError):
    """An artifact that cannot be read or written; the message names the file and what is wrong with it."""


# -- bytes -------------------------------------------------------------------------------------------------------------


def encode(value: object) -> bytes:
    """Canonical, readable JSON: struct order, sorted dict keys, two-space indent."""
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=2) + b"\n"


def decode(data: bytes, kind: type[T], what: str) -> T:
    """Strictly typed JSON; `what` names the file in the error."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
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
    """Every file below the folder but the manifest, as sorted posix paths.

    Raises:
        ArtifactError: something is neither a regular file nor a folder; links are not followed.
    """
    found: list[str] = []
    for path in _walk(folder):
        mode = path.lstat().st_mode
        name = path.relative_to(folder).as_posix()
        if not stat.S_ISREG(mode):
            kind = "a link" if stat.S_ISLNK(mode) else "no regular file"
            raise ArtifactError(f"{path} is {kind}; an artifact holds regular files only. Copy it again.")
        if name != MANIFEST:
            found.append(name)
    return sorted(found)


def _walk(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path))
            else:
                yield Path(entry.path)


def artifact_hash(folder: Path) -> str:
    """The artifact's identity: sha256 of its manifest, which holds the hash of everything else."""
    return hash_file(folder / MANIFEST).sha256


# -- writing -----------------------------------------------------------------------------------------------------------


def check_output(target: Path) -> None:
    """Whether an artifact can be written at `target`, before the work is done.

    Raises:
        ArtifactError: something else is there, or the folder above cannot be written.
    """
    target = absolute(target)
    if os.path.lexists(target) and not (target / MANIFEST).is_file():
        raise ArtifactError(f"{target} exists and is not an artifact; choose another output path or remove it.")
    above = next(p for p in target.parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ArtifactError(f"cannot write {target}: {above} is not a folder that you can write. Check the path.")


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends without an error, and vanishes otherwise.

    An older artifact at `target` is replaced; anything else there is an error.

    Raises:
        ArtifactError: the folder cannot be written. Other errors of the block pass through.
    """
    check_output(target)
    target = absolute(target)
    beside: Path | None = None
    try:
        remove_abandoned(target)
        beside = _new_folder(target)
        yield beside
        _replace(beside, target)
    except (OSError, SafetensorError) as error:
        if beside is None or _is_ours(error, beside):
            raise unwritable(target, error) from error
        raise
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def absolute(target: Path) -> Path:
    """Without `.` and `..`, so that it has a name; links are kept."""
    return Path(os.path.abspath(target))


def _new_folder(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        beside = target.with_name(f".{target.name}.{os.getpid()}.{number}.partial")
        try:
            beside.mkdir()
        except FileExistsError:
            continue  # another thread of this process compiles to the same place
        return beside
    raise AssertionError


def _is_ours(error: Exception, beside: Path) -> bool:
    """Whether writing failed, not something the block read."""
    if isinstance(error, SafetensorError):
        return True
    assert isinstance(error, OSError)
    names = [str(n) for n in (error.filename, error.filename2) if n is not None]
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or any(str(beside) in name for name in names)


def unwritable(target: Path | str, error: Exception) -> ArtifactError:
    """What to say when the file or folder `target` cannot be written."""
    full = "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    hint = "Free disk space or choose another output path." if full else "Check the path."
    return ArtifactError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}. {hint}")


def remove_abandoned(target: Path) -> None:
    """Remove what an interrupted compile to the same place left, if its process is gone."""
    if not target.parent.is_dir():
        return
    for left in target.parent.iterdir():
        if not (left.name.startswith(f".{target.name}.") and left.name.endswith(".partial")):
            continue
        pid = left.name.removeprefix(f".{target.name}.").split(".")[0]
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _replace(beside: Path, target: Path) -> None:
    """Rename `beside` to `target`; an older artifact there comes back if that fails."""
    if not os.path.lexists(target):
        beside.rename(target)
        return
    old = beside.with_name(f"{beside.name.removesuffix('.partial')}.old.partial")
    target.rename(old)
    try:
        beside.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_manifest(
    folder: Path, build: Callable[[dict[str, FileEntry]], Manifest], known: Mapping[str, FileEntry] | None = None
) -> Manifest:
    """Hash every file written so far and write the manifest that lists them.

    `known` holds files that were hashed when they were written: weights are not read once more.
    """
    known = known or {}
    manifest = sealed(build({name: known.get(name) or hash_file(folder / name) for name in files_of(folder)}))
    (folder / MANIFEST).write_bytes(encode(manifest))
    return manifest


def sealed(manifest: Manifest) -> Manifest:
    """The manifest with the seal that it must have."""
    blank = msgspec.structs.replace(manifest, seal="")
    return msgspec.structs.replace(manifest, seal=hashlib.sha256(encode(blank)).hexdigest())


# -- reading -----------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact folder."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not an artifact folder; `atomc compile MODEL -o {folder}` makes one.")
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ArtifactError(f"{path} is no regular file: {folder} is not a whole artifact.")
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): {folder} is not a whole artifact.") from error
    schema = decode(data, _Schema, str(path)).schema  # first: the rest may differ in another schema
    if schema != SCHEMA_VERSION:
        raise ArtifactError(f"{path} has schema {schema}; this atomc reads {SCHEMA_VERSION}. Compile it again.")
    manifest = decode(data, Manifest, str(path))
    if data != encode(sealed(manifest)):
        raise ArtifactError(f"{path} is damaged: it is not as it was written. Compile or copy the artifact again.")
    return manifest


class _Schema(msgspec.Struct):
    """The one field that every manifest has."""

    schema: int


def verify(folder: Path, manifest: Manifest, progress: Callable[[str], None] = lambda _: None) -> None:
    """Compare every file with the manifest.

    Raises:
        ArtifactError: lists each missing, changed, truncated or foreign file, and each illegal path.
    """
    try:
        present = set(files_of(folder))
        problems = [f"{name!r}: not a path inside the artifact" for name in manifest.files if not _is_inside(name)]
        problems += [f"{name}: missing" for name in sorted(manifest.files.keys() - present)]
        problems += [f"{name}: not part of the artifact" for name in sorted(present - manifest.files.keys())]
        for name in sorted(present & manifest.files.keys()):
            progress(name)
            expected, size = manifest.files[name], (folder / name).stat().st_size
            if size != expected.bytes:
                problems.append(f"{name}: {size} bytes, expected {expected.bytes}")
            elif (found := hash_file(folder / name)) != expected:
                problems.append(f"{name}: sha256 {found.sha256[:12]}…, expected {expected.sha256[:12]}…")
    except OSError as error:
        raise ArtifactError(f"{error.filename} cannot be read ({error.strerror}).") from error
    if problems:
        listed = "\n".join(f"  {p}" for p in problems[:20])
        plural = "s" if len(problems) > 1 else ""
        raise ArtifactError(
            f"{folder} is damaged ({len(problems)} problem{plural}):\n{listed}\nCompile or copy it again."
        )


def _is_inside(name: str) -> bool:
    """A plain relative path: nothing absolute, no `..`, no other spelling of a name."""
    return bool(name) and "\\" not in name and all(part not in ("", ".", "..") for part in name.split("/"))
