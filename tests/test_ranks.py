"""What a compile does for many ranks: which numbers a layout has to divide, what is refused, what an artifact holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from atomc.artifact.agreement import prove_layout
from atomc.artifact.check_ranks import CollectivesError, check_ranks
from atomc.artifact.plan import CARRIED, RegionPlan, Slot
from atomc.artifact.ranks import KINDS, NoLayoutError
from atomc.artifact.store import ArtifactError
from atomc.compiler import CompileError, Options, Result, check_stop, compile_model
from atomc.dividing import model_sizes
from atomc.models.deepseek_v4.sharding import placement_of
from atomc.models.source import open_model
from atomc.ops.placement import REPLICATE, Shard
from atomc.parallel.kinds import KINDS as KINDS_OF_COLLECTIVES
from atomc.parallel.kinds import WAIT
from atomc.parallel.layout import LayoutError, ModelSizes
from atomc.passes import shard
from atomc.passes.graph import PassError
from atomc.passes.scheme import get_scheme
from atomc.ranks import layouts_for, layouts_of
from atomc.report import read_explanation
from atomc.runtime.errors import ServingError
from atomc.runtime.loader import load, load_rank, read_plan, read_ranks, read_regions
from atomc.targets import get_target
from atomc.verify.collectives import verify_collectives
from tests.support.artifact import ONE_LAYER
from tests.support.cli import Cli
from tests.support.imports import loaded_after
from tests.support.sealed import copy_of, edit
from tests.support.tiny import random_checkpoint, tiny_config

SMALL = Options(max_context=320, max_batch_tokens=48, max_requests=4, max_logit_rows=40, scheme="none")


def sizes(model: str, scheme: str) -> ModelSizes:
    return model_sizes(open_model(model, with_weights=False).config, get_scheme(scheme))


def test_the_numbers_that_a_layout_divides() -> None:
    flash = sizes("deepseek-v4-flash", "native")
    assert (flash.heads, flash.groups, flash.experts, flash.inner) == (64, 8, 256, 2048)
    assert (flash.vocabulary, flash.block) == (129280, 128)
    assert flash.cut["columns of wo_b"] == (8 * 1024, [128, 128])
    assert sizes("deepseek-v4-flash", "none").block == 1
    assert sizes("deepseek-v4-flash", "ptpc-fp8").block == 2048  # scales of whole rows
    assert sizes("deepseek-v4-pro", "mxfp4").block in (32, 128)
    assert sizes("deepseek-v4-nano", "native").block == 128


def test_a_cut_through_a_block_is_refused() -> None:
    nano = open_model("deepseek-v4-nano", with_weights=False).config
    flash = open_model("deepseek-v4-flash", with_weights=False).config
    assert [str(n) for n in layouts_for(["dp=8,moe=tp"], nano, get_scheme("none"))] == ["dp=8,moe=tp"]
    assert layouts_for(["dp=1"], nano, get_scheme("native")) == ()
    with pytest.raises(LayoutError, match=r"256 columns in blocks of 128 of an expert \(moe=tp\); nearest legal: dp=2"):
        layouts_for(["dp=8,moe=tp"], nano, get_scheme("native"))
    with pytest.raises(LayoutError, match=r"tp=8 cuts through the blocks of 8192 of the 8192 columns of wo_b"):
        layouts_for(["tp=8,moe=ep"], flash, get_scheme("ptpc-fp8"))


def test_layouts_are_read_once_each() -> None:
    assert [str(n) for n in layouts_of(["tp=2", "dp=1", "moe=tp,tp=2", "dp=2,moe=ep"])] == [
        "tp=2,moe=tp",
        "dp=2,moe=ep",
    ]
    with pytest.raises(LayoutError, match="one rank has no collectives to overlap; leave tbo out"):
        layouts_of(["dp=1,tbo=all"])
    with pytest.raises(CompileError, match="leaves nothing to cut for ranks"):
        check_stop("dead_code", get_target("cpu"), ("dp=8",))


def test_hints_follow_the_reference() -> None:
    """Spec 3.7: wq_b and wo_a by outputs, wo_b by inputs, the vocabulary by rows; the rest is whole."""
    whole = ("attn.wq_a|attn.wkv.weight", "attn.indexer.wq_b.weight", "ffn.gate.weight", "ffn.shared_experts.w2.weight")
    assert all(placement_of(path, axis, "tp") == REPLICATE for path in whole for axis in ("dp", "tp"))
    for path in ("attn.wq_b.weight", "attn.wq_b.scale", "attn.wo_a.weight", "attn.attn_sink", "embed.weight"):
        assert placement_of(path, "tp", "tp") == Shard(0)
        assert placement_of(path, "dp", "tp") == REPLICATE
    assert placement_of("attn.wo_b.scale", "tp", "ep") == Shard(1)
    for axis in ("dp", "tp"):
        assert placement_of("ffn.experts.w13.scale", axis, "tp") == Shard(1, parts=2)
        assert placement_of("ffn.experts.w2", axis, "tp") == Shard(2)
        assert placement_of("ffn.experts.w2.scale", axis, "ep") == Shard(0)


# -- one artifact ------------------------------------------------------------------------------------------------------

LAYOUTS = ("dp=2,moe=tp", "dp=2,moe=ep", "tp=2,moe=tp", "dp=2,moe=tp,tbo=all")


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A tiny model of one layer, compiled for three layouts and for one rank."""
    folder = tmp_path_factory.mktemp("ranked")
    random_checkpoint(folder / "checkpoint", tiny_config(**ONE_LAYER))
    result = compile_model(str(folder / "checkpoint"), "cpu", folder / "a.atom", replace(SMALL, parallel=LAYOUTS))
    compile_model(str(folder / "checkpoint"), "cpu", folder / "one.atom", SMALL)
    return folder, result


