"""Reading a DeepSeek-V4 checkpoint tensor by tensor, under official names whatever names it is stored with."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atomc.errors import CheckpointError
from atomc.formats import FP8_TILE
from atomc.models.deepseek_v4.hf_names import official_name, stacked_experts
from atomc.models.deepseek_v4.schema import Storage
from atomc.models.deepseek_v4.shards import scan
from atomc.recipes import TensorSpec

_PLAIN = (torch.bfloat16, torch.float32)


class _Location(NamedTuple):
    """Where a tensor lies: a whole stored tensor, or rows `start`..`stop` of one expert of a stacked one."""

    file: Path
    stored: str
    spec: TensorSpec
    expert: int | None = None
    start: int = 0
    stop: int = 0


class CheckpointReader:
    """The tensors of a checkpoint folder by official name (spec 3.1); transformers' names are read too (spec 3.6).

    Opening reads headers only. Shards are memory-mapped and `load` reads one tensor. Faults of the files are kept in
    `problems` for `validate`. Raises `CheckpointError` if the folder holds no checkpoint at all.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        shards = scan(self.folder)
        self.files: tuple[Path, ...] = tuple(shards.files)
        self.problems: list[str] = shards.problems
        self.unreadable = {official_name(name) for name in shards.unreadable}
        self._locations: dict[str, _Location] = {}
        self._open: dict[Path, Any] = {}  # safe_open has no public type
        for stored, (file, spec) in shards.tensors.items():
            self._add(stored, file, spec, shards.tensors)

    def _add(self, stored: str, file: Path, spec: TensorSpec, tensors: dict[str, tuple[Path, TensorSpec]]) -> None:
        name = official_name(stored)
        stacked = stacked_experts(name)
        if stacked is None:
            self._place(name, _Location(file, stored, spec))
            return
        prefix, projections, kind = stacked
        if len(spec.shape) != 3 or spec.shape[1] % len(projections):
            self.problems.append(f"{stored} ({file.name}): shape {list(spec.shape)} is no stack of {projections}")
            return
        if kind == "scale" and len(projections) == 2 and self._straddles(stored, spec, tensors):
            why = f"one scale tile covers rows of both w1 and w3 (their row count is no multiple of {FP8_TILE.rows})"
            self.problems.append(f"{stored} ({file.name}): {why}")
            return
        rows = spec.shape[1] // len(projections)
        part = TensorSpec((rows, spec.shape[2]), spec.dtype)
        for expert in range(spec.shape[0]):
            for i, projection in enumerate(projections):
                location = _Location(file, stored, part, expert, i * rows, (i + 1) * rows)
                self._place(f"{prefix}{expert}.{projection}.{kind}", location)

    @staticmethod
    def _straddles(stored: str, scale: TensorSpec, tensors: dict[str, tuple[Path, TensorSpec]]) -> bool:
        """Whether the halves of a stacked FP8 scale cannot be told apart; FP4 has a scale row per weight row."""
        weight = stored.removesuffix("_scale_inv").removesuffix(".weight")
        found = tensors.get(weight) or tensors.get(f"{weight}.weight")
        if found is None or len(found[1].shape) != 3:  # a problem of its own
            return False
        rows = found[1].shape[1]
        return rows != scale.shape[1] and rows // 2 % FP8_TILE.rows != 0

    def _place(self, name: str, location: _Location) -> None:
        if name in self._locations:
            there = self._locations[name]
            also = f"is also {there.stored} in {there.file.name}"
            self.problems.append(f"{name} ({location.file.name}, as {location.stored}): {also}")
        else:
            self._locations[name] = location

    def __contains__(self, name: object) -> bool:
        return name in self._locations

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __len__(self) -> int:
        return len(self._locations)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype as stored. Raises `CheckpointError` if there is no such tensor."""
        return self._find(name).spec

    def where(self, name: str) -> str:
        """File of a tensor, and its stored name where that differs: what an error message needs."""
        location = self._find(name)
        same = location.stored == name
        return location.file.name if same else f"{location.file.name}, as {location.stored}"

    def storage(self, name: str) -> Storage:
        """How the weight `name` is stored: "plain" (bfloat16 or float32, no scale), "fp4" (int8), "fp8", "fp8_f32"."""
        spec = self._find(name).spec
        if spec.dtype in _PLAIN:
            return "plain"
        if spec.dtype == torch.int8:
            return "fp4"
        scale = name.removesuffix("weight") + "scale"
        if scale not in self:  # a fault that `validate` lists; the release's own kind, then
            return "fp8"
        return "fp8" if self._find(scale).spec.dtype == torch.float8_e8m0fnu else "fp8_f32"

    def load(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU. Raises `CheckpointError` if it is not there or its file is damaged."""
        location = self._find(name)
        try:
            if location.file not in self._open:
                self._open[location.file] = safe_open(str(location.file), framework="pt")
            handle = self._open[location.file]
            if location.expert is None:
                tensor: Tensor = handle.get_tensor(location.stored)
                return tensor
            part: Tensor = handle.get_slice(location.stored)[location.expert, location.start : location.stop]
            return part
        except (SafetensorError, OSError) as error:
            problem = f"{name} ({self.where(name)}): cannot be read ({error})"
            raise CheckpointError(str(self.folder), [problem]) from error

    def close(self) -> None:
        """Unmap all files; the reader can still be used and maps them again."""
        self._open.clear()

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _find(self, name: str) -> _Location:
        if name not in self._locations:
            faults = self.problems or [f"run `validate` to see all that is missing among {len(self)} tensors"]
            raise CheckpointError(str(self.folder), [f"{name}: is missing", *faults])
        return self._locations[name]
