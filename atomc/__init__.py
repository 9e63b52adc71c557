"""atomc: a compiler and serving runtime for DeepSeek-V4."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atomc.runtime.llm import LLM

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path: str | os.PathLike[str], *, max_requests: int | None = None, memory_bytes: int | None = None) -> LLM:
    """A compiled artifact, ready to generate: `atomc.load("nano.atom").generate(["def f(n):"])`.

    Args:
        max_requests: that run together; None takes what the artifact is compiled for.
        memory_bytes: for the caches; None takes half of the memory that is free, or most of what a GPU has left.
    Raises:
        ArtifactError: the artifact is damaged, has no weights, or is for a target this machine cannot run.
        ServingError: the memory does not hold one request.
    """
    from pathlib import Path

    from atomc.runtime.capacity import open_executor
    from atomc.runtime.llm import LLM

    executor, _ = open_executor(Path(path), max_requests=max_requests, memory_bytes=memory_bytes)
    return LLM(executor)
