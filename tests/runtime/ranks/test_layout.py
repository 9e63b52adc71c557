"""Which layout a run has, and which are refused before any rank is started."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from atomc.artifact.ranks import NoLayoutError, RanksPlan
from atomc.parallel.layout import Layout, LayoutError, parse_layout
from atomc.runtime.errors import ServingError
from atomc.runtime.ranks.layout import check_layout, layout_of


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """No more of an artifact than what says which layouts it has."""
    layouts = [parse_layout(text) for text in ("dp=2,moe=ep", "tp=2", "dp=4")]
    plans = [RanksPlan(str(each), list(each.mesh.axes), {}, {}, {}, {}) for each in layouts]
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "ranks.json").write_bytes(msgspec.json.encode(plans))
    return tmp_path


def test_ranks_share_a_model_by_a_layout_of_several() -> None:
    assert layout_of(None) is None
    assert layout_of("dp=1") is None
    assert layout_of("tp=2, dp=4,moe=ep") == Layout(4, 2, "ep")
    with pytest.raises(LayoutError, match="tp=x is no number of ranks"):
        layout_of("tp=x")


@pytest.mark.parametrize(
    ("parallel", "size"), [(None, 5), ("dp=1", 1), ("moe=ep,dp=2", 2), ("tp=2,moe=tp", 2), ("dp=4", 4)]
)
def test_what_an_artifact_has_is_run(artifact: Path, parallel: str | None, size: int) -> None:
    check_layout(artifact, parallel, size)


def test_a_layout_that_it_has_not_is_refused(artifact: Path, tmp_path: Path) -> None:
    has = "not compiled for dp=2,moe=tp; it has dp=1, dp=2,moe=ep, tp=2,moe=tp, dp=4,moe=tp"
    with pytest.raises(NoLayoutError, match=f"{has}.*atomc compile MODEL --parallel dp=2,moe=tp"):
        check_layout(artifact, "dp=2", 2)
    with pytest.raises(NoLayoutError, match=r"it has dp=1\. "):
        check_layout(tmp_path / "other", "dp=2", 2)


def test_another_number_of_ranks_is_refused(artifact: Path) -> None:
    said = "dp=4,moe=tp is for 4 ranks, and 2 are started. Start as many, or choose dp=2,moe=ep or tp=2,moe=tp."
    with pytest.raises(ServingError, match=said):
        check_layout(artifact, "dp=4", 2)
    with pytest.raises(ServingError, match=r"3 are started.* or compile the model for a layout of 3"):
        check_layout(artifact, "dp=4", 3)
    with pytest.raises(ServingError, match="dp=1 is for 1 rank, and 2 are started"):
        check_layout(artifact, "dp=1", 2)


def test_a_target_that_runs_no_layouts_is_refused(artifact: Path) -> None:
    check_layout(artifact, None, 2, "h100")
    check_layout(artifact, "dp=1", 1, "h100")
    with pytest.raises(ServingError, match=r"--parallel tp=2.* is for h100, .*on the cpu as yet.*--target cpu"):
        check_layout(artifact, "tp=2", 2, "h100")
