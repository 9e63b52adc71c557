"""A checkpoint to pack that counts and can fail, its recipes, and packing it into an artifact of weights alone."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from atomc.artifact.store import MANIFEST, files_of, hash_file, writing
from atomc.pack import Packed, Packing, Weight, shelf_of, weights_of
from atomc.recipes import Cast, Concat, Constant, Load, Recipe, Stack, TensorSpec

EXPERTS, LAYERS = 3, 3
SHARD = 400  # bytes


class Checkpoint:
    """A file of tensors that counts loads, knows how many tensors live, and can fail at a load."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self.files = (folder / "model.safetensors",)
        save_file(tensors, self.files[0])
        os.utime(self.files[0], ns=(10**18, 10**18))
        self.tensors = tensors
        self.loads: list[str] = []
        self.most_alive = self.closed = 0
        self.fail: Callable[[str], None] = lambda _: None
        self._alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(tuple(self.tensors[name].shape), self.tensors[name].dtype)

    def load(self, name: str) -> Tensor:
        self.fail(name)
        self.loads.append(name)
        tensor = self.tensors[name].clone()
        self._alive.add(tensor)
        self.most_alive = max(self.most_alive, len(self._alive))
        return tensor

    def close(self) -> None:
        self.closed += 1


def fails_at(number: int, error: BaseException) -> Callable[[str], None]:
    """`error` at the load with that number, from 1."""
    count = 0

    def fail(_: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise error

    return fail


def some_tensors() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            at = f"layers.{layer}.experts.{expert}."
            tensors |= {f"{at}w{i}.weight": torch.randint(-128, 128, (2, 16), dtype=torch.int8) for i in (1, 2, 3)}
            scale = torch.randint(0, 255, (2, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
            tensors |= {f"{at}w{i}.scale": scale.clone() for i in (1, 2, 3)}
        tensors[f"layers.{layer}.norm"] = torch.randn(8).bfloat16()
    return tensors | {"embed": torch.randn(6, 16)}


def layer_recipes() -> dict[str, Recipe]:
    def stack(kind: str, *names: str) -> Recipe:
        experts = [[Load(f"{{prefix}}experts.{e}.{name}.{kind}") for name in names] for e in range(EXPERTS)]
        return Stack(tuple(Concat(tuple(x), 0) if len(x) > 1 else x[0] for x in experts))

    return {
        "w13.values": stack("weight", "w1", "w3"), "w13.scales": stack("scale", "w1", "w3"),
        "w2.values": stack("weight", "w2"), "w2.scales": stack("scale", "w2"),
        "norm": Cast(Load("{prefix}norm"), "float32"),
    }  # fmt: skip


CALLS = [("prologue", ""), *(("layer", f"layers.{layer}.") for layer in range(LAYERS))]
RECIPES = {
    "prologue": {"embed": Load("embed"), "rope": Constant((1.5, 2.0), (2,), "float32")},
    "layer": layer_recipes(),
}


def weights(checkpoint: Checkpoint) -> list[Weight]:
    return weights_of(CALLS, RECIPES, checkpoint.spec)


def pack(checkpoint: Checkpoint, output: Path, made: list[Weight] | None = None, size: int = SHARD) -> Packed:
    """An artifact of weights alone."""
    with Packing(output, size) as packing, writing(output) as folder:
        packed = packing.pack(checkpoint, made or weights(checkpoint), folder / "weights")
        (folder / MANIFEST).write_text("\n".join(f"{n} {hash_file(folder / n)}" for n in files_of(folder)))
    return packed


def interrupted(checkpoint: Checkpoint, output: Path, at: int, error: BaseException) -> BaseException:
    """A packing that ends with `error` at load `at`."""
    checkpoint.fail = fails_at(at, error)
    with pytest.raises(type(error)) as raised:
        pack(checkpoint, output)
    checkpoint.fail, checkpoint.loads = lambda _: None, []
    return raised.value


def read(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted((folder / "weights").iterdir()):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def shelved(output: Path) -> list[str]:
    return sorted(p.name for p in shelf_of(output).iterdir()) if shelf_of(output).exists() else []
