"""The small model, compiled for one rank and for layouts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support.artifact import LAYERS, LAYOUTS, compile_artifact, write_checkpoint


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Computed in float32. Made once in a test session, by whichever process needs it first; read-only."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "layouts"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "ranks.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            checkpoint = write_checkpoint(folder / "checkpoint", n_routed_experts=16, **LAYERS)
            compile_artifact(checkpoint, folder / "ranks.atom", "none", LAYOUTS)
    return folder / "ranks.atom"
