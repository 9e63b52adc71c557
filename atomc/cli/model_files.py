"""What a model's own files say about its use: generation_config.json and tokenizer_config.json of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from atomc.artifact.store import decode


class GenerationConfig(msgspec.Struct, frozen=True):
    """How its authors sample; None where they say nothing."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def sampling(self) -> dict[str, float]:
        """Fields of `SamplingParams`."""
        if self.do_sample is False:
            return {"temperature": 0.0}
        found = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {name: value for name, value in found.items() if value is not None}


class TokenizerConfig(msgspec.Struct, frozen=True):
    """Whether texts begin with BOS (as serving has it, unless the file says no) and end with EOS."""

    add_bos_token: bool = True
    add_eos_token: bool = False


T = TypeVar("T", GenerationConfig, TokenizerConfig)


def read_model_file(artifact: Path, name: str, kind: type[T]) -> T:
    """A file of the artifact, or all defaults where the model has none. Raises `ArtifactError`."""
    path = artifact / name
    return decode(path.read_bytes(), kind, str(path)) if path.is_file() else kind()
