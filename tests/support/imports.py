"""What a process has imported after some code: what serves must bring no compiler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

COMPILERS = (
    *("triton", "sympy", "networkx", "torch._dynamo", "torch._inductor", "transformers"),
    *("atomc.models", "atomc.passes", "atomc.codegen", "atomc.compiler"),
)


def loaded_after(code: str, root: Path | None = None, names: Sequence[str] = COMPILERS) -> list[str]:
    """Those of the modules that a new process has, once it ran the code, in `root` where it is given."""
    report = f"\nimport sys; print(*[name for name in {tuple(names)!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code + report], cwd=root, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()
