"""Safetensors files written part by part: the bytes of safetensors' own writer, or no file at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from atomc.artifact.manifest import FileEntry
from atomc.artifact.shards import DTYPE_NAMES, ShardWriter, write_whole
from atomc.artifact.store import ArtifactError, hash_file
from atomc.recipes import TensorSpec
from tests.support.tiny import same_bits

SHAPES = [(), (0,), (1,), (3,), (0, 4), (2, 0, 3), (5, 7), (2, 3, 4)]


def spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bits, NaN among them; a bool has two values only."""
    size = TensorSpec(shape, dtype).nbytes
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


def write(path: Path, tensors: dict[str, Tensor], rows: bool = False) -> FileEntry:
    """Whole, or one row of dim 0 at a time."""
    with ShardWriter(path, {name: spec(tensor) for name, tensor in tensors.items()}) as shard:
        for name in shard.names:
            for part in tensors[name].unbind(0) if rows and tensors[name].dim() else (tensors[name],):
                shard.write(name, part)
        return shard.finish()


# -- good files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [False, True])
def test_the_bytes_are_those_of_safetensors(tmp_path: Path, rows: bool) -> None:
    tensors = {
        f"layers.{i}.{str(dtype).removeprefix('torch.')}": filled(shape, dtype)
        for dtype in reversed(DTYPE_NAMES)
        for i, shape in enumerate(SHAPES)
    }
    entry = write(tmp_path / "ours", tensors, rows)
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert entry == hash_file(tmp_path / "ours")
    with safe_open(tmp_path / "ours", framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        assert all(same_bits(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert sorted(os.listdir(tmp_path)) == ["ours", "theirs"]


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES), ids=DTYPE_NAMES.values())
def test_strided_tensors_are_written_row_by_row(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"t": filled((6, 4), dtype).t(), "step": filled((9,), dtype)[1::2], "wide": filled((1, 3), dtype)}
    tensors["wide"] = tensors["wide"].expand(4, 3)
    write(tmp_path / "ours", tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_names_of_any_kind(tmp_path: Path) -> None:
    tensors = {'quoted " \\ name': torch.ones(1), "ünïcode ß": torch.zeros(2), "": torch.ones(3), "\n": torch.ones(1)}
    write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    with safe_open(tmp_path / "ours", framework="pt") as file:
        assert all(same_bits(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert (tmp_path / "ours").read_bytes()[8:].split(b"}}")[0] == (tmp_path / "theirs").read_bytes()[8:].split(b"}}")[
        0
    ]


def test_bytes_are_counted_chunk_by_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atomc.artifact.shards.CHUNK", 1000)
    seen: list[int] = []
    tensor = filled((2500,), torch.uint8)
    with ShardWriter(tmp_path / "a", {"x": spec(tensor)}, seen.append) as shard:
        shard.write("x", tensor)
        entry = shard.finish()
    assert seen == [1000, 1000, 500]
    assert entry.sha256 == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()


# -- refusals ----------------------------------------------------------------------------------------------------------


def give(
    path: Path, specs: dict[str, TensorSpec], writes: list[tuple[str, Tensor]], error: type[BaseException] | None = None
) -> None:
    """Write as told, and finish, or end with an error."""
    with ShardWriter(path, specs) as shard:
        for name, part in writes:
            shard.write(name, part)
        if error is not None:
            raise error
        shard.finish()


TWO = {"first": TensorSpec((2, 3), torch.float32), "second": TensorSpec((4,), torch.int8)}


@pytest.mark.parametrize(
    ("writes", "message"),
    [
        ([("first", torch.ones(3))], "weight first of .* 12 bytes were given, its header says 24"),
        ([("first", torch.ones(6))], "weight second of .* 0 bytes were given, its header says 4"),
        ([("first", torch.ones(7))], "weight first of .* 28 bytes or more were given, its header says 24"),
        ([("first", torch.ones(6)), ("first", torch.ones(1))], "weight first of .* 28 bytes or more were given"),
        ([("first", torch.ones(5)), ("second", torch.ones(4))], "weight first of .* 20 bytes were given"),
        ([("first", torch.ones(6).int())], "weight first of .* dtype torch.int32, its header says torch.float32"),
        ([("third", torch.ones(6))], "weight first of .* 0 bytes were given"),
        (
            [("first", torch.ones(6)), ("second", torch.ones(4).char()), ("first", torch.ones(0))],
            "weight first of .* no such tensor, or its turn is over",
        ),
    ],
)
def test_data_that_are_not_the_headers_leave_nothing(
    tmp_path: Path, writes: list[tuple[str, Tensor]], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        give(tmp_path / "a", TWO, writes)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_file_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a").write_text("what was there")
    with pytest.raises(error):
        give(tmp_path / "a", TWO, [("first", torch.ones(6))], error)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "what was there"


def test_a_file_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a", TWO) as shard:
        shard.write("first", torch.ones(6))
    assert os.listdir(tmp_path) == []


def test_a_dtype_that_the_format_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"weight x has dtype torch.complex64; an artifact holds int64, .*"):
        ShardWriter(tmp_path / "a", {"x": TensorSpec((1,), torch.complex64)})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("size", [1, 100_000_000], ids=["at the end", "in the middle"])
def test_a_full_disk_is_said_with_file_and_weight(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.tmp").symlink_to("/dev/full")
    tensor = torch.empty(size, dtype=torch.int8)
    where = "a \\(its end\\)" if size == 1 else "a \\(big\\)"
    message = f"cannot write .*{where}: No space left on device. Free disk space"
    with pytest.raises(ArtifactError, match=message):
        give(tmp_path / "a", {"big": spec(tensor)}, [("big", tensor)])
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "no" / "a"
    with pytest.raises(ArtifactError, match=r"cannot write .*its header.*No such file"), ShardWriter(path, TWO):
        pass
    with pytest.raises(ArtifactError, match="cannot write"):
        write_whole(path, b"")


def test_a_small_file_is_replaced_at_once(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"old")
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]
