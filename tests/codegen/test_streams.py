"""Streams and what they do to memory: whatever the order in which the streams run, every step finds what it needs."""

from __future__ import annotations

from itertools import combinations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomc.artifact.buffers import aligned, of_bucket, slot_bytes
from atomc.artifact.check_region import Problems, check_region
from atomc.artifact.order import SIDE_TOKENS, STREAMS, check_streams, owners_of
from atomc.artifact.plan import LibraryCall, RegionPlan, Slot, Step
from atomc.codegen.streams import assign
from tests.support.launched import BOUNDS, Region

X, S, T, W = range(4)
KINDS = st.sampled_from(["add", "add", "add", "scratch", "write", "view"])


@st.composite
def regions(draw: st.DrawFn) -> RegionPlan:
    """Random steps over older results, two states read and written in place, views; what is not read is an output."""
    region, there = Region(), [X, W, S, T]
    for _ in range(draw(st.integers(1, 14))):
        kind = draw(KINDS)
        pick = st.sampled_from(there[-6:])
        if kind == "write":
            region.write(draw(st.sampled_from([S, T])), draw(pick))
        elif kind == "view":
            there.append(region.view(draw(pick)))
        else:
            scratch = (32, 256) if kind == "scratch" else ()
            width = draw(st.sampled_from([16, 64, 200]))
            there.append(region.add(draw(pick), draw(pick), width=width, scratch=scratch))  # type: ignore[arg-type]
    last = region.add(there[-1], X)
    return region.plan(last)


def problems(plan: RegionPlan) -> list[str]:
    """What the checker finds, but for the shapes of these made-up steps."""
    found = Problems()
    check_region(found, plan, {}, BOUNDS)
    return found.found


def work(plan: RegionPlan) -> list[int]:
    return [at for at, step in enumerate(plan.steps) if step.buckets]


def reached(plan: RegionPlan, later: int, earlier: int) -> bool:
    """Whether there is a path of waits and of neighbours on a stream, by search."""
    seen, left = set(), [later]
    while left:
        at = left.pop()
        seen.add(at)
        step = plan.steps[at]
        same = [j for j in work(plan) if j < at and plan.steps[j].stream == step.stream]
        left += [j for j in (*same, *step.waits) if j not in seen]
    return earlier in seen - {later}


def bytes_of(plan: RegionPlan, at: int) -> list[tuple[object, int, int, bool]]:
    """(memory, from, to, written) of all that a step of few tokens touches."""
    step, owner, found = plan.steps[at], owners_of(plan.slots), []
    writes = {s for s in step.outputs if s is not None} | {s for b in step.buckets[:1] for s in b.scratch}
    reads = [a.id for a in step.args if isinstance(a, Slot)]
    if step.op == "aten.copy_.default":
        writes |= {reads[0]}
    for slot in {*writes, *reads}:
        info = plan.slots[owner[slot]]
        memory, start = (owner[slot], 0) if info.offset is None else ("arena", info.offset)
        scratch = slot in {s for b in step.buckets for s in b.scratch}
        size = aligned(slot_bytes(info, of_bucket(BOUNDS, 16) if scratch else BOUNDS))
        found.append((memory, start, start + size, slot in writes))
    return found


@given(regions())
def test_no_two_steps_that_may_run_at_once_touch_the_same_bytes(plan: RegionPlan) -> None:
    for a, b in combinations(work(plan), 2):
        if reached(plan, b, a):
            continue
        for memory, low, high, written in bytes_of(plan, a):
            for other, start, end, also in bytes_of(plan, b):
                assert memory != other or high <= start or end <= low or not (written or also), (a, b)


@given(regions())
def test_the_checker_accepts_what_is_assigned(plan: RegionPlan) -> None:
    found = [p for p in problems(plan) if "stream" in p or "overlaps" in p or "waits" in p]
    assert found == []


@given(regions())
def test_no_wait_can_be_left_out(plan: RegionPlan) -> None:
    for at, step in enumerate(plan.steps):
        for wait in step.waits:
            fewer = [w for w in step.waits if w != wait]
            steps = [*plan.steps[:at], msgspec.structs.replace(step, waits=fewer), *plan.steps[at + 1 :]]
            assert not reached(msgspec.structs.replace(plan, steps=steps), at, wait)


@given(regions())
def test_assigning_again_changes_nothing(plan: RegionPlan) -> None:
    assert assign(plan.steps, plan.slots, owners_of(plan.slots)) == plan.steps


