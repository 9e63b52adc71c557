"""Changing an artifact so that its hashes still agree: what only the plan checker can refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from atomc.artifact.manifest import Manifest
from atomc.artifact.store import MANIFEST, encode, files_of, hash_file, read_manifest, sealed


def copy_of(artifact: Path, folder: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(artifact, folder / "copy.atom"))


def reseal(folder: Path) -> None:
    """Write the hashes of the files as they are now into the manifest."""
    manifest = read_manifest(folder)
    files = {name: hash_file(folder / name) for name in files_of(folder)}
    (folder / MANIFEST).write_bytes(encode(sealed(msgspec.structs.replace(manifest, files=files))))


def edit(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    """Change a JSON file of the artifact and reseal it. In the manifest only the seal follows, if it is still one."""
    value = json.loads((folder / name).read_bytes())
    change(value)
    (folder / name).write_text(json.dumps(value))
    if name != MANIFEST:
        reseal(folder)
        return
    with suppress(msgspec.ValidationError):
        manifest = msgspec.convert(value, Manifest)
        (folder / MANIFEST).write_bytes(encode(sealed(manifest)))
