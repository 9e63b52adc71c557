"""Pool sizes: in full where the memory suffices, fewer blocks where it does not, an error where nothing fits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from atomc.artifact.facts import pool_bytes
from atomc.artifact.manifest import Serving
from atomc.artifact.plan import CallPlan, ProgramPlan, RegionInput, RegionPlan, SlotInfo, StateTensor
from atomc.runtime.capacity import choose, device_memory, free_memory
from atomc.runtime.errors import ServingError

SERVING = Serving(
    model_name="m", vocab_size=10, bos_id=0, eos_ids=[1], window=32, window_page=16, block_tokens=256, csa_ratio=4,
    hca_ratio=16, max_context=1000, max_batch_tokens=64, max_requests=4, max_logit_rows=4, window_table_width=7,
    block_table_width=4,
)  # fmt: skip
STATES = {
    "layers.0.": [StateTensor("window", "window_pages", [16, 10], "float32")],
    "layers.1.": [
        StateTensor("window", "window_pages", [16, 10], "float32"),
        StateTensor("rows", "blocks", [64, 5], "bfloat16"),
        StateTensor("partial", "slots", [3], "int32"),
    ],
}
PROGRAM = ProgramPlan(calls=[], symbols={}, states=STATES, values_bytes=0, arena_bytes=0)
PAGE, BLOCK, SLOT = 2 * 640, 640, 12
# Three pages hold the window of a request wherever it begins; four hold the tokens of a step; page 0 is reserved.
PAGES = 4 * 3 + 4 + 1


def test_a_unit_of_each_pool_counts_all_layers() -> None:
    assert pool_bytes(STATES) == {"window_pages": PAGE, "blocks": BLOCK, "slots": SLOT}


def test_with_memory_enough_all_requests_have_the_whole_context() -> None:
    capacity = choose(SERVING, PROGRAM, memory_bytes=1 << 30)
    assert (capacity.pools.slots, capacity.pools.window_pages, capacity.pools.blocks) == (4, PAGES, 4 * 4 + 1)
    assert capacity.context == 1000
    assert capacity.full_requests == 4
    assert capacity.bytes == 4 * SLOT + PAGES * PAGE + 17 * BLOCK
    assert "4 requests, all at 1,000 tokens" in str(capacity)


@pytest.mark.parametrize(("blocks", "context", "full"), [(9, 1000, 2), (5, 1000, 1), (4, 768, 1), (2, 256, 1)])
def test_less_memory_means_fewer_blocks(blocks: int, context: int, full: int) -> None:
    memory = 4 * SLOT + PAGES * PAGE + blocks * BLOCK
    for spare in (0, BLOCK - 1):
        capacity = choose(SERVING, PROGRAM, memory_bytes=memory + spare)
        assert capacity.pools.blocks == blocks
        assert (capacity.context, capacity.full_requests) == (context, full)
        assert capacity.bytes <= memory + spare
    assert choose(SERVING, PROGRAM, num_blocks=blocks).pools.blocks == blocks


def test_memory_for_no_block_is_refused() -> None:
    with pytest.raises(ServingError, match="do not hold the state of 4 requests"):
        choose(SERVING, PROGRAM, memory_bytes=4 * SLOT + PAGES * PAGE + 2 * BLOCK - 1)
    assert choose(SERVING, PROGRAM, memory_bytes=4 * SLOT + PAGES * PAGE, max_requests=1).pools.slots == 1


@pytest.mark.parametrize("requests", [0, 5])
def test_requests_are_bounded_by_the_artifact(requests: int) -> None:
    with pytest.raises(ServingError, match="compiled for 1 to 4"):
        choose(SERVING, PROGRAM, max_requests=requests)


def test_a_model_without_compressed_layers_has_blocks_of_no_bytes() -> None:
    program = ProgramPlan([], {}, {"layers.0.": STATES["layers.0."]}, 0, 0)
    assert choose(SERVING, program, memory_bytes=PAGES * PAGE + 4 * SLOT).pools.blocks == 17


def test_a_gpus_state_gets_what_weights_and_steps_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = [SlotInfo("w", "weight", [1000], "float32", None, -1, 0, None)]
    region = RegionPlan("r", [RegionInput(0, "weight", "w")], {}, slots, [], [], arena_bytes=0)
    program = ProgramPlan([CallPlan("r", "", {})], {}, STATES, values_bytes=300, arena_bytes=400)
    artifact = SimpleNamespace(program=program, regions={"r": region})
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (10_000, 1 << 40))
    assert device_memory(artifact) == int(0.9 * (10_000 - 4000 - 400 - 600))  # type: ignore[arg-type]
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (5_000, 1 << 40))
    with pytest.raises(ServingError, match=r"4\.9 KiB of free memory; weights take 3\.9 KiB, a step 1000 B"):
        device_memory(artifact)  # type: ignore[arg-type]


def test_free_memory_is_some() -> None:
    assert 1 << 20 < free_memory() < 1 << 50
