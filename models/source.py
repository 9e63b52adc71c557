"""Where a model comes from: a checkpoint folder, or a bundled name; its configuration, tensors and recipes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

from torch import Tensor

from atomc.errors import AtomcError, CheckpointError
from atomc.models.bundled import bundled_names, bundled_path
from atomc.models.deepseek_v4.config import DeepseekV4Config, load_config
from atomc.models.deepseek_v4.reader import CheckpointReader
from atomc.models.deepseek_v4.schema import Storage, expected_tensors
from atomc.models.deepseek_v4.validate import validate
from atomc.models.deepseek_v4.weights import ComputeDType, checkpoint_storage, official_storage, weight_recipe
from atomc.recipes import Recipe, TensorSpec


class ModelError(AtomcError):
    """A model name that is neither a folder nor bundled, or a model without the weights that are wanted."""

    exit_code = 3


@dataclass(frozen=True)
class ModelSource:
    """A model to compile. `reader` is None where only the configuration is wanted or there is no more."""

    name: str
    folder: Path | None
    config: DeepseekV4Config
    reader: CheckpointReader | None

    def recipe(self, prefixes: list[str], parameter: str, dtype: str) -> Recipe:
        """The recipe of a region's parameter for the blocks `prefixes` that use the region.

        Raises:
            CheckpointError: the blocks store it in different formats, so that no one recipe serves them.
        """
        stored = {self.storage(prefix, parameter) for prefix in prefixes}
        if len(stored) > 1:
            problem = f"{parameter} is stored as {' and '.join(sorted(stored))} in different layers of one kind"
            raise CheckpointError(str(self.folder), [problem])
        return weight_recipe(self.config, parameter, cast(ComputeDType, dtype), stored=stored.pop())

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a checkpoint tensor: as it is stored, or as a release stores it where there is none."""
        if self.reader is not None:
            return self.reader.spec(name)
        return _released(self.config)[name]

    def storage(self, prefix: str, parameter: str) -> Storage:
        """How a parameter of the block `prefix` is stored."""
        if self.reader is None:
            return official_storage(self.config, parameter)
        return checkpoint_storage(self.reader, prefix, parameter)

    def load(self, name: str) -> Tensor:
        """A checkpoint tensor by its official name."""
        if self.reader is None:
            raise ModelError(f"{self.name} has no weights to load {name} from.")
        return self.reader.load(name)


@lru_cache(maxsize=4)
def _released(config: DeepseekV4Config) -> dict[str, TensorSpec]:
    return expected_tensors(config)


def open_model(model: str, with_weights: bool) -> ModelSource:
    """Open a checkpoint folder or a bundled model; with weights, the checkpoint is validated whole.

    Raises:
        ModelError, ConfigError, CheckpointError: what was found, and what to do.
    """
    path = Path(model)
    bundled = model in bundled_names()
    if bundled:
        path = bundled_path(model)
    elif not path.exists():
        raise ModelError(
            f"{model!r} is neither a checkpoint folder nor a bundled model. Bundled: {', '.join(bundled_names())}."
        )
    config = load_config(path)
    name = model if bundled else path.resolve().name.removesuffix(".json")
    folder = path if path.is_dir() else None
    if not with_weights:
        return ModelSource(name, folder, config, None)
    if folder is None:
        raise ModelError(
            f"{model} is a configuration without weights. Give the folder of its checkpoint, or --no-weights to "
            "compile and check it without."
        )
    reader = CheckpointReader(folder)
    validate(reader, config)
    return ModelSource(name, folder, config, reader)
