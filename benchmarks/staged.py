"""A compile whose stages are timed, for the benchmarks of compile time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


def compile_staged(model: str, target: str, output: Path, dtype: str) -> tuple[Any, dict[str, float]]:
    """Compile a configuration without weights in this process. Returns the result, and seconds by stage."""
    start = time.perf_counter()
    from atomc.compiler import Options, compile_model

    stages: dict[str, float] = {"import": time.perf_counter() - start}
    at = time.perf_counter()
    stage = "open"

    def progress(name: str, done: int, total: int) -> None:
        nonlocal at, stage
        now = time.perf_counter()
        stages[stage] = stages.get(stage, 0.0) + now - at
        at, stage = now, name.split()[0]

    result = compile_model(model, target, output, Options(dtype=dtype, with_weights=False), progress)
    stages[stage] = stages.get(stage, 0.0) + time.perf_counter() - at  # the last stage: passes of the head, and writing
    return result, stages