def test_layouts_share_weights_and_what_is_alike(ranked: tuple[Path, Result]) -> None:
    folder, result = ranked
    one, several = load(folder / "one.atom"), load(folder / "a.atom")
    assert one.program == several.program and one.regions == several.regions
    assert {n: t.shape for n, t in one.weights.items()} == {n: t.shape for n, t in several.weights.items()}
    plans = {plan.layout: plan for plan in read_ranks(folder / "a.atom")}
    assert tuple(plans) == LAYOUTS and read_ranks(folder / "one.atom") == []
    ours = {name: sorted({c.region for c in f.calls}) for name, f in plans["dp=2,moe=ep"].forms.items()}
    layer = "layer_swa_hash__dp2_moeep"
    assert ours == {"gather": ["head", layer, "prologue"], "route": ["head", f"{layer}_route", "prologue"]}
    assert plans["dp=2,moe=ep"].steps == {"prefill": "route", "decode": "gather"}
    assert plans["tp=2,moe=tp"].regions() == [
        "head__tp2_moetp", "layer_swa_hash__tp2_moetp", "prologue__tp2_moetp",
    ]  # fmt: skip
    assert [(p.proof.steps, p.proof.longest) for p in result.ranks] == [(4, 2), (4, 3), (4, 4), (8, 4)]


def all_regions(artifact: Path) -> dict[str, RegionPlan]:
    return {
        name: region for plan in read_ranks(artifact) for name, region in read_regions(artifact, plan.regions()).items()
    } | read_plan(artifact)[1]


