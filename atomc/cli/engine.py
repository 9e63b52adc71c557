"""What the commands that run an artifact have in common: loading it, and the size of its caches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from atomc.runtime.capacity import Capacity
    from atomc.runtime.executor import Executor

MemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Memory for the caches (8G, 512M).",
        show_default="half of what is free, most of a GPU's",
        metavar="SIZE",
    ),
]


def open_engine(
    artifact: Path,
    *,
    max_requests: int | None = None,
    memory: str | None = None,
    num_blocks: int | None = None,
    num_window_pages: int | None = None,
) -> tuple[Executor, Capacity]:
    """The artifact, verified and loaded, with its caches. Raises `AtomcError`."""
    from atomc.cli.console import stages
    from atomc.cli.units import parse_bytes

    size = parse_bytes(memory, "--memory")
    with stages() as progress:
        from atomc.artifact.store import read_manifest
        from atomc.runtime.capacity import open_executor

        total, done = len(read_manifest(artifact).files), 0

        def checked(name: str) -> None:
            nonlocal done
            progress(f"check {name}", done, total)
            done += 1

        return open_executor(
            artifact, max_requests=max_requests, memory_bytes=size, num_blocks=num_blocks,
            num_window_pages=num_window_pages, progress=checked,
        )  # fmt: skip
