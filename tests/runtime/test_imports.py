"""Serving never compiles: the runtime, the server included, brings no compiler into the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BANNED = [
    *("triton", "sympy", "networkx", "torch._dynamo", "torch._inductor", "transformers"),
    *("atomc.models", "atomc.passes", "atomc.codegen", "atomc.compiler"),
]
HEAVY = ["fastapi", "uvicorn", "starlette", "pydantic", "deepseek_recipe"]


def loaded_after(root: Path, code: str, names: list[str]) -> list[str]:
    report = f"\nimport sys; print(' '.join(name for name in {names!r} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code + report], cwd=root, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def imports_of(root: Path, folder: Path, pattern: str) -> str:
    modules = [".".join(("atomc", *file.relative_to(root).with_suffix("").parts)) for file in folder.glob(pattern)]
    assert modules
    return "\n".join(f"import {name.removesuffix('.__init__')}" for name in sorted(modules))


def test_the_whole_runtime_loads_no_compiler(repo_root: Path) -> None:
    assert loaded_after(repo_root, imports_of(repo_root, repo_root / "runtime", "**/*.py"), BANNED) == []


def test_only_the_server_loads_the_web_stack(repo_root: Path) -> None:
    assert loaded_after(repo_root, imports_of(repo_root, repo_root / "runtime", "*.py"), HEAVY) == []


def test_torch_alone_is_clean(repo_root: Path) -> None:
    """If a new PyTorch brings one of these in by itself, this says so before the tests above confuse anybody."""
    assert loaded_after(repo_root, "import torch", BANNED) == []