def test_a_layout_may_run_steps_in_two_micro_batches(ranked: tuple[Path, Result]) -> None:
    artifact = ranked[0] / "a.atom"
    plans = {plan.layout: plan for plan in read_ranks(artifact)}
    plan = plans["dp=2,moe=tp,tbo=all"]
    assert [plan.form(kind, rows) for kind in KINDS for rows in (1, 2, 48)] == [
        "gather", "prefill_halves", "prefill_halves", "gather", "decode_halves", "decode_halves",
    ]  # fmt: skip
    assert plan.forms["gather"] == plans["dp=2,moe=tp"].forms["gather"]  # one content, one region
    regions = load_rank(artifact, plan.layout, 0).regions
    for form in ("prefill_halves", "decode_halves"):
        prologue, layer, head = (regions[call.region] for call in plan.forms[form].calls)
        kinds = [KINDS_OF_COLLECTIVES[s.op] for s in layer.steps if s.op in KINDS_OF_COLLECTIVES]
        assert sorted(kinds) == ["all_gather", "all_gather", "reduce_scatter", "reduce_scatter"]
        # The last sum is left to the head, which computes for the first half meanwhile.
        handed = [name for name in layer.outputs if name.startswith(CARRIED)]
        assert handed and handed == [i.name for i in head.inputs if i.name.startswith(CARRIED)]
        waits = [at for at, step in enumerate(head.steps) if step.op == WAIT]
        assert len(waits) == 1 and waits[0] > 3
        assert not any(name.startswith(CARRIED) for name in (*prologue.outputs, *head.outputs))
        with pytest.raises(CollectivesError, match=r"it takes \['carried.0', .* which hands over \[\]"):
            check_ranks(head, plan)
        unheld = {name: slot for name, slot in layer.outputs.items() if name != "carried.1"}
        with pytest.raises(CollectivesError, match="is left to the next region, and what it was given is not"):
            check_ranks(msgspec.structs.replace(layer, outputs=unheld), plan)
        first = next(s for s in layer.steps if "sparse_attention" in s.op)  # of the first half, once more at the end
        with pytest.raises(CollectivesError, match=r"the first half uses state_window after the second"):
            check_ranks(msgspec.structs.replace(layer, steps=[*layer.steps, first]), plan)
        known = check_ranks(layer, plan).carried
        wait = head.steps[waits[0]]
        unwaited = [
            msgspec.structs.replace(s, args=[wait.args[0] if a == Slot(wait.outputs[0] or 0) else a for a in s.args])
            for s in head.steps
            if s is not wait
        ]
        with pytest.raises(CollectivesError, match="the region before started it; it is not waited for once here"):
            check_ranks(msgspec.structs.replace(head, steps=unwaited), plan, known)
        short = {name: msgspec.structs.replace(f, calls=f.calls[:2]) for name, f in plan.forms.items()}
        program = msgspec.structs.replace(load_rank(artifact, plan.layout, 0).program)
        with pytest.raises(CollectivesError, match="the last region hands over"):
            prove_layout(
                msgspec.structs.replace(plan, forms=short),
                msgspec.structs.replace(program, calls=program.calls[:2]), all_regions(artifact), (16, 48),
            )  # fmt: skip
    rows = {name for name in read_explanation(artifact) if "halves" in name}
    assert {call.region for form in plan.forms.values() for call in form.calls if form.halves} <= rows


def test_a_rank_reads_its_part(ranked: tuple[Path, Result]) -> None:
    artifact = ranked[0] / "a.atom"
    whole = load(artifact).weights
    for layout, name, dim, runs in (
        ("dp=2,moe=ep", "layers.0.ffn.experts.w13", 0, 1), ("dp=2,moe=tp", "layers.0.ffn.experts.w2", 2, 1),
        ("dp=2,moe=tp", "layers.0.ffn.experts.w13", 1, 2), ("tp=2,moe=tp", "layers.0.attn.wo_b.weight", 1, 1),
        ("tp=2,moe=tp", "embed.weight", 0, 1),
    ):  # fmt: skip
        for rank in range(2):
            mine = load_rank(artifact, layout, rank).weights
            want = torch.cat([run.chunk(2, dim)[rank] for run in whole[name].chunk(runs, dim)], dim)
            assert torch.equal(mine[name], want), (layout, name, rank)
            assert torch.equal(mine["layers.0.ffn.gate.weight"], whole["layers.0.ffn.gate.weight"])


