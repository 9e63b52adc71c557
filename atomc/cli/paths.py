"""Paths that a command is given, checked before any work is done; and files written to them."""

from __future__ import annotations

import os
from pathlib import Path

from atomc.cli.failure import OptionError, OutputError


def check_file(path: Path, option: str) -> Path:
    """A file to write, or to write anew. Raises `OptionError`."""
    if path.is_dir():
        raise OptionError(f"{option} {path} is a folder; give the name of a file.")
    return _check_parent(path, option)


def _check_parent(path: Path, option: str) -> Path:
    parent = path.absolute().parent
    if not parent.is_dir():
        found = "is not a folder" if parent.exists() else "does not exist"
        raise OptionError(f"{option} {path}: {parent} {found}. Create it first, or choose another path.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OptionError(f"{option} {path}: {parent} cannot be written. Choose another path.")
    return path


def check_folder(path: Path, option: str) -> Path:
    """A folder to fill: there, or new. Raises `OptionError`."""
    if path.exists() and not path.is_dir():
        raise OptionError(f"{option} {path} is a file; it must be a folder, or not be there.")
    if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
        raise OptionError(f"{option} {path} cannot be written. Choose another folder.")
    return path if path.exists() else _check_parent(path, option)


def write_beside(path: Path, text: str) -> None:
    """Write a file beside and rename it. Raises `OutputError` when it cannot be written; nothing is left then."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        beside.unlink(missing_ok=True)


def is_artifact(text: str) -> bool:
    """Whether an argument that may be an artifact or a model names an artifact (perhaps a broken one)."""
    path = Path(text)
    return path.suffix == ".atom" or (path / "manifest.json").exists() or (path / "plan").exists()
