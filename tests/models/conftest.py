"""Checkpoints the tests of this folder share."""

import shutil
from pathlib import Path

import pytest

from tests.support.tiny import random_checkpoint, tiny_config


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound quantised checkpoint, never to be changed."""
    return random_checkpoint(tmp_path_factory.mktemp("sound") / "tiny", tiny_config())


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, free to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "copy"))