def test_a_rank_loads_without_a_compiler(ranked: tuple[Path, Result]) -> None:
    code = (
        "from pathlib import Path; from atomc.runtime.loader import load_rank\n"
        f"for layout in {LAYOUTS!r}: load_rank(Path({str(ranked[0] / 'a.atom')!r}), layout, 1)\n"
    )
    assert loaded_after(code) == []


def test_what_is_not_there_is_named(ranked: tuple[Path, Result]) -> None:
    folder = ranked[0]
    with pytest.raises(NoLayoutError, match=r"not compiled for dp=4,moe=tp; it has dp=1, dp=2,moe=tp"):
        load_rank(folder / "a.atom", "dp=4", 0)
    with pytest.raises(ServingError, match="its ranks are 0 to 1"):
        load_rank(folder / "a.atom", "dp=2", 2)
    with pytest.raises(ArtifactError, match="is for one rank, which has no collectives"):
        verify_collectives(folder / "one.atom")


def test_the_command_says_what_is_sent(ranked: tuple[Path, Result], cli: Cli) -> None:
    found = cli("verify", "--collectives", ranked[0] / "a.atom", "--json").json
    assert [one["layout"] for one in found["layouts"]] == list(LAYOUTS)
    ep = found["layouts"][1]
    assert ep["steps"] == {"decode": "gather", "prefill": "route"}
    assert [text.split(" of ")[0] for text in ep["collectives"]["route"]] == ["all_to_all"] * 3
    # A row: 64 values of input, 3 weights and 3 choices of 4 bytes each; back 2 x 64 sums of 4 bytes.
    assert ep["bytes_a_row"]["decode"] == {"all_gather": 280, "reduce_scatter": 512}
    said = cli("explain", ranked[0] / "a.atom")
    assert "280 B to all_gather" in said.out and "ranks of each layout" in said.out
    halves = found["layouts"][3]
    assert halves["overlap"]["prefill"] == {"form": "prefill_halves", "least_rows": 2}
    assert "nothing is predicted for cpu" in halves["why"]["prefill"]
    assert "are not hidden" in cli("explain", ranked[0] / "a.atom", "--pass", "schedule").out


# -- plans that were tampered with -------------------------------------------------------------------------------------

LAYER = "plan/layer_swa_hash__dp2_moetp.json"
ROUTE = "plan/layer_swa_hash__dp2_moeep_route.json"
HALVES = "plan/layer_swa_hash__dp2_moetp_tboall_prefill_halves_1.json"
HEAD = "plan/head__dp2_moetp_tboall_prefill_halves_2.json"
OF_FILE = {LAYER: "dp=2,moe=tp", ROUTE: "dp=2,moe=ep", HALVES: "dp=2,moe=tp,tbo=all", HEAD: "dp=2,moe=tp,tbo=all"}


