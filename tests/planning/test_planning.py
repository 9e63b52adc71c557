"""Plans from formulas: against the specification's figures, and with the signs of what others published."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from atomc.cli.failure import OptionError
from atomc.cli.timeline import draw_artifact
from atomc.models.bundled import bundled_config, bundled_path
from atomc.parallel.borders import Border
from atomc.parallel.layout import LayoutError, parse_layout
from atomc.parallel.tasks import Issue
from atomc.passes.shard import form_of
from atomc.planning.decide import decide
from atomc.planning.memory import request_bytes, weight_bytes
from atomc.planning.operators import LayerOperators, Part
from atomc.planning.ranking import Row, Workload, WorkloadError, _explained, _row, layouts
from atomc.planning.step import Step, by_regions, schedule, step_tasks
from atomc.targets import get_target
from tests.support import schedules
from tests.support.cli import Cli

if TYPE_CHECKING:
    from atomc.passes.shard import Form

FLASH, PRO = bundled_config("deepseek-v4-flash"), bundled_config("deepseek-v4-pro")
ONE, MI355X = parse_layout("dp=1"), get_target("mi355x")


def flops(layer: int, part: Part, config: object = FLASH, layout: str = "dp=1") -> float:
    operators = LayerOperators(config, layer, parse_layout(layout), part).operators  # type: ignore[arg-type]
    return sum(count for o in operators for kind, count in o.flops.items() if kind != "vector")


# -- against the specification -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "layer", "linear"), [
    (FLASH, 0, 569.9e6), (FLASH, 3, 578.3e6), (FLASH, 2, 608.2e6), (PRO, 3, 1547.6e6), (PRO, 2, 1595.7e6),
])  # fmt: skip
def test_flops_of_a_token(config: object, layer: int, linear: float) -> None:
    """Section 4.5, linear total; its stream products count once, ours thrice (three bf16 parts of a float32)."""
    got = flops(layer, Part(1, 1, 1), config)
    mixing = 2 * 2 * 24 * 4 * config.hidden_size  # type: ignore[attr-defined]
    assert got - 2 * mixing == pytest.approx(linear, rel=0.01)


@pytest.mark.parametrize(("config", "total"), [(FLASH, 156.0e9), (PRO, 850.7e9)])
def test_weights_of_one_rank_are_the_checkpoint(config: object, total: float) -> None:
    assert weight_bytes(config, ONE) == pytest.approx(total, rel=0.005)  # type: ignore[arg-type]


def test_state_of_a_request() -> None:
    """Section 4.3: 3,850.25 bytes a token of Flash, and 15.4 MB that do not grow."""
    assert request_bytes(FLASH, 131072) - request_bytes(FLASH, 0) == pytest.approx(3850.25 * 131072)
    assert request_bytes(FLASH, 0) == pytest.approx(3.214e6 + 12.206e6, rel=0.01)


@pytest.mark.parametrize("layout", ["dp=8,moe=tp", "dp=8,moe=ep"])
def test_ranks_share_the_work(layout: str) -> None:
    """Eight ranks with their own tokens do what one does with all of them."""
    assert flops(2, Part(64, 1, 64), layout=layout) == pytest.approx(flops(2, Part(64, 1, 64)))


def test_what_layouts_send() -> None:
    def sent(layout: str, form: Form = "gather") -> Counter[str]:
        operators = LayerOperators(FLASH, 2, parse_layout(layout), Part(64, 1, 64), form).operators
        return Counter(o.collective for o in operators if o.collective)

    assert sent("dp=1") == {}
    assert sent("dp=8,moe=tp") == {"all_gather": 1, "reduce_scatter": 1}
    assert sent("dp=8,moe=ep") == {"all_gather": 1, "reduce_scatter": 1}
    assert sent("dp=8,moe=ep", "route") == {"all_to_all": 3}  # counts, rows, rows back
    assert sent("tp=8") == {"all_reduce": 3}  # output projection, index scores, experts
    assert sent("tp=2,dp=4") == {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 3}


# -- steps in halves ---------------------------------------------------------------------------------------------------


def test_the_halves_are_the_step() -> None:
    for step in (Step(8192, 1, 8192), Step(8192, 3, 4000), Step(31, 31, 900)):
        assert step.halves is not None
        assert sum(part.tokens for part in step.halves) == step.tokens
    assert Step(1, 1, 900).halves is None
    first, second = Step(8192, 1, 8192).halves or ()
    assert (first.context, second.context) == (4096, 8192)


def test_a_graph_in_halves_has_every_task_twice() -> None:
    layout = parse_layout("dp=8,moe=tp")
    step = Step(4096, 1, 4096)
    parts = [step.whole, step.halves or []]
    whole, halves = (step_tasks(FLASH, layout, MI355X, p, [0, 2]).graph for p in parts)
    twice = Counter(task.name.rsplit(".", 1)[0] for task in halves.tasks)
    assert twice == {task.name: 2 for task in whole.tasks}


@pytest.mark.parametrize("layout", ["dp=8,moe=tp,tbo=auto", "dp=8,moe=ep,tbo=auto"])
@pytest.mark.parametrize("config", [FLASH, PRO], ids=["flash", "pro"])
def test_prefill_gains_and_small_decode_is_declined(config: Any, layout: str) -> None:
    """The published signs: prefill a few to 25 per cent, small decode a loss (docs/planning.md has the figures)."""
    on = decide(config, parse_layout(layout), MI355X, Step(8192, 1, 8192))
    assert on.on
    assert 0.14 < on.gain < 0.19
    assert on.halves is not None
    busy, sent = (sum(t.seconds for t in on.halves.graph.tasks if t.stream == s) for s in ("compute", "collective"))
    assert on.halves.seconds > max(busy, sent)
    off = decide(config, parse_layout(layout), MI355X, Step(8, 8, 8192))
    assert not off.on
    assert -0.5 < off.gain < -0.09
    assert "weights read twice" in off.why
    assert off.chosen is off.whole


def test_halves_that_do_not_fit_are_declined() -> None:
    layout, step = parse_layout("dp=8,moe=tp,tbo=auto"), Step(8192, 1, 8192)
    free = decide(FLASH, layout, MI355X, step)
    assert free.halves is not None
    tight = decide(FLASH, layout, MI355X, step, free.halves.peak - 1)
    assert tight.halves is None or tight.halves.peak < free.halves.peak
    none = decide(FLASH, layout, MI355X, step, 1000)
    assert (none.on, none.halves) == (False, None)
    assert "two halves do not fit into memory" in none.why


@pytest.mark.slow
def test_the_table_of_gains_is_what_is_predicted(repo_root: Path) -> None:
    """docs/planning.md, as it rounds them."""
    rows = re.findall(r"^\| (Flash|Pro) `(\S+)` \|(.*)\|$", (repo_root / "docs" / "planning.md").read_text(), re.M)
    assert len(rows) == 6
    steps = [Step(8192, 1, 8192), Step(4096, 1, 4096), *(Step(n, n, 8192) for n in (32, 128, 512))]
    for name, layout, cells in rows:
        config = {"Flash": FLASH, "Pro": PRO}[name]
        gains = [decide(config, parse_layout(f"{layout},tbo=auto"), MI355X, step).gain for step in steps]
        shown = [f"{100 * gain:+.0f} %".replace("-", "−") for gain in gains]
        assert [cell.strip() for cell in cells.split("|")] == shown, (name, layout)


def test_a_step_is_its_regions_schedules() -> None:
    """Region by region, each once for its kind; what is left open between them is waited for in the next."""
    layout, halves = parse_layout("dp=8,moe=tp"), Step(4096, 1, 4096).halves or []
    step = step_tasks(FLASH, layout, MI355X, halves)
    found = by_regions(step)
    assert schedules.faults_between(step.graph, list(found.issues)) == []
    place = {issue: at for at, issue in enumerate(found.issues)}
    for layer in range(FLASH.num_hidden_layers - 1):
        last = f"{layer}.scatter.1"
        assert step.regions[layer][-1].name == f"{layer}.add_shared.1"
        after = [place[Issue("run", t.name)] for t in step.regions[layer + 1] if t.stream == "compute" and not t.chunk]
        assert place[Issue("start", last)] < min(after) < place[Issue("wait", last)]
        own = [
            i for i in place if i.task.startswith(f"{layer}.") and i.action != "wait" and "add_shared.1" not in i.task
        ]
        assert max(place[i] for i in own) < min(after)


def test_whole_steps_leave_nothing_open() -> None:
    layout = parse_layout("dp=8,moe=tp")
    found = schedule(FLASH, layout, MI355X, Step(4096, 1, 4096).whole, layers=[2, 3])
    place = {issue: at for at, issue in enumerate(found.issues)}
    assert place[Issue("wait", "2.scatter")] < place[Issue("run", "3.streams_attention")]
    shares = {why.task.split(".")[1]: why.exposed for why in found.why}
    assert set(shares) == {"gather", "scatter"}


def test_open_borders_gain_what_closed_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference that docs/planning.md states."""
    gain = decide(FLASH, parse_layout("dp=8,tbo=auto"), MI355X, Step(8192, 1, 8192)).gain
    monkeypatch.setattr("atomc.planning.step.cut", lambda region: Border(tuple(region), None, ()))
    assert decide(FLASH, parse_layout("dp=8,tbo=auto"), MI355X, Step(8192, 1, 8192)).gain < gain - 0.05


