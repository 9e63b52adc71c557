"""Writing safetensors files part by part: what a file holds is known before its data are, so no tensor need be whole.

A file is there under its name only when it is whole: it is written as `NAME.tmp`, synced and renamed. Its bytes are
those that safetensors' own writer gives for the same tensors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final

import msgspec
import torch
from torch import Tensor

from atomc.artifact.manifest import FileEntry
from atomc.artifact.store import ArtifactError, unwritable
from atomc.recipes import TensorSpec

TEMPORARY: Final = ".tmp"
CHUNK: Final = 8 << 20  # bytes hashed and written at a time

# The format's names. Data lie in this order of dtypes, the widest first, so that each is aligned; then by name.
DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e8m0fnu: "F8_E8M0", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_RANK: Final = {dtype: rank for rank, dtype in enumerate(DTYPE_NAMES)}


def ordered(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The tensors' names in the order of their data.

    Raises:
        ArtifactError: a dtype that the format does not have.
    """
    for name, spec in specs.items():
        if spec.dtype not in _RANK:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _RANK)
            raise ArtifactError(f"weight {name} has dtype {spec.dtype}; an artifact holds {known}. Cast it.")
    return sorted(specs, key=lambda name: (_RANK[specs[name].dtype], name))


def header(specs: Mapping[str, TensorSpec]) -> bytes:
    """What precedes the data: the length of the JSON (8 bytes, little endian), and the JSON padded to 8 bytes."""
    entries, at = {}, 0
    for name in ordered(specs):
        spec = specs[name]
        entries[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": (at, at + spec.nbytes),
        }
        at += spec.nbytes
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_whole(path: Path, data: bytes) -> None:
    """A small file, replaced at once. Raises `ArtifactError` if it cannot be written."""
    beside = path.with_name(path.name + TEMPORARY)
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _put(beside, path)
    except OSError as error:
        raise unwritable(path, error) from error


class ShardWriter:
    """Writes the tensors `names`, in that order, each as one or more parts of its row-major data.

        with ShardWriter(path, specs) as shard:
            for name in shard.names:
                for part in parts_of(name):
                    shard.write(name, part)
            entry = shard.finish()

    The file appears with `finish`; a block that ends otherwise leaves nothing.

    Args:
        specs: shape and dtype of every tensor of the file.
        on_bytes: called with the number of bytes after each chunk of data.
    Raises:
        ArtifactError: the file cannot be written, or the data are not those of the header; names file and tensor.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], on_bytes: Callable[[int], None] = lambda _: None
    ) -> None:
        self.path = path
        self.names = ordered(specs)
        self._specs = specs
        self._on_bytes = on_bytes
        self._temporary = path.with_name(path.name + TEMPORARY)
        self._digest, self._size = hashlib.sha256(), 0
        self._place, self._held = 0, 0  # the tensor being written, and how many of its bytes there are

    def __enter__(self) -> ShardWriter:
        with self._telling("its header"):
            self._file = self._temporary.open("wb")
            try:
                self._append(header(self._specs))
            except OSError:
                self._drop()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._drop()

    def _drop(self) -> None:
        """Leave nothing but what `finish` has renamed."""
        with suppress(OSError):  # buffered data that do not fit; the error that ended the block says so
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def write(self, name: str, part: Tensor) -> None:
        """Append data of tensor `name`: any shape, any strides, on any device."""
        spec, data = self._move_to(name), _bytes(part)
        if part.dtype != spec.dtype:
            raise self._misfit(name, f"a part has dtype {part.dtype}, its header says {spec.dtype}")
        if self._held + data.nbytes > spec.nbytes:
            found = self._held + data.nbytes
            raise self._misfit(name, f"{found} bytes or more were given, its header says {spec.nbytes}")
        with self._telling(name):
            for at in range(0, data.nbytes, CHUNK):
                chunk = data[at : at + CHUNK]
                self._append(chunk)
                self._on_bytes(chunk.nbytes)
        self._held += data.nbytes

    def finish(self) -> FileEntry:
        """Check that every tensor is whole, and give the file its name."""
        while self._place < len(self.names):
            self._next()
        with self._telling("its end"):
            self._file.flush()
            os.fsync(self._file.fileno())
            _put(self._temporary, self.path)
        return FileEntry(self._digest.hexdigest(), self._size)

    def _append(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)
        self._size += len(data)

    def _move_to(self, name: str) -> TensorSpec:
        """Go on to tensor `name`, past tensors that are whole."""
        while self._place < len(self.names) and self.names[self._place] != name:
            self._next()
        if self._place == len(self.names):
            raise self._misfit(name, "the file has no such tensor, or its turn is over")
        return self._specs[name]

    def _next(self) -> None:
        name = self.names[self._place]
        spec = self._specs[name]
        if self._held != spec.nbytes:
            raise self._misfit(name, f"{self._held} bytes were given, its header says {spec.nbytes}")
        self._place, self._held = self._place + 1, 0

    def _misfit(self, name: str, why: str) -> ArtifactError:
        return ArtifactError(f"weight {name} of {self.path} does not fit: {why}. Compile again; was a source changed?")

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable(f"{self.path} ({what})", error) from error


def _bytes(part: Tensor) -> memoryview:
    """The row-major bytes, copied only where strides or a device ask for it. 0-dim and empty tensors are legal."""
    flat = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return flat.data


def _put(beside: Path, path: Path) -> None:
    """Rename a synced file: whole even if the machine stops."""
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is on disk before anything relies on it
    finally:
        os.close(folder)