def step(plan: dict[str, Any], op: str, at: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = [s for s in plan["steps"] if op in s["op"]][at]
    return found


def argument(op: str, position: int, value: Any) -> Callable[[Any], None]:
    def change(plan: Any) -> None:
        step(plan, op)["args"][position] = value

    return change


def forms(change: Callable[[dict[str, Any]], None], layout: str = "dp=2,moe=ep") -> Callable[[Any], None]:
    return lambda plans: change(next(p for p in plans if p["layout"] == layout))


def halves(change: Callable[[dict[str, Any]], None]) -> Callable[[Any], None]:
    return forms(change, "dp=2,moe=tp,tbo=all")


def to_sizes(old: str, new: str, op: str) -> Callable[[Any], None]:
    """A size of a step's arguments for another."""

    def change(plan: Any) -> None:
        text = json.dumps(step(plan, op)["args"])
        assert f'"{old}"' in text
        step(plan, op)["args"] = json.loads(text.replace(f'"{old}"', f'"{new}"'))

    return change


def not_held(plan: Any) -> None:
    """What a collective is given is over at its start, as if nobody read it until the wait."""
    start = step(plan, "all_gather")
    slot, at = start["args"][0]["id"], plan["steps"].index(start)
    plan["slots"][slot]["last"] = at
    for other in plan["steps"]:
        other["release"] = [s for s in other["release"] if s != slot]
    start["release"].append(slot)


def takes_another(plan: Any) -> None:
    item = next(i for i in plan["inputs"] if i["name"] == "carried.1")
    item["name"] = "carried.9"


def never_waits(plan: Any) -> None:
    wait = step(plan, "wait_tensor")
    wait["op"], wait["args"] = "aten.clone.default", [wait["args"][0]]


TAMPERED: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "another group": (LAYER, argument("all_gather", 2, "tp"), "all_gather over 'tp'; the mesh has dp"),
    "too many ranks": (LAYER, argument("reduce_scatter", 2, 4), "the operator gives [11, 64]"),
    "a maximum": (LAYER, argument("reduce_scatter", 1, "max"), "what is due is a sum"),
    "the rank's own rows": (LAYER, argument("pack_message", 1, {"type": "size", "expr": "T"}), "where the plan says"),
    "other experts": (ROUTE, argument("local_experts", 1, {"type": "size", "expr": "3*dp_index"}), "rank 1's first"),
    "rows for nobody": (ROUTE, argument("sort_by_rank", 4, 3), "sorts for 2 ranks of 3 experts"),
    "sizes swapped": (ROUTE, lambda p: step(p, "all_to_all", 2)["args"].__setitem__(
        slice(1, 3), step(p, "all_to_all", 2)["args"][2:0:-1]), "is ['X0 + X1', 64]"),
    "a weight cut twice":
        ("plan/ranks.json", forms(lambda p: p["cuts"]["ffn.experts.w2"].append({"axis": "dp", "dim": 1})), "its parts"),
    "a weight left whole": ("plan/ranks.json", forms(lambda p: p["cuts"].pop("ffn.experts.w2")), "its parts make up"),
    "another layout": ("plan/ranks.json", forms(lambda p: p.update(layout="dp=2,moe=tp")), "dp=2,moe=tp twice"),
    "no layout": ("plan/ranks.json", forms(lambda p: p.update(layout="dp=two")), "its layout is none"),
    "other axes": ("plan/ranks.json", forms(lambda p: p.update(axes=[["tp", 2]])), "the layout has [('dp', 2)]"),
    "an index beyond the mesh": ("plan/ranks.json", forms(lambda p: p["symbols"].update(dp_index=5)), "dp_index 5"),
    "what was sent is overwritten": (HALVES, not_held, "; by the steps from"),
    "a border where something else is taken": (HEAD, takes_another, "which nothing before it makes"),
    "a border that nobody waits at": (HEAD, never_waits, "cannot be a view of slot"),
    "a half in two micro-batches": (HALVES, lambda p: p.update(halves=False), "uses the unknown symbol 'T_0'"),
    "rows of the whole step in a half": (HALVES, to_sizes("P_0", "P", "pack_message"), "'P'"),
    "rows of a half in a whole step": (LAYER, to_sizes("P", "P_0", "pack_message"), "'P_0'"),
    "rows of the other half": (HALVES, to_sizes("P_0", "P_1", "pack_message"), "where the plan says"),
    "halves that were asked for":
        ("plan/ranks.json", halves(lambda p: p["overlap"].pop("decode")), "decode is not in two micro-batches"),
    "halves from more rows on":
        ("plan/ranks.json", halves(lambda p: p["overlap"]["prefill"].update(least=9)), "from 2 rows on"),
    "halves of one row": ("plan/ranks.json", halves(lambda p: p["overlap"]["decode"].update(least=1)), "2 rows"),
    "halves that are whole":
        ("plan/ranks.json", halves(lambda p: p["overlap"]["decode"].update(form="gather")), "it needs one in two"),
    "halves that nobody asked for":
        ("plan/ranks.json", halves(lambda p: p.update(layout="dp=2,moe=tp,tbo=prefill")), "says tbo=prefill"),
    "no form for prefill": ("plan/ranks.json", forms(lambda p: p["steps"].update(prefill="other")), "needs one of"),
    "a form that skips a layer":
        ("plan/ranks.json", forms(lambda p: p["forms"]["gather"]["calls"].pop(1)), "dp=2,moe=ep, gather: arena_bytes"),
    "the layer of one rank in a form":
        ("plan/ranks.json", forms(lambda p: p["forms"]["gather"]["calls"][1].update(region="layer_swa_hash")),
         "its parts make up"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TAMPERED)
def test_a_plan_that_was_tampered_with_is_refused(ranked: tuple[Path, Result], tmp_path: Path, name: str) -> None:
    file, change, why = TAMPERED[name]
    artifact = copy_of(ranked[0] / "a.atom", tmp_path)
    edit(artifact, file, change)
    with pytest.raises((CollectivesError, ArtifactError)) as error:
        verify_collectives(artifact)
    assert why in str(error.value), str(error.value)
    layout = OF_FILE.get(file, "dp=2,moe=tp,tbo=all" if "halves" in name else "dp=2,moe=ep")
    layout = {"halves that nobody asked for": "dp=2,moe=tp,tbo=prefill"}.get(name, layout)
    with pytest.raises((CollectivesError, ArtifactError, NoLayoutError)):
        load_rank(artifact, layout, 0)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sums_over_ranks_are_in_float32(tmp_path: Path) -> None:
    options = replace(SMALL, scheme="native", with_weights=False, dtype="bfloat16", parallel=("tp=2",))
    (found,) = compile_model("deepseek-v4-nano", "mi355x", tmp_path / "a.atom", options).ranks
    first, *rest = found.collectives["gather"]
    assert (first.kind, first.dtype) == ("all_reduce", "bfloat16")  # one rank's row and zeros: nothing is rounded
    assert {(c.kind, c.dtype) for c in rest} == {("all_reduce", "float32"), ("all_gather", "float32")}


@pytest.mark.slow
def test_a_pass_that_forgets_a_sum_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard._Sharding, "row_parallel", lambda _self, _node: None)
    options = replace(SMALL, scheme="native", with_weights=False, parallel=("tp=2",))
    with pytest.raises(PassError, match=r"hc_post\w* \(deepseek_v4/\w+\.py:\d+\): a Partial\(sum\) is used as a full"):
        compile_model("deepseek-v4-nano", "cpu", tmp_path / "a.atom", options)


