"""How large the state pools are made: for all requests at full length if the memory given suffices, else for less.

Terms:
    slot   state of fixed size; page   rows of the sliding window; block   compressed rows of `block_tokens` tokens
    Slots and window pages do not grow with the context and are always given in full; what is left goes to blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from atomc.artifact.facts import bytes_text, pool_bytes, weights, window_pages
from atomc.artifact.manifest import Serving
from atomc.artifact.plan import ProgramPlan
from atomc.runtime.errors import ServingError
from atomc.runtime.executor import Executor, PoolSizes
from atomc.runtime.loader import LoadedArtifact, load
from atomc.runtime.protocols import Peers

# Of the memory that is free: weights are mapped and shared, the rest of the machine lives too.
DEFAULT_SHARE = 0.5
# Of what a GPU has left: kernels, graphs and the sampler need some too.
DEVICE_SHARE = 0.9


@dataclass(frozen=True)
class Capacity:
    """Pool sizes and what they mean.

    Attributes:
        pools: reserved page 0 and block 0 included. bytes: all state tensors.
        tokens: that all blocks hold together. context: longest request that fits, alone.
        full_requests: how many run together at that length.
    """

    pools: PoolSizes
    bytes: int
    tokens: int
    context: int
    full_requests: int

    def __str__(self) -> str:
        pools = self.pools
        share = "all" if self.full_requests == pools.slots else f"{self.full_requests} of them"
        return (
            f"{bytes_text(self.bytes)} of state: {pools.slots} requests, {share} at {self.context:,} tokens; "
            f"{pools.blocks} blocks ({self.tokens:,} tokens), {pools.window_pages} pages"
        )


def choose(
    serving: Serving,
    program: ProgramPlan,
    *,
    max_requests: int | None = None,
    memory_bytes: int | None = None,
    num_blocks: int | None = None,
    num_window_pages: int | None = None,
) -> Capacity:
    """Pool sizes within `memory_bytes`; explicit numbers are taken as given.

    None: half of the machine's free memory; for a GPU see `device_memory`.

    Raises:
        ServingError: the memory does not hold one request, or more requests than the artifact is compiled for.
    """
    slots = serving.max_requests if max_requests is None else max_requests
    if not 1 <= slots <= serving.max_requests:
        raise ServingError(f"{slots} requests are asked for; the artifact is compiled for 1 to {serving.max_requests}.")
    unit = pool_bytes(program.states)
    # What each request holds between steps, what one step of prefill needs on top, and the reserved page.
    step_pages = -(-serving.max_batch_tokens // serving.window_page)
    pages = num_window_pages or slots * window_pages(serving) + step_pages + 1
    budget = int(free_memory() * DEFAULT_SHARE) if memory_bytes is None else memory_bytes
    fixed = slots * unit["slots"] + pages * unit["window_pages"]
    full = -(-serving.max_context // serving.block_tokens)
    blocks = num_blocks or _affordable(budget - fixed, unit["blocks"], slots * full) + 1
    if blocks < 2:
        raise ServingError(
            f"{bytes_text(budget)} of memory do not hold the state of {slots} requests: their slots and window pages "
            f"take {bytes_text(fixed)}, a block of {serving.block_tokens} tokens {bytes_text(unit['blocks'])}. "
            "Allow fewer requests, or give more memory."
        )
    tokens = (blocks - 1) * serving.block_tokens
    context = min(serving.max_context, tokens)
    each = -(-context // serving.block_tokens)
    return Capacity(
        PoolSizes(pages, blocks, slots),
        fixed + blocks * unit["blocks"],
        tokens,
        context,
        min(slots, (blocks - 1) // each),
    )


def _affordable(budget: int, block: int, wanted: int) -> int:
    """Blocks that fit, the reserved one left aside; a model without compressed layers has blocks of no bytes."""
    return wanted if block == 0 else max(0, min(wanted, budget // block - 1))


def free_memory() -> int:
    """Bytes of memory that this process could still take, by the operating system's word and its control group's."""
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    info = Path("/proc/meminfo")
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            free = int(fields["MemAvailable"].split()[0]) * 1024
    return min(free, _group_memory(Path("/sys/fs/cgroup")) or free)


def device_memory(artifact: LoadedArtifact) -> int:
    """Bytes of a GPU's free memory for state: what weights, arena and values leave, and some for the driver.

    Raises:
        ServingError: they leave none.
    """
    known, program = weights(artifact.program, artifact.regions), artifact.program
    taken = known.bytes + known.prepared + program.arena_bytes + 2 * program.values_bytes
    free = torch.cuda.mem_get_info()[0]
    if free <= taken:
        raise ServingError(
            f"The GPU has {bytes_text(free)} of free memory; weights take {bytes_text(known.bytes + known.prepared)}, "
            f"a step {bytes_text(taken - known.bytes - known.prepared)}. Close other programs, or compile with a "
            "smaller --max-batch-tokens."
        )
    return int((free - taken) * DEVICE_SHARE)


def _group_memory(group: Path) -> int | None:
    """What the control group (version 2) of a container leaves; None where there is no limit."""
    try:
        limit, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text()
    except OSError:
        return None
    return max(0, int(limit) - int(used)) if limit.isdigit() else None


def open_executor(
    path: Path,
    *,
    max_requests: int | None = None,
    memory_bytes: int | None = None,
    num_blocks: int | None = None,
    num_window_pages: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    parallel: str | None = None,
    peers: Peers | None = None,
) -> tuple[Executor, Capacity]:
    """Load and verify an artifact and give it pools as `choose` sizes them; `progress` is told each file.

    `parallel` selects the layout of the artifact that is run with `peers`, whose pools are sized by the least memory of
    any of them; None: the whole model, on this rank alone.

    Raises:
        ArtifactError: the artifact is damaged, has no weights, or is for another target.
        ServingError: see `choose`; the artifact does not hold this layout.
    """
    if parallel is not None:
        raise ServingError(f"{path} holds the model for one rank, not for --parallel {parallel}. Compile it with that.")
    artifact = load(path, progress)
    if memory_bytes is None and artifact.manifest.arch:
        memory_bytes = device_memory(artifact)
    if memory_bytes is not None and peers is not None:
        memory_bytes = peers.least(memory_bytes)
    capacity = choose(
        artifact.manifest.serving, artifact.program, max_requests=max_requests, memory_bytes=memory_bytes,
        num_blocks=num_blocks, num_window_pages=num_window_pages,
    )  # fmt: skip
    return Executor(artifact, capacity.pools), capacity
