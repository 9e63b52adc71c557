"""Fixtures of the runtime's tests: a tokenizer, and engines over the strict fake executor."""

from __future__ import annotations

from pathlib import Path

import pytest

from atomc.runtime.detokenize import Vocabulary
from tests.support.tokenizer import byte_tokenizer, write_tokenizer


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary(byte_tokenizer())


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
