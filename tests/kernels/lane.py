"""Runs the cases of kernel families in one lane: `python -m tests.kernels.lane interp FAMILY ...` or `gpu FAMILY ...`.

The interpreter lane sets TRITON_INTERPRET before Triton is imported, so it needs a process of its own.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from importlib import import_module


def main(lane: str, families: list[str]) -> int:
    """Run every case; print a line each; the number of failures."""
    if lane == "interp":
        os.environ["TRITON_INTERPRET"] = "1"
        from tests.support.interpreter import correct

        correct()
    from tests.support.kernel_cases import check

    device, target = ("cpu", "h100") if lane == "interp" else ("cuda", "h100")
    failures = 0
    for family in families:
        for case in import_module(f"tests.kernels.{family}").CASES:
            if case.slow and lane == "interp":
                continue
            start = time.perf_counter()
            try:
                errors = check(case, device, target)
                worst = max(errors.values(), default=0.0)
                print(f"ok   {family} {case.name}: {worst:.1e} ({time.perf_counter() - start:.1f} s)", flush=True)
            except Exception:
                failures += 1
                print(f"FAIL {family} {case.name}\n{traceback.format_exc()}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1], sys.argv[2:]), 1))
