"""Writing a checkpoint is all or nothing."""

import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from atomc.errors import CheckpointError
from atomc.models.deepseek_v4 import writer
from atomc.models.deepseek_v4.checkpoint import CheckpointReader, expected_tensors, write_checkpoint
from tests.support.tiny import random_checkpoint, random_tensors, same_bits, tiny_config

FP8 = torch.float8_e4m3fn


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Path] = []

    def save_until_full(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        if len(saved) == 2:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(file)
        safetensors.torch.save_file(tensors, file, metadata=metadata)

    monkeypatch.setattr(writer, "save_file", save_until_full)
    with pytest.raises(CheckpointError, match=r"nothing is left of it: .*No space left on device"):
        random_checkpoint(tmp_path / "model", tiny_config())
    assert len(saved) == 2
    assert left_in(tmp_path) == []


def test_a_source_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from itertools.islice(random_tensors(tiny_config()), 100)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_checkpoint(tmp_path / "model", tiny_config(), failing(), shard_bytes=10_000)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "twice", "nothing"])
def test_tensors_that_are_not_the_models_are_refused(tmp_path: Path, fault: str) -> None:
    items = list(random_tensors(tiny_config()))
    if fault == "missing":
        items.pop(10)
    elif fault == "extra":
        items.append(("odd", torch.zeros(1)))
    elif fault == "shape":
        items[0] = (items[0][0], items[0][1][1:])
    elif fault == "twice":
        items.append(items[3])
    else:
        items = []
    with pytest.raises(CheckpointError):
        write_checkpoint(tmp_path / "model", tiny_config(), iter(items))
    assert left_in(tmp_path) == []


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="already exists and is not empty"):
        random_checkpoint(tmp_path / "model", tiny_config())
    assert left_in(tmp_path / "model") == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    random_checkpoint(tmp_path / "empty", tiny_config())
    assert left_in(tmp_path) == ["empty", "model"]


def test_views_and_shared_storage_are_written_whole(tmp_path: Path) -> None:
    tensors = dict(random_tensors(tiny_config()))
    tensors["head.weight"] = tensors["embed.weight"]  # one tensor under two names
    stacked = torch.stack([tensors["layers.0.attn.wkv.weight"].view(torch.uint8)] * 2).view(FP8)
    tensors["layers.0.attn.wkv.weight"] = stacked[1]
    tensors["layers.1.hc_attn_fn"] = tensors["layers.1.hc_attn_fn"].T.contiguous().T
    folder = write_checkpoint(tmp_path / "model", tiny_config(), tensors)
    reader = CheckpointReader(folder)
    for name, tensor in tensors.items():
        assert same_bits(reader.load(name), tensor)


def test_one_shard_is_held_at_a_time(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", tiny_config(), shard_bytes=50_000)
    sizes = [sum(t.nbytes for t in safetensors.torch.load_file(file).values()) for file in folder.glob("*.safetensors")]
    largest = max(spec.nbytes for spec in expected_tensors(tiny_config()).values())
    assert max(sizes) <= max(50_000, largest)
