"""The executor: logits of the eager model however a sequence is cut, memory as planned, batches checked."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from atomc.artifact.buffers import aligned, slot_bytes
from atomc.artifact.check import check_program
from atomc.artifact.order import STREAMS
from atomc.artifact.plan import CallPlan, RegionPlan
from atomc.artifact.store import ArtifactError
from atomc.models.deepseek_v4.config import load_config
from atomc.models.deepseek_v4.model import DeepseekV4
from atomc.models.deepseek_v4.reader import CheckpointReader
from atomc.models.deepseek_v4.weights import load_parameters
from atomc.ops import Batch
from atomc.runtime.bind import Environment, Sizes
from atomc.runtime.errors import BatchError, ServingError
from atomc.runtime.executor import Executor, PoolSizes
from atomc.runtime.graphs import Staging, buckets_of
from atomc.runtime.loader import device_arch, load
from atomc.runtime.watch import MemoryWatch, PlanMismatchError, predicted_bytes
from tests.support.eager import Step, run
from tests.support.imports import loaded_after
from tests.support.launched import launched
from tests.support.paged import Paged
from tests.support.sealed import copy_of, edit

BLOCKS, PAGES = 12, 40
POOLS = ("window_pages", "blocks", "slots")


def opened(artifact: Path, blocks: int = BLOCKS, pages: int = PAGES, requests: int | None = None) -> Executor:
    return Executor.load(artifact, num_blocks=blocks, num_window_pages=pages, max_requests=requests)


@pytest.fixture(scope="module")
def executor(artifact: Path) -> Executor:
    return opened(artifact)


@pytest.fixture(scope="module")
def eager(model_folder: Path) -> DeepseekV4:
    config = load_config(model_folder / "checkpoint")
    model = DeepseekV4(config)
    load_parameters(model, config, CheckpointReader(model_folder / "checkpoint"), "float32")
    return model


def cuts(length: int, sizes: list[int]) -> Iterator[int]:
    """`sizes` again and again until `length` is used up."""
    while length > 0:
        for size in sizes:
            if length > 0:
                yield min(size, length)
                length -= size


@pytest.mark.parametrize("sizes", [[40], [1], [17, 1, 1, 9, 2]], ids=["chunks", "tokens", "mixed"])
def test_logits_are_the_eager_models_however_a_sequence_is_cut(
    executor: Executor, eager: DeepseekV4, sizes: list[int]
) -> None:
    ids = torch.randint(0, 320, (200 if sizes != [1] else 90,))
    expected = run(eager, [ids], [[(0, len(ids))]])[0].logits
    found = Paged(executor, 1).feed([ids], [[(0, n)] for n in cuts(len(ids), sizes)])[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_requests_of_one_step_do_not_see_one_another(executor: Executor, eager: DeepseekV4) -> None:
    sequences = [torch.randint(0, 320, (n,)) for n in (70, 33, 64)]
    steps: list[Step] = [[(0, 20), (1, 15)], [(1, 1), (0, 1), (2, 30)], [(0, 30), (2, 8)]]
    steps += [[(0, 1), (2, 1), (1, 1)]] * 17
    found = Paged(executor, 3).feed(sequences, steps)
    for ids, logits in zip(sequences, found, strict=True):
        expected = run(eager, [ids], [[(0, len(ids))]])[0].logits[: len(logits)]
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


def test_the_logits_wanted_are_those_given(executor: Executor) -> None:
    paged = Paged(executor, 1)
    batch = paged.batch([(0, 0, torch.arange(20))])
    whole = executor.step(batch).clone()
    some = executor.step(batch._replace(logit_rows=torch.tensor([3, 17, 3], dtype=torch.int32)))
    torch.testing.assert_close(some, whole[[3, 17, 3]], atol=1e-5, rtol=1e-5)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_decode_step_padded_to_a_graph_is_the_step_itself(artifact: Path) -> None:
    """The padding of `runtime.graphs`, run on the cpu: it changes neither logits nor the state of any request."""
    executor = opened(artifact)
    executor.num_slots -= 1  # the last one is for padding
    paged, first = Paged(executor, 3), [9, 17, 15]
    ids = [torch.randint(0, executor.serving.vocab_size, (n + 1,)) for n in first]
    executor.step(paged.batch([(i, 0, ids[i][:n]) for i, n in enumerate(first)]))
    batch = paged.batch([(i, n, ids[i][n:]) for i, n in enumerate(first)])
    before = {name: state.clone() for name, state in executor.states.items()}
    wanted = executor.step(batch)
    after = {name: state.clone() for name, state in executor.states.items()}
    for name, state in executor.states.items():
        state.copy_(before[name])
    staging, bucket = Staging(executor.serving, executor.bounds, torch.device("cpu")), 4
    staging.put_decode(batch, bucket, executor.num_slots)
    sizes = {**dict.fromkeys(("T", "B", "N4", "NH", "L"), bucket), **{p: executor.pools.of(p) for p in POOLS}}
    found = executor._run(staging.views(staging.decode_shapes(bucket)), sizes)["logits"]
    torch.testing.assert_close(found[:3], wanted, rtol=0, atol=1e-5)
    for name, state in executor.states.items():
        rows = slice(1, executor.num_slots if state.shape[0] == executor.num_slots + 1 else None)
        torch.testing.assert_close(state[rows], after[name][rows], rtol=0, atol=1e-5, equal_nan=True)


def test_streams_change_nothing_where_steps_run_in_order(artifact: Path) -> None:
    """The plan as if each step were launched: chains go aside, the checker agrees, the cpu computes the same."""
    loaded = load(artifact)
    regions = {name: launched(region, loaded.program.symbols) for name, region in loaded.regions.items()}
    program = msgspec.structs.replace(loaded.program, arena_bytes=max(r.arena_bytes for r in regions.values()))
    check_program("launched", loaded.manifest, program, regions, loaded.weights)
    csa = regions["layer_csa_topk"].steps
    assert {step.stream for step in csa} == set(range(STREAMS)) and any(step.waits for step in csa)
    ids, found = torch.arange(40), []
    for artifact_ in (loaded, dataclasses.replace(loaded, program=program, regions=regions)):
        executor = Executor(artifact_, PoolSizes(PAGES, BLOCKS, 4))
        torch.manual_seed(0)
        paged = Paged(executor, 2)
        found.append(executor.step(paged.batch([(0, 0, ids[:33]), (1, 0, ids[:9])])))
        found.append(executor.step(paged.batch([(0, 33, ids[33:34]), (1, 9, ids[9:10])])))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_a_batch_arrives_as_it_is(executor: Executor) -> None:
    batch = Paged(executor, 2).batch([(0, 0, torch.arange(9)), (1, 3, torch.arange(4))])
    fields = Staging(executor.serving, executor.bounds, torch.device("cpu")).put(batch)
    assert all(torch.equal(fields[name], getattr(batch, name)) for name in Batch._fields)


def test_a_gpu_without_memory_is_the_users_error(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB. GPU 0 has none.")

    monkeypatch.setattr(Executor, "_bind", none)
    with pytest.raises(ServingError, match=r"does not hold the model with these caches: Tried to allocate 2\.00 GiB\."):
        opened(artifact)


def test_a_decode_step_leaves_nothing_to_the_next(executor: Executor) -> None:
    """Fewer windows may end than there are requests, even where a batch fills its bucket."""
    paged, staging = Paged(executor, 2), Staging(executor.serving, executor.bounds, torch.device("cpu"))
    full = paged.batch([(0, 3, torch.arange(1)), (1, 7, torch.arange(1))])
    none = paged.batch([(0, 4, torch.arange(1)), (1, 5, torch.arange(1))])
    assert full.csa_ends.tolist() == [0, 1] and none.csa_ends.tolist() == [-1]
    for batch, ends in ((full, [0, 1]), (none, [-1, -1])):
        staging.put_decode(batch, 2, executor.num_slots)
        fields = staging.views(staging.decode_shapes(2))
        assert fields["csa_ends"].tolist() == ends
        assert fields["window_table"].tolist() == batch.window_table.tolist()


@pytest.mark.parametrize(("most", "last"), [(1, (1,)), (3, (1, 2, 3)), (64, (48, 56, 64)), (300, (256, 288, 300))])
def test_the_buckets_of_graphs_end_with_the_most(most: int, last: tuple[int, ...]) -> None:
    assert buckets_of(most)[-len(last) :] == last and list(buckets_of(most)) == sorted(set(buckets_of(most)))


def test_live_bytes_are_what_the_plan_predicts(executor: Executor) -> None:
    """After each step of each region: shapes, dtypes, storages, and the bytes of live temporaries, exactly."""
    watch = MemoryWatch()
    Paged(executor, 2).feed([torch.arange(60), torch.arange(50)], [[(0, 25), (1, 15)], [(0, 2), (1, 2)]], watch)
    assert watch.steps == 2 * sum(len(call.plan.steps) for call in executor.calls)
    assert set(watch.peaks) == {call.plan.name for call in executor.calls}


def test_the_largest_step_fills_the_arena_within_its_alignment(executor: Executor) -> None:
    serving = executor.serving
    ids = [torch.arange(n) for n in (9, 13, 13, 13)]
    assert (len(ids), sum(map(len, ids))) == (serving.max_requests, serving.max_batch_tokens)
    paged = Paged(executor, 4)
    batch = paged.batch([(i, 3, t) for i, t in enumerate(ids)])
    watch = MemoryWatch()
    executor.step(batch, watch)
    sizes = executor.bounds | {"N4": len(batch.csa_ends), "NH": len(batch.hca_ends)}
    for plan in {call.plan.name: call.plan for call in executor.calls}.values():
        assert watch.peaks[plan.name] == max(predicted_bytes(plan, at, sizes) for at in range(len(plan.steps)))
        assert watch.peaks[plan.name] <= plan.arena_bytes


def test_arenas_are_close_to_the_least_possible(executor: Executor) -> None:
    for plan in {call.plan.name: call.plan for call in executor.calls}.values():
        owned = [s for s in plan.slots if s.offset is not None]
        live = [
            sum(aligned(slot_bytes(s, executor.bounds)) for s in owned if s.first <= at <= s.last)
            for at in range(len(plan.steps))
        ]
        assert max(live) <= plan.arena_bytes <= 1.1 * max(live)


class Leftovers:
    """Names of the temporaries that are still there when a region ends."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def before(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        pass

    def after(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        if at == len(region.steps) - 1:
            left = [i for i, s in enumerate(region.slots) if s.role == "temporary" and env[i] is not None]
            self.found[region.name] = [region.slots[i].name for i in left if i not in region.steps[at].release]


def test_everything_is_released_at_its_last_use(executor: Executor) -> None:
    leftovers = Leftovers()
    executor.step(Paged(executor, 1).batch([(0, 0, torch.arange(8))]), leftovers)
    assert leftovers.found == {call.plan.name: [] for call in executor.calls}


class Calls:
    """The calls whose steps were seen; the first run is broken off."""

    def __init__(self, break_at: int) -> None:
        self.found: list[CallPlan] = []
        self.left = break_at

    def before(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        assert call.region == region.name
        self.found += [call] if at == 0 else []
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("enough")

    def after(self, call: CallPlan, region: RegionPlan, at: int, env: Environment, sizes: Sizes) -> None:
        assert call is self.found[-1]


def test_a_watch_is_told_the_call_whatever_happened_before(executor: Executor) -> None:
    batch = Paged(executor, 1).batch([(0, 0, torch.arange(8))])
    calls = Calls(break_at=len(executor.calls[0].plan.steps) + 3)
    with pytest.raises(RuntimeError, match="enough"):
        executor.step(batch, calls)
    assert [c.prefix for c in calls.found] == [c.call.prefix for c in executor.calls[:2]]
    calls.found.clear()
    executor.step(batch, calls)
    assert [c.prefix for c in calls.found] == [c.call.prefix for c in executor.calls]


def test_a_watch_sees_a_plan_that_is_wrong(artifact: Path) -> None:
    loaded = load(artifact)
    name = "layer_csa_topk"
    plan = loaded.regions[name]
    at = next(i for i, s in enumerate(plan.slots) if s.role == "temporary" and s.base is None)
    view = next(i for i, s in enumerate(plan.slots) if s.base is not None)
    for slot, change, message in (
        (at, {"dtype": "bfloat16"}, "the plan says .* torch.bfloat16"),
        (at, {"shape": ["B"]}, "the plan says"),
        (at, {"last": plan.slots[at].last + 1}, "the plan predicts"),
        (view, {"base": at}, "is no view of"),
    ):
        slots = plan.slots.copy()
        slots[slot] = msgspec.structs.replace(slots[slot], **change)
        regions = loaded.regions | {name: msgspec.structs.replace(plan, slots=slots)}
        executor = Executor(dataclasses.replace(loaded, regions=regions), PoolSizes(PAGES, BLOCKS, 4))
        with pytest.raises(PlanMismatchError, match=message):
            executor.step(Paged(executor, 1).batch([(0, 0, torch.arange(8))]), MemoryWatch())


# -- batches and pools -------------------------------------------------------------------------------------------------


def test_batches_that_the_artifact_is_not_compiled_for(executor: Executor) -> None:
    paged = Paged(executor, 4)
    good = paged.batch([(0, 0, torch.arange(8))])
    long = torch.arange(49)
    wrong = [
        (paged.batch([(0, 0, long)]), "T = 49"),
        (good._replace(logit_rows=torch.zeros(41, dtype=torch.int32)), "L = 41"),
        (good._replace(logit_rows=good.logit_rows[:0]), "L = 0"),
        (good._replace(csa_ends=torch.full((50,), -1, dtype=torch.int32)), "N4 = 50"),
        (good._replace(hca_ends=good.hca_ends[:0]), "NH = 0"),
        (good._replace(ids=good.ids.long()), "batch.ids is [8] torch.int64"),
        (good._replace(positions=good.positions[1:]), "batch.positions is [7]"),
        (good._replace(window_table=good.window_table[:, 1:]), "batch.window_table"),
        (good._replace(query_start=good.query_start[1:]), "batch.query_start"),
        (good._replace(logit_rows=torch.zeros(good.ids.shape[0] + 1, dtype=torch.int32)), "rows of logits"),
    ]
    for batch, message in wrong:
        with pytest.raises(BatchError) as raised:
            executor.step(batch)
        assert message in raised.value.message


def test_an_error_inside_a_step_says_where(executor: Executor) -> None:
    batch = Paged(executor, 1).batch([(0, 0, torch.arange(8))])
    with pytest.raises(IndexError) as raised:
        executor.step(batch._replace(ids=batch.ids + 10_000))
    (note,) = raised.value.__notes__
    assert re.fullmatch(r"in step 0 of region prologue: aten\.embedding\.default \(deepseek_v4/model\.py:\d+\)", note)


def test_the_largest_batches_fit_the_bounds(executor: Executor) -> None:
    """The most windows complete when every request but one needs a single token for its first."""
    serving = executor.serving
    tokens, requests = serving.max_batch_tokens, serving.max_requests
    for ratio, symbol in ((serving.csa_ratio, "N4"), (serving.hca_ratio, "NH")):
        first = ratio - 1
        lengths = [1] * (requests - 1) + [tokens - requests + 1]
        windows = sum((first + n) // ratio for n in lengths)
        assert windows == executor.bounds[symbol]


@pytest.mark.parametrize("pool", ["blocks", "pages", "requests"])
def test_empty_pools_are_refused(artifact: Path, pool: str) -> None:
    with pytest.raises(ServingError, match="at least 1 is needed"):
        opened(artifact, **{pool: 0})


def test_pools_that_no_machine_holds(artifact: Path) -> None:
    with pytest.raises(ServingError, match="No memory for caches"):
        opened(artifact, blocks=1 << 50)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [(torch.OutOfMemoryError("no room"), ServingError, "No memory to expand the weights of prologue: aten."),
     (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), ServingError, "No memory"),
     (RuntimeError("shapes"), ArtifactError, "The weights cannot be prepared, at prologue: aten.")],
)  # fmt: skip
def test_an_error_while_weights_are_prepared_says_where(
    native_artifact: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], said: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("atomc.runtime.executor.BoundStep.run", fail)
    with pytest.raises(kind, match=re.escape(said)):
        opened(native_artifact)


def test_the_rehearsal_leaves_no_trace(artifact: Path) -> None:
    executor = opened(artifact)
    assert all(not state.any() for state in executor.states.values())


@pytest.mark.parametrize(("here", "said"), [("", "has no GPU"), ("sm_80", "has sm_80")])
def test_an_artifact_for_another_gpu_is_refused(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str, said: str
) -> None:
    folder = copy_of(artifact, tmp_path)
    edit(folder, "manifest.json", lambda manifest: manifest.update(target="h100", arch="sm_90"))
    monkeypatch.setattr("atomc.runtime.loader.device_arch", lambda: here)
    with pytest.raises(ArtifactError, match=rf"is compiled for h100 \(sm_90\), and this machine {said}"):
        opened(folder)


def test_the_architecture_of_a_device_is_named_as_a_manifest_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_arch() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert device_arch() == "sm_90"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName="gfx950:sramecc+"))
    assert device_arch() == "gfx950"


def test_an_artifact_without_weights_does_not_run(artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(artifact, tmp_path)
    edit(folder, "manifest.json", lambda manifest: manifest.update(with_weights=False))
    with pytest.raises(ArtifactError, match="--no-weights and can only be inspected"):
        opened(folder)


def test_weights_are_mapped_not_copied(executor: Executor, artifact: Path) -> None:
    """A mapped file has no anonymous memory: its pages are in the process's map under its name."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    assert str(next((artifact / "weights").iterdir())) in maps.read_text()


def test_running_loads_no_compiler(artifact: Path) -> None:
    code = (
        "from pathlib import Path; from atomc.runtime.executor import Executor\n"
        f"Executor.load(Path({str(artifact)!r}), num_blocks=4, num_window_pages=8)\n"
    )
    assert loaded_after(code) == []
