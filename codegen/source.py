"""Generated kernels as modules: Triton reads a function's source, so that a text must be found as if it were a file."""

from __future__ import annotations

import hashlib
import linecache
import sys
from functools import cache
from types import ModuleType
from typing import Any

PREFIX = "atomc_generated_"


@cache
def kernel_of(source: str, name: str) -> Any:
    """The Triton function `name` of a source text."""
    module = PREFIX + hashlib.sha256(source.encode()).hexdigest()[:16]
    if module not in sys.modules:
        made = ModuleType(module)
        made.__file__ = f"<{module}>"
        linecache.cache[made.__file__] = (len(source), None, source.splitlines(keepends=True), made.__file__)
        made.__dict__["SOURCE"] = source
        sys.modules[module] = made
        exec(compile(source, made.__file__, "exec"), made.__dict__)
    return getattr(sys.modules[module], name)


def source_of(kernel: Any) -> str:
    """The text of a generated kernel's module; empty of one that is a file of ours."""
    module = sys.modules[kernel.fn.__module__]
    text: str = getattr(module, "SOURCE", "") if kernel.fn.__module__.startswith(PREFIX) else ""
    return text
