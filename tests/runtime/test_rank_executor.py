"""Ranks as processes over gloo: together they give the logits of one rank, whatever each of them has to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atomc.parallel.layout import parse_layout
from tests.support.artifact import LAYERS, LIMITS, ONE_LAYER
from tests.support.cli import run_apart
from tests.support.eager import Step
from tests.support.rank_processes import Codes, Loads, Play, difference, run_alone, run_ranks
from tests.support.tiny import random_checkpoint, tiny_config, to_first_experts

SMALL = ("dp=2,moe=tp", "dp=2,moe=ep", "tp=2,moe=ep", "dp=2,moe=tp,tbo=all", "dp=2,moe=ep,tbo=all", "tp=2,tbo=all")
UNEVEN: list[list[Step]] = [
    [[(0, 20), (1, 5)], [(0, 1), (1, 1), (2, 3)], [(2, 1)], [(0, 1)]],
    [[(0, 1)], [(0, 16)], [(0, 1)], [(0, 1)]],
    [[(1, 33)], [], [(1, 1)], [(1, 1)]],
    [],
]


def uneven(layout: str) -> Loads:
    """Loads of every dp rank: batches of all kinds, and ranks that idle for some steps, or all."""
    return [UNEVEN[i % 4] for i in range(parse_layout(layout).dp)]


def compiled(folder: Path, layouts: tuple[str, ...], hot: bool = False, **overrides: object) -> Path:
    """A tiny model compiled for layouts; `hot`: its router sends all tokens to the same experts."""
    config = tiny_config(n_routed_experts=16, **overrides)
    folder.mkdir()
    random_checkpoint(folder / "checkpoint", config, **({"change": to_first_experts} if hot else {}))
    parallel = [word for layout in layouts for word in ("--parallel", layout)]
    ran = run_apart("compile", folder / "checkpoint", "-o", folder / "a.atom", *LIMITS, "--scheme", "none", *parallel)
    assert ran.code == 0, ran.out + ran.err
    return folder / "a.atom"


def compare(artifact: Path, plays: Sequence[Play], folder: Path, allowed: float = 1e-5) -> None:
    """Each play gives what one rank gives alone; `allowed`: the largest difference of a logit, in the largest."""
    known: dict[str, list[list[Tensor]]] = {}
    for play, ranks in zip(plays, run_ranks(artifact, plays, folder), strict=True):
        key = repr(play.loads)
        if key not in known:
            known[key] = run_alone(artifact, play.loads)
        tp = parse_layout(play.layout).tp
        worst = {rank: difference(ours, known[key][rank // tp]) for rank, ours in enumerate(ranks)}
        assert max(worst.values()) <= allowed, (play.layout, play.idle, worst)


def test_two_ranks_are_one(tmp_path: Path) -> None:
    artifact = compiled(tmp_path / "model", SMALL, **ONE_LAYER)
    plays = [Play(layout, uneven(layout)) for layout in SMALL]
    plays += [Play("dp=2,moe=ep", [[], UNEVEN[1]], "empty", 3), Play("dp=2,moe=tp", [UNEVEN[2], []], "dummy", 2)]
    plays += [Play("dp=2,moe=ep,tbo=all", [UNEVEN[2], []], "empty", 3)]  # both halves have rows of padding
    compare(artifact, plays, tmp_path / "run")


FOUR = (
    "dp=4,moe=ep", "tp=4,moe=tp", "tp=4,moe=ep", "dp=2,tp=2,moe=tp", "dp=4,moe=tp,tbo=all", "dp=2,tp=2,moe=ep,tbo=all",
)  # fmt: skip
EIGHT = ("dp=8,moe=tp", "dp=8,moe=ep", "dp=4,tp=2,moe=tp", "dp=2,tp=4,moe=ep,tbo=all")


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [FOUR, EIGHT], ids=["4", "8"])
def test_many_ranks_are_one(tmp_path: Path, layouts: tuple[str, ...]) -> None:
    """Every kind of layer; each of four and eight ranks has a batch of its own, or none."""
    artifact = compiled(tmp_path / "model", layouts, **LAYERS)
    idle = [[], [], [[(0, 9)], [(0, 1)]], []]
    plays = [Play(layout, uneven(layout), ("dummy", "empty")[at % 2]) for at, layout in enumerate(layouts)]
    plays.append(Play(layouts[1], (idle * 2)[: parse_layout(layouts[1]).dp], "empty"))
    compare(artifact, plays, tmp_path / "run")


@pytest.mark.slow
def test_all_tokens_may_go_to_the_experts_of_one_rank(tmp_path: Path) -> None:
    artifact = compiled(tmp_path / "model", ("dp=4,moe=ep",), hot=True, **LAYERS)
    compare(artifact, [Play("dp=4,moe=ep", uneven("dp=4,moe=ep"))], tmp_path / "run")
    # Where the tokens of one rank alone are there, whichever it is, products have the rows that they have on one rank,
    # and only zeros are added to the sums of the rank that has the experts: not a bit differs.
    alone: list[Loads] = [[UNEVEN[0], [], [], []], [[], [], UNEVEN[0], []]]
    plays = [Play("dp=4,moe=ep", loads, "empty", padding) for loads, padding in zip(alone, (0, 3), strict=True)]
    compare(artifact, plays, tmp_path / "exact", allowed=0)


def nano(output: Path, scheme: str, layouts: tuple[str, ...]) -> Path:
    """The bundled model with caches in float32."""
    parallel = [word for layout in layouts for word in ("--parallel", layout)]
    rows = ("--cache-rows", "compute", "--index-rows", "compute", "--scheme", scheme)
    ran = run_apart("compile", "deepseek-v4-nano", "-o", output, *LIMITS, *rows, *parallel)
    assert ran.code == 0, ran.out + ran.err
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [
        ("dp=2,moe=tp", "tp=2,moe=ep", "dp=2,moe=ep,tbo=all"),
        ("dp=8,moe=ep",),
    ],
    ids=["2", "8"],
)
def test_the_bundled_model_on_ranks(tmp_path: Path, layouts: tuple[str, ...]) -> None:
    artifact = nano(tmp_path / "a.atom", "none", layouts)
    compare(artifact, [Play(layout, uneven(layout)) for layout in layouts], tmp_path / "run")


@pytest.mark.slow
def test_a_quantised_model_parts_at_a_code_that_lay_between_two(tmp_path: Path) -> None:
    """Of a sum that differs in its last bit the next rounding may take the neighbouring code, a 16th of a value away.

    Up to the first such code all codes are those of one rank; there few differ, each by one.
    """
    layouts = ("dp=2,moe=ep", "tp=2,moe=ep")
    artifact = nano(tmp_path / "a.atom", "native", layouts)
    run_ranks(artifact, [Play(layout, uneven(layout)) for layout in layouts], tmp_path / "run")
    watch = Codes()
    run_alone(artifact, uneven("tp=2"), watch)
    for layout in layouts:
        ours = torch.load(tmp_path / "run" / f"codes {layout}.pt")
        assert [name for name, _ in ours] == [name for name, _ in watch.found]
        both = zip(ours, watch.found, strict=True)
        pairs = [(a.view(torch.uint8).int(), b.view(torch.uint8).int()) for (_, a), (_, b) in both]
        first = next((a - b for a, b in pairs if not a.equal(b)), None)
        if first is not None:
            assert (first != 0).float().mean() < 0.01, layout
            assert first.abs().max() == 1, (layout, first.abs().max())
