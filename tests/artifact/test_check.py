"""The plan checker: every edit that would make a step wrong is refused, even where all hashes agree."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from atomc.artifact.check import check_program
from atomc.artifact.plan import ProgramPlan, RegionPlan
from atomc.artifact.store import ArtifactError
from atomc.runtime.executor import Executor
from atomc.runtime.loader import LoadedArtifact, load
from tests.support.sealed import copy_of, edit

REGION = "layer_csa_topk"
Json = Any
Edit = Callable[[Json], None]


@pytest.fixture
def region(artifact: Path) -> Json:
    return json.loads((artifact / "plan" / f"{REGION}.json").read_bytes())


@pytest.fixture
def program(artifact: Path) -> Json:
    return json.loads((artifact / "plan" / "program.json").read_bytes())


def check(artifact: Path, region: Json | None = None, program: Json | None = None) -> None:
    """Check the artifact with one of its plans changed."""
    loaded = whole(artifact)
    plan, regions = loaded.program, dict(loaded.regions)
    if region is not None:
        regions[REGION] = msgspec.convert(region, RegionPlan)
    if program is not None:
        plan = msgspec.convert(program, ProgramPlan)
    check_program("edited", loaded.manifest, plan, regions, loaded.weights)


@cache
def whole(artifact: Path) -> LoadedArtifact:
    return load(artifact)


def refused(artifact: Path, message: str, **changed: Json) -> None:
    with pytest.raises(ArtifactError) as raised:
        check(artifact, **changed)
    assert message in raised.value.message, raised.value.message


def slot(region: Json, name: str) -> Json:
    return next(s for s in region["slots"] if s["name"] == name)


def step(region: Json, op: str) -> Json:
    return next(s for s in region["steps"] if s["op"] == op)


def temporary(region: Json, owned: bool = True) -> tuple[int, Json]:
    """A temporary with a storage of its own, or a view."""
    return next(
        (i, s) for i, s in enumerate(region["slots"]) if s["role"] == "temporary" and (s["base"] is None) == owned
    )


def test_the_compiler_writes_what_the_checker_accepts(artifact: Path) -> None:
    check(artifact)


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op",
    ["aten.mul", "aten.mul.Nothing", "aten..Tensor", "os.system.default", "prims.add.default", "aten.__class__.default",
     "atom.nothing.default", "aten.mul.Tensor.x", "quantized.add.default"],
)  # fmt: skip
def test_unknown_operators(artifact: Path, region: Json, op: str) -> None:
    region["steps"][3]["op"] = op
    refused(artifact, "no such operator", region=region)


def set_arg(at: int, value: Json) -> Callable[[Json], None]:
    return lambda found: found["args"].__setitem__(at, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_arg(0, {"type": "slot", "id": 9999}), "slot 9999, which is not there"),
        (set_arg(0, {"type": "slot", "id": -1}), "slot -1, which is not there"),
        (set_arg(0, None), "not Tensor"),
        (set_arg(0, "x"), "not Tensor"),
        (set_arg(0, [1, 2]), "not Tensor"),
        (lambda found: found["args"].pop(), "argument 'weight' is missing"),
        (lambda found: found["args"].extend([None, None]), "the operator takes 3"),
        (lambda found: found["kwargs"].update(surprise=1), "has no arguments ['surprise']"),
        (lambda found: found["kwargs"].update(weight=1), "given twice"),
        (lambda found: found["outputs"].append(None), "2 results; the operator has 1"),
        (lambda found: found.update(outputs=[]), "0 results; the operator has 1"),
        (lambda found: found.update(outputs=[9999]), "result slot 9999 is out of range"),
        (lambda found: found.update(outputs=[0]), "has a value already"),
        (lambda found: found.update(release=[9999]), "releases [9999], which are not there"),
    ],
)
def test_arguments_and_results(artifact: Path, region: Json, change: Edit, message: str) -> None:
    change(step(region, "aten.linear.default"))
    refused(artifact, message, region=region)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"type": "size", "expr": "Q"}], "unknown symbol 'Q'"),
        ([{"type": "size", "expr": "f(T)"}], "not a size expression"),
        ([{"type": "size", "expr": "T//0"}], "positive integer"),
        ([1.5], "is 1.5, not int"),
        ([True], "is True, not int"),
        ([1 << 64], "not int"),
        (3, "not a list"),
        ({"type": "dtype", "name": "float32"}, "not a list"),
    ],
)
def test_lists_of_sizes(artifact: Path, region: Json, value: Json, message: str) -> None:
    step(region, "aten.reshape.default")["args"][1] = value
    refused(artifact, message, region=region)


def test_a_value_is_not_read_before_it_is_there(artifact: Path, region: Json) -> None:
    steps = region["steps"]
    at = steps.index(step(region, "aten.linear.default"))
    steps.insert(0, steps.pop(at))
    refused(artifact, "which is not there yet", region=region)


def test_a_value_is_not_read_after_its_release(artifact: Path, region: Json) -> None:
    at = next(i for i, s in enumerate(region["steps"]) if s["release"])
    steps = region["steps"]
    gone = steps[at]["release"].copy()
    steps[at]["release"] = []
    steps[at - 1]["release"] += gone
    refused(artifact, "", region=region)


@pytest.mark.parametrize("role", ["weight", "batch", "value"])
def test_nothing_but_state_and_temporaries_is_written(artifact: Path, region: Json, role: str) -> None:
    inputs = [i["slot"] for i in region["inputs"] if i["role"] == role]
    step(region, "atom.compressor_update.default")["args"][0] = {"type": "slot", "id": inputs[0]}
    refused(artifact, f"which is or views {role}", region=region)


# -- slots -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "complex64"}, "dtype 'complex64' is unknown"),
        ({"shape": ["T", -1]}, "size -1 is negative"),
        ({"shape": ["T - 100"]}, "is negative"),
        ({"shape": ["T/2"]}, "not a size expression"),
        ({"base": 9999}, "is no other slot"),
        ({"base": -1}, "is no other slot"),
        ({"base": 0}, "cannot be a view of slot 0"),
        ({"role": "weight"}, ""),
        ({"role": "value"}, ""),
        ({"first": 0, "last": 1}, "lives from 0 to 1"),
        ({"offset": None}, "it needs one"),
        ({"offset": -256}, "no multiple"),
        ({"offset": 100}, "no multiple"),
        ({"offset": 1 << 40}, "the temporaries end at"),
    ],
)
def test_slots(artifact: Path, region: Json, change: Json, message: str) -> None:
    temporary(region)[1].update(change)
    refused(artifact, message, region=region)


def test_a_view_has_no_place_of_its_own(artifact: Path, region: Json) -> None:
    temporary(region, owned=False)[1]["offset"] = 0
    refused(artifact, "must not have one", region=region)


def test_a_view_stays_a_view(artifact: Path, region: Json) -> None:
    sliced = step(region, "aten.slice.Tensor")["outputs"][0]
    region["slots"][sliced]["base"] = None
    refused(artifact, "must be a view of an argument", region=region)


def test_live_temporaries_do_not_overlap(artifact: Path, region: Json) -> None:
    owned = [(i, s) for i, s in enumerate(region["slots"]) if s["offset"] is not None]
    pairs = [(a, b) for _, a in owned for _, b in owned if a["first"] < b["first"] <= a["last"]]
    first, second = pairs[0]
    second["offset"] = first["offset"]
    refused(artifact, "overlaps slot", region=region)


def test_the_arena_is_as_large_as_its_temporaries(artifact: Path, region: Json, program: Json) -> None:
    region["arena_bytes"] += 256
    refused(artifact, "but the temporaries end at", region=region)
    program["arena_bytes"] -= 256
    refused(artifact, "the largest region's", program=program)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(slot=9999), "slot 9999 is out of range"),
        (lambda i: i.update(role="state"), "cannot be bound so"),
        (lambda i: i.update(name="surprise"), ""),
    ],
)
def test_inputs(artifact: Path, region: Json, change: Edit, message: str) -> None:
    for role in ("weight", "batch", "value"):
        changed = copy.deepcopy(region)
        change(next(i for i in changed["inputs"] if i["role"] == role))
        refused(artifact, message, region=changed)


def test_a_slot_is_bound_once(artifact: Path, region: Json) -> None:
    region["inputs"].append(region["inputs"][0])
    refused(artifact, "bound twice", region=region)


def test_outputs_are_values(artifact: Path, region: Json) -> None:
    region["outputs"]["y"] = temporary(region)[0]
    refused(artifact, "is no value", region=region)


def test_a_batch_field_has_the_shape_of_a_batch(artifact: Path, region: Json) -> None:
    slot(region, "batch_positions")["shape"] = ["B"]
    refused(artifact, "a batch has ['T'] int32", region=region)


# -- the program -------------------------------------------------------------------------------------------------------


def drop_call(at: int) -> Edit:
    return lambda program: program["calls"].pop(at)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_call(0), "which nothing before it makes"),
        (drop_call(-1), "needs value 'logits'"),
        (lambda p: p["calls"].insert(0, p["calls"][-1]), "which nothing before it makes"),
        (lambda p: p["calls"][1].update(prefix="layers.7."), "needs state 'layers.7.window'"),
        (lambda p: p["calls"][1]["binds"].update(surprise="h"), "no value inputs of the region"),
        (lambda p: p["calls"][1]["binds"].update({"rope.tokens.cos": "h"}), "needs value 'h' as"),
        (lambda p: p["calls"][1]["binds"].update({"rope.tokens.cos": "nothing"}), "nothing before it makes"),
        (lambda p: p["symbols"].update(T=1 << 20), "by the limits"),
        (lambda p: p["symbols"].pop("T"), "by the limits"),
        (lambda p: p["states"]["layers.0."][0].update(shape=[1, 2]), "needs state 'layers.0.window' as"),
        (lambda p: p["states"]["layers.0."][0].update(dtype="int8"), "needs state 'layers.0.window' as"),
        (lambda p: p["states"]["layers.0."][0].update(dtype="x"), "dtype 'x'"),
        (lambda p: p["states"]["layers.0."].append(p["states"]["layers.0."][0]), "is there twice"),
        (lambda p: p["states"].pop("layers.0."), "needs state 'layers.0.window'"),
        (lambda p: p.update(values_bytes=0), "are alive at one time"),
    ],
)
def test_the_program(artifact: Path, program: Json, change: Edit, message: str) -> None:
    change(program)
    refused(artifact, message, program=program)


# -- weights -----------------------------------------------------------------------------------------------------------


def test_weights_are_exactly_those_of_the_plan(artifact: Path) -> None:
    loaded = whole(artifact)

    def refused_with(weights: dict[str, Any], message: str) -> None:
        with pytest.raises(ArtifactError) as raised:
            check_program("edited", loaded.manifest, loaded.program, loaded.regions, weights)
        assert message in raised.value.message

    name = "layers.0.attn.wq_b.weight"
    tensor = loaded.weights[name]
    rest = {k: v for k, v in loaded.weights.items() if k != name}
    refused_with(rest, f"'{name}', which the plan needs, is in no file")
    refused_with(loaded.weights | {name: tensor.T}, "the plan says")
    refused_with(loaded.weights | {name: tensor.double()}, "float64; the plan says")
    refused_with(loaded.weights | {"surprise": tensor}, "the plan needs no such weight")


# -- any edit ----------------------------------------------------------------------------------------------------------


def places(value: Json, path: tuple[Json, ...] = ()) -> list[tuple[Json, ...]]:
    """Paths of all scalars."""
    if isinstance(value, dict):
        return [p for k, v in value.items() for p in places(v, (*path, k))]
    if isinstance(value, list):
        return [p for i, v in enumerate(value) for p in places(v, (*path, i))]
    return [path]


def set_at(value: Json, path: tuple[Json, ...], new: Json) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


VALUES: list[Json] = [None, -1, 0, 1, 7, 1 << 40, 0.5, "", "T", "x", True, [], [0], {"type": "slot", "id": 1}]


def test_no_edit_of_a_plan_crashes_the_checker(artifact: Path, region: Json, program: Json) -> None:
    rng = random.Random(0)
    accepted = 0
    for _ in range(600):
        for kind, original in (("region", region), ("program", program)):
            changed = copy.deepcopy(original)
            path = rng.choice(places(changed))
            set_at(changed, path, rng.choice(VALUES))
            if json.dumps(changed) == json.dumps(original):
                continue
            try:
                check(artifact, **{kind: changed})
            except (ArtifactError, msgspec.ValidationError):
                continue
            accepted += 1
            assert harmless(path), (kind, path, changed)
    assert accepted > 0


def harmless(path: tuple[Json, ...]) -> bool:
    """What runs or fails in the rehearsal: names, constants of operators, more memory than is needed, the sizes of
    temporaries, which the operators decide."""
    parts = ("name", "source", "values_bytes", "args", "kwargs", "shape", "dtype")
    return any(part in path for part in parts)


def test_an_edited_plan_that_is_accepted_fails_in_the_rehearsal(artifact: Path, tmp_path: Path) -> None:
    """A constant that the checker cannot judge: the executor's first run does, before any request."""
    folder = copy_of(artifact, tmp_path)

    def change(region: Json) -> None:
        step(region, "aten.reshape.default")["args"][1] = [7, 7, 7]

    edit(folder, f"plan/{REGION}.json", change)
    with pytest.raises(ArtifactError, match=r"the plan does not run: .*in step \d+ of region layer_csa_topk"):
        Executor.load(folder, num_blocks=4, num_window_pages=8)
