"""Runs the cases of kernel families in one lane.

    python -m tests.kernels.lane interp FAMILY ...           Triton's interpreter, on any machine
    python -m tests.kernels.lane build FOLDER FAMILY ...     compile what the cases launch, for an H100, on any machine
    python -m tests.kernels.lane stored FOLDER FAMILY ...    launch these binaries on a GPU, as the runtime does
    python -m tests.kernels.lane gpu FAMILY ...              compile and launch on a GPU, by the Triton that is there

The interpreter lane sets TRITON_INTERPRET before Triton is imported, so it needs a process of its own.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

TARGET = "h100"
LANES = ("interp", "build", "stored", "gpu")


def main(lane: str, arguments: list[str]) -> int:
    """Run every case; print a line each; the number of failures."""
    if lane not in LANES:
        raise SystemExit(f"{lane} is no lane; there are {', '.join(LANES)}")
    if lane == "build":
        return build(Path(arguments[0]), arguments[1:])
    if lane == "interp":
        os.environ["TRITON_INTERPRET"] = "1"
        from tests.support.interpreter import correct

        correct()
    where, families = device(lane, arguments)
    from tests.support.kernel_cases import check

    failures = 0
    for family, case in cases(families):
        if case.slow and lane == "interp":
            continue
        start = time.perf_counter()
        where.libraries, where.offered, where.made = frozenset(), set(), set()
        try:
            worst = max(check(case, "cpu" if lane == "interp" else "cuda", where).values(), default=0.0)
            if where.offered and lane != "interp":  # once more, with the library's kernels
                where.libraries = frozenset(where.offered)
                worst = max(check(case, "cuda", where).values(), default=worst)
                print(f"ok   {family} {case.name} by {sorted(where.made) or 'none'}: {worst:.1e}", flush=True)
            print(f"ok   {family} {case.name}: {worst:.1e} ({time.perf_counter() - start:.1f} s)", flush=True)
        except Exception:
            failures += 1
            print(f"FAIL {family} {case.name}\n{traceback.format_exc()}", flush=True)
    return failures


def device(lane: str, arguments: list[str]) -> tuple[Any, list[str]]:
    """What the cases run on, and the families."""
    from atomc.codegen.device import TorchDevice
    from atomc.targets import get_target

    if lane == "stored":
        from tests.support.stored_device import StoredDevice

        return StoredDevice(Path(arguments[0]), TARGET), arguments[1:]
    return TorchDevice(get_target(TARGET), 0, "cpu" if lane == "interp" else "cuda"), arguments


def cases(families: list[str]) -> Iterator[tuple[str, Any]]:
    """Every case of the families."""
    if not families:
        raise SystemExit("no kernel family is named")
    for family in families:
        for case in import_module(f"tests.kernels.{family}").CASES:
            yield family, case


def build(folder: Path, families: list[str]) -> int:
    """Compile every variant of the cases into `folder/kernels`."""
    from atomc.artifact.kernels import write_kernel
    from atomc.codegen.aot import build_all, default_store, key
    from atomc.targets import get_target
    from tests.support.stored_device import label_of, record

    folder.mkdir(parents=True, exist_ok=True)
    target = get_target(TARGET)
    variants = {label_of(v): v for _, case in cases(families) for v in record(case, TARGET)}
    made = build_all(variants.values(), target, default_store())
    for name, variant in variants.items():
        binary = made[key(variant, target)]
        write_kernel(folder, name, binary.data, binary.facts)
    print(f"{len(variants)} kernels in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1], sys.argv[2:]), 1))