def test_forms_are_those_of_a_compile() -> None:
    """On a GPU every step gathers; on the cpu prefill with whole experts routes."""
    layout = parse_layout("dp=2,moe=ep")
    assert form_of(layout, MI355X, "prefill") == form_of(layout, MI355X, "decode") == "gather"
    assert form_of(layout, get_target("cpu"), "prefill") == "route"


def test_what_tbo_asks_for() -> None:
    step = Step(8, 8, 512)
    assert decide(FLASH, parse_layout("dp=8,tbo=all"), MI355X, step).on
    assert decide(FLASH, parse_layout("dp=8,tbo=prefill"), MI355X, step).halves is None
    assert decide(FLASH, parse_layout("dp=8"), MI355X, step).why == "tbo=off"
    assert decide(FLASH, parse_layout("dp=8,tbo=auto"), MI355X, Step(1, 1, 512)).why == "it has no two halves"


# -- ranking -----------------------------------------------------------------------------------------------------------


def row(layout: str, workload: Workload, config: object = PRO) -> Row:
    return _row(config, parse_layout(layout), MI355X, workload)  # type: ignore[arg-type]


@pytest.mark.slow
def test_data_parallel_attention_overtakes_tensor_parallel_with_concurrency() -> None:
    """As published for V4-Pro: more for each doubling of requests, and the other way round for a few of them."""
    lead = []
    for requests in (1, 4, 64, 256):
        work = Workload.parse("8k/1k", requests)
        lead.append(row("dp=8,moe=tp,tbo=off", work).throughput / row("tp=8,moe=tp,tbo=off", work).throughput - 1)
    assert -0.1 < lead[0] < 0 < lead[1] < lead[2] < lead[3] < 1


