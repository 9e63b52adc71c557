"""Files of predicted timelines: an HTML page, or a Chrome trace where the name ends in `.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atomc.cli.failure import OptionError
from atomc.cli.paths import write_beside

if TYPE_CHECKING:
    from atomc.models.deepseek_v4.config import DeepseekV4Config
    from atomc.parallel.layout import Layout
    from atomc.parallel.tasks import Schedule
    from atomc.planning.decide import Decision
    from atomc.targets import Target

NOTE = (
    "One rank of the layout, all ranks alike. Predicted from formulas of the model's sizes, not from the artifact's "
    "graphs, and the target's rates, links and power (docs/planning.md); nothing is measured."
)
WINDOW = 4e-3  # seconds of the middle of a step that are drawn large


def layout_of(text: str, config: DeepseekV4Config, target: Target) -> Layout:
    """The layout of `--parallel`, checked against the model and the target's links.

    Raises:
        OptionError: the target has no links between so many devices. LayoutError: it cannot be read, or is illegal.
    """
    from atomc.parallel.layout import parse_layout
    from atomc.planning.ranking import sizes_of

    layout = parse_layout(text)
    layout.check(sizes_of(config))
    check_ranks(layout.ranks, target)
    return layout


def check_ranks(ranks: int, target: Target) -> None:
    """Whether one node of the target has so many devices. Raises `OptionError`."""
    if not target.is_gpu:
        raise OptionError(f"{target.name} is no GPU; times of several ranks are predicted for GPUs.")
    if ranks > target.link.devices:
        raise OptionError(f"{ranks} ranks: one node of {target.product} connects {target.link.devices} devices.")


def schedules_of(decisions: Sequence[Decision]) -> list[tuple[str, Schedule]]:
    """Each step whole, and in two micro-batches where it can be."""
    found: list[tuple[str, Schedule]] = []
    for decision in decisions:
        step = decision.step
        name = f"{step.phase}, {step.tokens:,} tokens of {step.requests:,} requests a rank"
        found.append((f"{name}: whole", decision.whole))
        if decision.halves is not None:
            state = "on" if decision.on else "off"
            found.append((f"{name}: two micro-batches ({state}: {decision.why})", decision.halves))
    return found


def write_timeline(path: Path, title: str, schedules: Sequence[tuple[str, Schedule]]) -> None:
    """Write the page, or the trace. Raises `OutputError`; nothing is left then."""
    from atomc.parallel.timeline import chrome_trace, page

    text = chrome_trace(schedules) if path.suffix == ".json" else page(title, NOTE, schedules, WINDOW)
    write_beside(path, text)


def draw_artifact(
    path: Path, folder: Path, model: str, target_name: str, parallel: str, batch: int, context: int, most: int
) -> None:
    """The last step of a prefill of `context` tokens, `most` a step, and a decode step of `batch` requests."""
    from atomc.models.deepseek_v4.config import load_config
    from atomc.planning.decide import decide
    from atomc.planning.step import Step
    from atomc.targets import get_target

    config, target = load_config(folder / "config.json"), get_target(target_name)
    layout = layout_of(parallel, config, target)
    steps = [Step(min(context, most), 1, context), Step(batch, batch, context)]
    decisions = [decide(config, layout, target, step) for step in steps]
    write_timeline(path, f"{model} for {target_name}, {layout}", schedules_of(decisions))
