"""Serving never compiles: the runtime, the server included, brings no compiler into the process."""

from __future__ import annotations

from pathlib import Path

from tests.support.imports import loaded_after

HEAVY = ["fastapi", "uvicorn", "starlette", "pydantic", "deepseek_recipe"]


def imports_of(root: Path, folder: Path, pattern: str) -> str:
    modules = [".".join(("atomc", *file.relative_to(root).with_suffix("").parts)) for file in folder.glob(pattern)]
    assert modules
    return "\n".join(f"import {name.removesuffix('.__init__')}" for name in sorted(modules))


def test_the_whole_runtime_loads_no_compiler(repo_root: Path) -> None:
    assert loaded_after(imports_of(repo_root, repo_root / "runtime", "**/*.py"), repo_root) == []


def test_only_the_server_loads_the_web_stack(repo_root: Path) -> None:
    assert loaded_after(imports_of(repo_root, repo_root / "runtime", "*.py"), repo_root, HEAVY) == []


def test_torch_alone_is_clean(repo_root: Path) -> None:
    """If a new PyTorch brings one of these in by itself, this says so before the tests above confuse anybody."""
    assert loaded_after("import torch", repo_root) == []