@pytest.mark.slow
def test_a_large_model_compiles_for_eight_ranks(tmp_path: Path) -> None:
    """Without weights and without a GPU. V4-Pro too: benchmarks/results/compile_layouts.json."""
    layouts = "dp=8,moe=tp,tbo=prefill", "dp=8,moe=ep,tbo=auto"
    options = Options(dtype="bfloat16", with_weights=False, max_batch_tokens=8192, parallel=layouts)
    result = compile_model("deepseek-v4-flash", "mi355x", tmp_path / "a.atom", options)
    layers = len(result.program.calls) - 2 if result.program else 0
    for found in result.ranks:
        assert found.plan.mesh.ranks == 8
        assert {c.kind for c in found.collectives["gather"]} == {"all_gather", "reduce_scatter"}
        assert len(found.collectives["gather"]) == 2 * layers
        if "tbo" in found.plan.layout:
            assert len(found.collectives["prefill_halves"]) == 4 * layers
            assert found.plan.overlap.keys() == {"prefill"}
            assert found.plan.forms["prefill_halves"].arena_bytes <= found.plan.forms["gather"].arena_bytes
            assert (found.plan.overlap["prefill"].least > 2) == ("auto" in found.plan.layout)
    assert tuple(one.plan.layout for one in verify_collectives(tmp_path / "a.atom")) == layouts
