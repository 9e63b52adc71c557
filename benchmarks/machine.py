"""The machine that figures belong to; every benchmark writes it beside them."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, its cores and how many of them torch uses, the load at this moment, versions."""
    import torch  # here: some benchmarks time the import, others set variables before it

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
