"""The files of a checkpoint: safetensors headers, the index over them, and what is wrong with either.

Headers are read here, not by the safetensors library, because a damaged file must be described, not just refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Final

import torch

from atomc.errors import CheckpointError
from atomc.recipes import TensorSpec

INDEX_NAME: Final = "model.safetensors.index.json"
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HEADER_LIMIT: Final = 100 << 20  # the safetensors library's own limit


@dataclass
class Shards:
    """The tensors of a folder by stored name; `problems` are told by `validate`.

    `unreadable` are names the index places in files that are missing or damaged: they are not missing on their own.
    """

    files: list[Path] = field(default_factory=list)
    tensors: dict[str, tuple[Path, TensorSpec]] = field(default_factory=dict)
    damaged: set[Path] = field(default_factory=set)
    unreadable: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


class _Damaged(Exception):
    """Why a file is not a whole safetensors file."""


def scan(folder: Path) -> Shards:
    """All tensors in the safetensors files of `folder`, by its index if there is one.

    Raises `CheckpointError` if there is nothing to read at all; other faults are collected.
    """
    if not folder.is_dir():
        raise CheckpointError(str(folder), ["the folder does not exist; give a folder with *.safetensors files"])
    shards = Shards()
    index = folder / INDEX_NAME
    weight_map = _read_index(index, shards) if index.exists() else None
    shards.files = _indexed_files(folder, weight_map, shards) if weight_map else sorted(folder.glob("*.safetensors"))
    if not shards.files and not shards.problems:
        raise CheckpointError(str(folder), [f"holds neither {INDEX_NAME} nor any *.safetensors file"])
    for file in shards.files:
        _add_file(file, shards)
    if weight_map:
        _compare_with_index(weight_map, shards)
    return shards


def _read_index(index: Path, shards: Shards) -> dict[str, str] | None:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        shards.problems.append(f"{index.name} is not an index with a weight_map ({type(error).__name__}: {error})")
        return None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        shards.problems.append(f"{index.name} has a weight_map that does not map tensor names to file names")
        return None
    if not weight_map:
        shards.problems.append(f"{index.name} lists no tensor")
    return weight_map


def _indexed_files(folder: Path, weight_map: Mapping[str, str], shards: Shards) -> list[Path]:
    files = []
    placed: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        placed.setdefault(name, []).append(tensor)
    for name, held in sorted(placed.items()):
        if Path(name).name != name:
            shards.problems.append(f"{INDEX_NAME} names {name!r}, which is not a plain file name")
        elif not (folder / name).is_file():
            shards.problems.append(f"{name} does not exist; {INDEX_NAME} places {_listed(held)} in it")
        else:
            files.append(folder / name)
            continue
        shards.unreadable.update(held)
    return files


def _compare_with_index(weight_map: Mapping[str, str], shards: Shards) -> None:
    for tensor, name in weight_map.items():
        if tensor in shards.unreadable:
            continue
        found = shards.tensors.get(tensor)
        if found is None and any(file.name == name for file in shards.damaged):
            shards.unreadable.add(tensor)
        elif found is None or found[0].name != name:
            where = "no file holds it" if found is None else f"{found[0].name} holds it"
            shards.problems.append(f"{tensor}: {INDEX_NAME} places it in {name}, but {where}")
    for tensor, (file, _) in shards.tensors.items():
        if tensor not in weight_map:
            shards.problems.append(f"{tensor} ({file.name}): is in the file but not in {INDEX_NAME}")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"


def _add_file(file: Path, shards: Shards) -> None:
    try:
        tensors = _read_header(file, shards)
    except (_Damaged, OSError) as error:
        shards.problems.append(f"{file.name}: {error}")
        shards.damaged.add(file)
        return
    for name, spec in tensors.items():
        if name in shards.tensors:
            shards.problems.append(f"{name} ({file.name}): is also in {shards.tensors[name][0].name}")
        else:
            shards.tensors[name] = (file, spec)


def _read_header(file: Path, shards: Shards) -> dict[str, TensorSpec]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_HEADER_LIMIT, size - 8):
            raise _Damaged(f"is truncated or no safetensors file ({size} bytes, header of {length} bytes)")
        text = stream.read(length)
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(
            sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else ()
        )
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
        raise _Damaged(f"has a header that is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _Damaged("has a header that is not an object")
    shards.problems += [f"{name} ({file.name}): is twice in the file" for name in repeated]
    header.pop("__metadata__", None)
    entries = {name: _read_entry(name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, start, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if start != end:
            raise _Damaged(f"has a header in which the data of {name} start at byte {start}, not {end}")
        end = stop
    if size != 8 + length + end:
        word = "truncated" if size < 8 + length + end else "too long"
        raise _Damaged(f"is {word}: {size} bytes, its header describes {8 + length + end}")
    return {name: spec for name, (spec, _, _) in entries.items()}


def _read_entry(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    """Spec of a header entry, and where its data begin and end."""
    try:
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        spec = TensorSpec(shape, dtype)
        if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
            raise ValueError("sizes are non-negative integers")
        if prod(shape) * dtype.itemsize != stop - start:
            raise ValueError(f"shape {list(shape)} of {entry['dtype']} does not fill bytes {start} to {stop}")
    except (KeyError, TypeError, ValueError) as error:
        raise _Damaged(f"has a bad header entry for {name} ({type(error).__name__}: {error})") from error
    return spec, start, stop