def two_chains() -> Region:
    region = Region()
    a = region.add(X, W)
    b = region.add(a, a)
    c = region.add(X, W)
    d = region.add(c, c)
    region.add(b, d)
    return region


def test_chains_that_do_not_need_each_other_go_aside() -> None:
    plan = two_chains().plan(8)
    assert [step.stream for step in plan.steps] == [0, 0, 1, 1, 0]
    assert [step.waits for step in plan.steps] == [[], [], [], [], [3]]


def test_a_chain_stays_on_one_stream() -> None:
    region = Region()
    slot = X
    for _ in range(6):
        slot = region.add(slot, W)
    plan = region.plan(slot)
    assert {step.stream for step in plan.steps} == {0} and not any(step.waits for step in plan.steps)


def test_a_state_is_written_after_those_that_read_it_before_and_before_those_that_read_it_after() -> None:
    region = Region()
    read = region.add(S, X)
    region.write(S, X)
    again = region.add(S, W)
    plan = region.plan(region.add(read, again))
    assert reached(plan, 1, 0) and reached(plan, 2, 1)


def test_where_torch_computes_a_step_nothing_goes_aside() -> None:
    region = two_chains()
    region.steps[0] = msgspec.structs.replace(region.steps[0], buckets=[])
    assert {step.stream for step in region.plan(8).steps} == {0}


def test_scratch_of_many_tokens_does_not_widen_the_arena() -> None:
    """It is never in use beside another stream: only the lifetimes in the plan's order count for it."""
    region = Region()
    a = region.add(X, W, scratch=(64, 64 * 100))  # type: ignore[arg-type]
    b = region.add(X, W)
    c = region.add(b, b, width=64 * 50)
    plan = region.plan(region.add(a, c))
    assert [step.stream for step in plan.steps] == [0, 1, 1, 0]
    small, large = (next(s for s in plan.slots if s.name == f"scratch0_{i}") for i in range(2))
    wide = plan.slots[c]
    assert small.offset is not None and large.offset is not None and wide.offset is not None
    assert large.offset < wide.offset + slot_bytes(wide, BOUNDS) and wide.offset < large.offset + slot_bytes(
        large, BOUNDS
    )
    assert SIDE_TOKENS == 16


# -- plans that are wrong ----------------------------------------------------------------------------------------------


def changed(plan: RegionPlan, at: int, **fields: object) -> RegionPlan:
    steps = [msgspec.structs.replace(s, **fields) if i == at else s for i, s in enumerate(plan.steps)]
    return msgspec.structs.replace(plan, steps=steps)


@pytest.mark.parametrize(
    ("at", "fields", "message"),
    [
        (4, {"waits": []}, "so it may begin before step 3 (aten.add.Tensor) on stream 1 ends, and it needs it"),
        (1, {"stream": 1}, "so it may begin before step 0 (aten.add.Tensor) on stream 0 ends"),
        (3, {"stream": 2}, "so it may begin before step 2 (aten.add.Tensor) on stream 1 ends"),
        (2, {"stream": STREAMS}, f"stream {STREAMS} is out of range: 0 to {STREAMS - 1}"),
        (2, {"stream": -1}, "stream -1 is out of range"),
        (4, {"waits": [9]}, "waits for 9, which is no earlier launched step of another stream"),
        (4, {"waits": [-2]}, "waits for -2, which is no earlier"),
        (2, {"waits": [3]}, "waits for 3, which is no earlier"),
        (4, {"waits": [1, 3]}, "waits for 1, which is no earlier"),
        (4, {"waits": [3, 3]}, "waits for [3, 3], out of order or twice"),
        (
            0,
            {"buckets": []},
            "torch computes it, on memory that the plan does not place",
        ),
        (2, {"buckets": []}, "stream 1, waits [], but it launches nothing"),
    ],
)
def test_a_wrong_stream_or_wait_is_refused(at: int, fields: dict[str, object], message: str) -> None:
    plan = two_chains().plan(8)
    assert problems(plan) == []
    assert any(message in p for p in problems(changed(plan, at, **fields))), problems(changed(plan, at, **fields))


def named(plan: RegionPlan, at: int, bucket: int, call: LibraryCall) -> RegionPlan:
    """The plan with a library's call in one bucket of a step."""
    buckets = list(plan.steps[at].buckets)
    buckets[bucket] = msgspec.structs.replace(buckets[bucket], library=call)
    return changed(plan, at, buckets=buckets)


