"""Writing a checkpoint in the official layout: shards, index and config.json, all or nothing."""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from atomc.errors import CheckpointError
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.reader import CheckpointReader
from atomc.models.deepseek_v4.shards import INDEX_NAME
from atomc.models.deepseek_v4.validate import validate

SHARD_BYTES: Final = 5_000_000_000


def write_checkpoint(
    folder: str | Path,
    config: DeepseekV4Config,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    shard_bytes: int = SHARD_BYTES,
    drafts: bool = True,
) -> Path:
    """Write `tensors` (official names, as stored) to the new folder `folder` and return it.

    An iterator is consumed one shard at a time, so at most `shard_bytes` and one tensor are held. Everything is written
    to a folder beside it, validated and then renamed: on any failure nothing is left. Raises `CheckpointError` if the
    folder already holds something, a file cannot be written (disk full), or the tensors are not those of `config`
    (`drafts=False` lets `mtp.*` be absent).
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(str(target), ["already exists and is not empty; give a new folder or remove it first"])
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        weight_map, total = _write_shards(partial, tensors, shard_bytes)
        _write_json(partial / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(partial / "config.json", config.to_dict())
        with CheckpointReader(partial) as reader:
            validate(reader, config, drafts=drafts, values=False)
        os.replace(partial, target)
    except CheckpointError as error:
        raise CheckpointError(str(target), error.problems) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(target), [f"cannot be written, nothing is left of it: {error}"]) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_shards(
    folder: Path, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], shard_bytes: int
) -> tuple[dict[str, str], int]:
    """Stored name -> file name, and the bytes of all tensors. Shards get their names once their number is known."""
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors.items() if isinstance(tensors, Mapping) else tensors, shard_bytes, folder):
        save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        _sync(folder / f"{index}.part")
        os.rename(folder / f"{index}.part", folder / name)
        weight_map.update(dict.fromkeys(names, name))
    return dict(sorted(weight_map.items())), total


def _shards(items: Iterable[tuple[str, Tensor]], shard_bytes: int, folder: Path) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    seen: set[str] = set()
    pointers: set[int] = set()
    size = 0
    for name, tensor in items:
        if name in seen:
            raise CheckpointError(str(folder), [f"{name}: is given twice"])
        seen.add(name)
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, pointers, size = {}, set(), 0
        shard[name] = _own(tensor, pointers)
        size += tensor.nbytes
    if shard or not seen:
        yield shard


def _own(tensor: Tensor, pointers: set[int]) -> Tensor:
    """The tensor contiguous on the CPU with storage of its own: safetensors refuses views of shared storage.

    `pointers` collects the storages of the shard.
    """
    tensor = tensor.detach().cpu()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    shared = tensor.data_ptr() in pointers
    pointers.add(tensor.data_ptr())
    return tensor if whole and not shared else tensor.clone(memory_format=torch.contiguous_format)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _sync(file)


def _sync(file: Path) -> None:
    """Force the file to disk: after the rename it must be whole even if the machine stops."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
