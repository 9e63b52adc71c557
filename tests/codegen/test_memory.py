"""The buffer planner: nothing that lives at one time overlaps, and little is wasted."""

from __future__ import annotations

import random
import statistics

from hypothesis import given
from hypothesis import strategies as st

from atomc.artifact.buffers import Buffer, aligned, lower_bound, value_buffers
from atomc.artifact.plan import ALIGNMENT, CallPlan, RegionInput, RegionPlan, SlotInfo
from atomc.codegen.memory import place, program_values_bytes

SIZES = st.integers(0, 5000) | st.sampled_from([0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1])
SPANS = st.tuples(st.integers(0, 30), st.integers(0, 12))


@st.composite
def buffers(draw: st.DrawFn) -> list[Buffer]:
    spans = draw(st.lists(st.tuples(SIZES, SPANS), max_size=25))
    return [Buffer(i, size, first, first + length) for i, (size, (first, length)) in enumerate(spans)]


@given(buffers())
def test_live_buffers_do_not_overlap(found: list[Buffer]) -> None:
    offsets, total = place(found)
    assert offsets.keys() == {b.id for b in found}
    for a in found:
        assert offsets[a.id] % ALIGNMENT == 0
        assert 0 <= offsets[a.id] <= total - aligned(a.size)
        for b in found[a.id + 1 :]:
            if a.meets(b):
                assert (
                    offsets[a.id] + aligned(a.size) <= offsets[b.id] or offsets[b.id] + aligned(b.size) <= offsets[a.id]
                )


@given(buffers())
def test_the_arena_is_between_the_bounds(found: list[Buffer]) -> None:
    _, total = place(found)
    assert lower_bound(found) <= total <= sum(aligned(b.size) for b in found)


@given(buffers(), st.randoms(use_true_random=False))
def test_the_order_of_the_list_does_not_matter(found: list[Buffer], rng: random.Random) -> None:
    shuffled = found.copy()
    rng.shuffle(shuffled)
    assert place(shuffled) == place(found)


def test_buffers_that_never_meet_share_one_place() -> None:
    offsets, total = place([Buffer(i, 1000, 2 * i, 2 * i + 1) for i in range(10)])
    assert set(offsets.values()) == {0}
    assert total == aligned(1000)


def test_nothing_needs_nothing() -> None:
    assert place([]) == ({}, 0)
    assert lower_bound([]) == 0


def test_random_plans_waste_little() -> None:
    """Sizes and lifetimes as in a layer: many short lives, a few long ones. Most plans reach the bound."""
    rng = random.Random(0)
    waste = []
    for _ in range(200):
        lives = [(rng.randrange(40), rng.choice([1, 1, 2, 3, 25]), rng.choice([1, 4, 16, 64])) for _ in range(50)]
        found = [Buffer(i, size * 4096, first, first + length) for i, (first, length, size) in enumerate(lives)]
        waste.append(place(found)[1] / lower_bound(found))
    assert statistics.median(waste) == 1.0
    assert max(waste) < 1.2


# -- values between calls ----------------------------------------------------------------------------------------------


def region(name: str, reads: list[str], makes: dict[str, str | None], size: int = 64) -> RegionPlan:
    """A region that reads values and makes some; a made value given as another's name is a view of that."""
    slots = [SlotInfo(n, "value", [size], "float32", None, -1, 0, None) for n in reads]
    outputs: dict[str, int] = {}
    for made, base in makes.items():
        outputs[made] = len(slots)
        slots.append(SlotInfo(made, "value", [size], "float32", None if base is None else outputs[base], 0, 1, None))
    inputs = [RegionInput(i, "value", n) for i, n in enumerate(reads)]
    return RegionPlan(name, inputs, outputs, slots, [], [], 0)


def test_a_value_lives_until_its_last_reader() -> None:
    regions = {r.name: r for r in (region("a", [], {"x": None, "z": None}), region("b", ["x"], {"x": None}),
                                   region("c", ["x", "z"], {"logits": None}))}  # fmt: skip
    calls = [CallPlan(name, "", {}) for name in ("a", "b", "b", "c")]
    lives = [(b.first, b.last) for b in value_buffers(calls, regions, {})]
    assert lives == [(0, 1), (0, 3), (1, 2), (2, 3), (3, 3)]
    assert program_values_bytes(calls, regions, {}) == 3 * 256  # z, and x before and after


def test_binds_rename_what_is_read() -> None:
    regions = {"a": region("a", [], {"x": None, "y": None}), "b": region("b", ["in"], {"logits": None})}
    calls = [CallPlan("a", "", {}), CallPlan("b", "", {"in": "y"})]
    assert [(b.first, b.last) for b in value_buffers(calls, regions, {})] == [(0, 0), (0, 1), (1, 1)]


def test_views_of_one_storage_are_one_buffer() -> None:
    regions = {"a": region("a", [], {"x": None, "y": "x"}), "b": region("b", ["y"], {"logits": None})}
    calls = [CallPlan("a", "", {}), CallPlan("b", "", {})]
    assert [(b.first, b.last) for b in value_buffers(calls, regions, {})] == [(0, 1), (1, 1)]