def test_a_library_runs_only_where_no_stream_is_aside() -> None:
    plan, call = two_chains().plan(8), LibraryCall("scaled_mm", [], [])
    assert problems(named(plan, 1, 1, call)) == []
    assert any("in a bucket that may run on a side stream" in p for p in problems(named(plan, 1, 0, call)))


def test_a_librarys_call_is_known_and_takes_what_is_there() -> None:
    plan = two_chains().plan(8)
    assert any("library call mm is not one of" in p for p in problems(named(plan, 1, 1, LibraryCall("mm", [], []))))
    gone = LibraryCall("scaled_mm", [Slot(8)], [])
    assert any("scaled_mm takes slots [8], which are not there" in p for p in problems(named(plan, 1, 1, gone)))


def test_what_a_library_is_given_is_a_dependency() -> None:
    """Step 3 reads the result of step 1 by its library alone: it must wait for it."""
    plan = two_chains().plan(8)
    given = named(plan, 3, 1, LibraryCall("scaled_mm", [Slot(plan.steps[1].outputs[0] or 0)], []))
    assert any("it may begin before step 1" in p for p in problems(given))


def test_the_last_bucket_has_the_largest_step() -> None:
    plan = two_chains().plan(8)
    few = changed(plan, 1, buckets=plan.steps[1].buckets[:1])
    assert any("its buckets end at 16 tokens, and a step may have 64" in p for p in problems(few))


def test_buffers_of_steps_that_may_run_at_once_must_not_overlap() -> None:
    """In the plan's order the first chain's buffer is free when the second begins; on streams it is not."""
    region = Region()
    a = region.add(X, W)
    b = region.add(a, a)
    region.write(S, b)
    c = region.add(X, W)
    plan = region.plan(region.add(c, c))
    assert problems(plan) == [] and plan.steps[3].stream == 1
    first, second = plan.slots[a], plan.slots[c]
    assert first.last < second.first and first.offset != second.offset
    slots = [msgspec.structs.replace(s, offset=first.offset) if i == c else s for i, s in enumerate(plan.slots)]
    end = max(s.offset + aligned(slot_bytes(s, BOUNDS)) for s in slots if s.offset is not None)
    overlapping = msgspec.structs.replace(plan, slots=slots, arena_bytes=end)
    assert any("overlaps slot" in p for p in problems(overlapping))
    in_order = [msgspec.structs.replace(s, stream=0, waits=[]) for s in plan.steps]
    assert problems(msgspec.structs.replace(overlapping, steps=in_order)) == []


def test_a_step_that_moves_before_what_it_needs_is_refused() -> None:
    plan = two_chains().plan(8)
    steps = [plan.steps[i] for i in (0, 1, 3, 2, 4)]
    assert problems(msgspec.structs.replace(plan, steps=steps)) != []


def conflicts(plan: RegionPlan, a: int, b: int) -> bool:
    """Whether two steps touch one storage, and one of them writes it."""
    owner = owners_of(plan.slots)

    def storages(at: int) -> tuple[set[int], set[int]]:
        step = plan.steps[at]
        read = [owner[arg.id] for arg in step.args if isinstance(arg, Slot)]
        written = {owner[s] for s in step.outputs if s is not None}
        return set(read), written | set(read[:1] if step.op == "aten.copy_.default" else [])

    (read, written), (others, also) = storages(a), storages(b)
    return bool(written & (others | also) or also & read)


@given(regions(), st.data())
def test_the_checker_and_a_search_agree_on_every_change(plan: RegionPlan, data: st.DataObject) -> None:
    at = data.draw(st.sampled_from(work(plan)))
    stream = data.draw(st.integers(0, STREAMS - 1))
    others = [j for j in work(plan) if j < at and plan.steps[j].stream != stream]
    waits = data.draw(st.lists(st.sampled_from(others), max_size=2, unique=True)) if others else []
    made = changed(plan, at, stream=stream, waits=sorted(waits))
    made = msgspec.structs.replace(made, steps=[valid(made, i) for i in range(len(made.steps))])
    found = Problems()
    check_streams(found, made.steps, made.slots)
    right = all(reached(made, b, a) for a, b in combinations(work(made), 2) if conflicts(made, a, b))
    assert (found.found == []) == right, found.found


def valid(plan: RegionPlan, at: int) -> Step:
    """A step without waits for its own stream, which the change of another has made."""
    step = plan.steps[at]
    return msgspec.structs.replace(step, waits=[w for w in step.waits if plan.steps[w].stream != step.stream])
