"""A calibration file: the mean square of each input channel of every weight's product, as recipes ask for it.

`atomc.calibrate` makes it; see there for what is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atomc.artifact.shards import ShardWriter
from atomc.errors import AtomcError
from atomc.pack import Source
from atomc.recipes import PREFIX, Load, Quantize, Recipe, TensorSpec, children

SPACE = "calibration:"  # of names that recipes load from the file


class CalibrationError(AtomcError):
    """A calibration that cannot be made or read; the message names the file."""


def write_calibration(path: Path, means: dict[str, Tensor]) -> None:
    """Write the mean squares as one safetensors file, whole or not at all.

    Raises:
        ArtifactError: the file cannot be written.
    """
    with ShardWriter(path, {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in means.items()}) as writer:
        for name in writer.names:
            writer.write(name, means[name])
        writer.finish()


class Calibration:
    """The mean squares of a file, as recipes ask for them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.means: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"--calibration {path} cannot be read: {error}.") from error
        for name, tensor in self.means.items():
            if tensor.dim() != 1 or tensor.dtype != torch.float32 or not bool((tensor >= 0).all()):
                raise CalibrationError(
                    f"--calibration {path}: {name} is no vector of mean squares. Make it with `atomc calibrate`."
                )

    def importance(self, prefixes: list[str], weight: str) -> Recipe | None:
        """The recipe of a weight's importance; None unless every block that uses it has one. `weight` has {prefix}."""
        names = [weight.replace(PREFIX, prefix) for prefix in prefixes]
        return Load(SPACE + weight) if all(name in self.means for name in names) else None

    def load(self, name: str) -> Tensor:
        """By the name that recipes load."""
        return self.means[name.removeprefix(SPACE)]

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype, by the name that recipes load."""
        tensor = self.load(name)
        return TensorSpec(tuple(tensor.shape), tensor.dtype)


def fitted(recipes: Iterable[Recipe]) -> tuple[int, int]:
    """How many of the tensors whose scales are chosen here have an importance, and how many there are."""
    found = [leaf for recipe in recipes for leaf in _chosen(recipe)]
    return sum(leaf.importance is not None for leaf in found), len(found)


def _chosen(recipe: Recipe) -> Iterator[Quantize]:
    if isinstance(recipe, Quantize):
        yield from [recipe] if recipe.part == "scales" else []
        return
    for child in children(recipe):
        yield from _chosen(child)


class CalibratedSource:
    """A checkpoint together with its calibration (`atomc.pack.Source`)."""

    def __init__(self, source: Source, calibration: Calibration) -> None:
        self._source, self._calibration = source, calibration
        self.files = (*source.files, calibration.path)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype by name."""
        return self._calibration.spec(name) if name.startswith(SPACE) else self._source.spec(name)

    def load(self, name: str) -> Tensor:
        """The tensor by name."""
        return self._calibration.load(name) if name.startswith(SPACE) else self._source.load(name)

    def close(self) -> None:
        """Unmap the checkpoint's files."""
        self._source.close()