@pytest.mark.slow
def test_a_layout_that_loses_says_why() -> None:
    work = Workload.parse("8k/1k", 256)
    best, other = row("dp=8,moe=tp", work), row("tp=8", work)
    assert best.throughput > other.throughput
    why = _explained(other, best, work).why
    assert "of its time more than dp=8,moe=tp" in why


def test_a_model_that_does_not_fit_is_no_layout_of_a_device() -> None:
    found = _row(PRO, ONE, get_target("h100"), Workload.parse("1k/1k", 4))
    assert found.fits == 0
    assert found.throughput == 0


def test_memory_bounds_requests() -> None:
    """So many requests of 128 Ki tokens as there is room for; the others wait for the next round."""
    found = _row(PRO, parse_layout("dp=8,moe=ep"), get_target("mi300x"), Workload.parse("128k/1k", 4096))
    assert 0 < found.fits < 4096
    assert found.bytes <= 0.92 * 192 * 2**30


def test_layouts_of_eight_devices_are_legal() -> None:
    names = [str(layout) for layout in layouts(FLASH, 8, "off")]
    assert names == [
        "dp=8,moe=tp", "dp=8,moe=ep", "dp=4,tp=2,moe=tp", "dp=4,tp=2,moe=ep", "dp=2,tp=4,moe=tp", "dp=2,tp=4,moe=ep",
        "tp=8,moe=tp", "tp=8,moe=ep",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["8k", "8k/0", "a/b", "8m/1k"])
def test_workloads_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(WorkloadError, match="is no PROMPT/ANSWER"):
        Workload.parse(text, 1)


def test_the_command(cli: Cli) -> None:
    done = cli("plan", "deepseek-v4-nano", "--gpus", "2", "--workload", "200/100", "--concurrency", "8", "--json")
    rows = done.json
    assert rows[0]["tokens_per_second"] >= rows[-1]["tokens_per_second"] > 0
    assert {row["layout"].split(",")[0] for row in rows} == {"dp=2", "tp=2"}
    assert all(row["why"] for row in rows[1:])
    assert cli("plan", "deepseek-v4-nano", "--target", "cpu").code == 2
    assert cli("plan", "deepseek-v4-nano", "--tbo", "perhaps").code == 2
    assert cli("plan", "deepseek-v4-nano", "--gpus", "16").code == 2


def test_the_timeline_of_an_artifact(tmp_path: Path) -> None:
    """What `inspect --timeline` draws, from an artifact's config.json and target: prefill and decode, whole and cut."""
    folder = bundled_path("deepseek-v4-nano")
    draw_artifact(tmp_path / "t.html", folder, "nano", "mi355x", "dp=2,moe=ep,tbo=auto", 8, 512, 256)
    assert "prefill, 256 tokens of 1 requests a rank" in (tmp_path / "t.html").read_text()
    assert (tmp_path / "t.html").read_text().count("two micro-batches") == 2
    draw_artifact(tmp_path / "t.json", folder, "nano", "mi355x", "dp=2,moe=ep,tbo=all", 8, 512, 512)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert sum(event["name"] == "process_name" for event in events) == 4
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["t.html", "t.json"]
    with pytest.raises(LayoutError, match="does not divide"):
        draw_artifact(tmp_path / "t.html", folder, "nano", "mi355x", "tp=3", 8, 512, 512)
    with pytest.raises(OptionError, match="no GPU"):
        draw_artifact(tmp_path / "t.html", folder, "nano", "cpu", "dp=2", 8, 512, 512)
