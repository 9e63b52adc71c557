"""Layouts: what `--parallel` reads and prints, and which cuts of Flash, Pro and nano are legal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomc.ops.placement import Mesh
from atomc.parallel.layout import Layout, LayoutError, ModelSizes, divisors, parse_layout

FLASH = ModelSizes(heads=64, groups=8, experts=256, inner=2048, vocabulary=129280, block=128)
PRO = ModelSizes(heads=128, groups=16, experts=384, inner=3072, vocabulary=129280, block=128)
CHANNELS = ModelSizes(4, 2, 8, 256, 8192, 1, {"columns of wo_b": (96, [0]), "rows of wq_b": (64, [32])})
NANO = ModelSizes(heads=4, groups=2, experts=8, inner=256, vocabulary=8192)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("dp=8,moe=tp", "dp=8,moe=tp"), ("dp=8", "dp=8,moe=tp"), ("dp=8,moe=ep", "dp=8,moe=ep"),
        ("tp=8", "tp=8,moe=tp"), ("tp=4,dp=2,moe=ep", "dp=2,tp=4,moe=ep"), (" moe = ep , dp = 3 ", "dp=3,moe=ep"),
        ("dp=1", "dp=1"), ("tp=1,dp=1,moe=ep", "dp=1"), ("dp=8,tbo=prefill", "dp=8,moe=tp,tbo=prefill"),
    ],
)  # fmt: skip
def test_layouts_read_and_print(text: str, canonical: str) -> None:
    assert str(parse_layout(text)) == canonical


@given(st.integers(1, 300), st.integers(1, 64), st.sampled_from(["tp", "ep"]), st.sampled_from(["off", "all", "auto"]))
def test_what_is_printed_reads_back(dp: int, tp: int, moe: str, tbo: str) -> None:
    layout = parse_layout(f"tbo={tbo},tp={tp},moe={moe},dp={dp}")
    again = parse_layout(str(layout))
    assert str(again) == str(layout)
    assert (again.dp, again.tp, again.mesh) == (dp, tp, layout.mesh)
    assert again.ranks == dp * tp == layout.mesh.ranks


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is none of dp=N, tp=N, moe=tp|ep, tbo=auto|prefill|all|off"),
        ("dp=8,pp=2", "'pp=2' is none of"),
        ("dp", "'dp' is none of"),
        ("dp=8,dp=4", "dp is given twice"),
        ("dp=0", "dp=0 is no number of ranks; it must be 1 or more"),
        ("tp=-2", "tp=-2 is no number"),
        ("tp=²", "is no number"),
        ("dp=8,moe=both", "moe=both is unknown; choose moe=tp|ep"),
        ("dp=8,tbo=on", "tbo=on is unknown; choose tbo=auto|prefill|all|off"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, why: str) -> None:
    with pytest.raises(LayoutError) as error:
        parse_layout(text)
    assert why in str(error.value)


@pytest.mark.parametrize("sizes", [FLASH, PRO])
@pytest.mark.parametrize(
    "text",
    ["dp=1", "dp=8,moe=tp", "dp=8,moe=ep", "tp=8", "tp=8,moe=ep", "tp=4,dp=2,moe=ep", "dp=4,tp=2", "dp=64,moe=ep"],
)
def test_the_usual_layouts_fit(text: str, sizes: ModelSizes) -> None:
    parse_layout(text).check(sizes)


@pytest.mark.parametrize(
    ("sizes", "text", "why"),
    [
        (FLASH, "tp=3", "tp=3 does not divide the 8 groups of attention heads"),
        (FLASH, "tp=3", "nearest legal: tp=2,moe=tp or tp=4,moe=tp"),
        (FLASH, "tp=16", "tp=16 does not divide the 8 groups of attention heads; nearest legal: dp=2,tp=8,moe=tp"),
        (FLASH, "dp=3,moe=ep", "3 ranks do not divide the 256 experts (moe=ep); nearest legal: dp=2,moe=ep or"),
        (FLASH, "dp=512,moe=ep", "512 ranks do not divide the 256 experts (moe=ep); nearest legal: dp=256,moe=ep"),
        (FLASH, "dp=32", "the 2048 columns in blocks of 128 of an expert (moe=tp); nearest legal: dp=16,moe=tp"),
        (FLASH, "dp=8,tp=3,moe=ep", "nearest legal: dp=8,tp=2,moe=ep or dp=8,tp=4,moe=ep"),
        (PRO, "dp=16", "the 3072 columns in blocks of 128 of an expert (moe=tp); nearest legal: dp=12,moe=tp or dp=24"),
        (PRO, "dp=5,tp=2,moe=ep", "10 ranks do not divide the 384 experts (moe=ep); nearest legal: dp=4,tp=2,moe=ep"),
        (NANO, "tp=4", "tp=4 does not divide the 2 groups of attention heads; nearest legal: dp=2,tp=2,moe=tp"),
        (NANO, "dp=16,moe=ep", "16 ranks do not divide the 8 experts (moe=ep); nearest legal: dp=8,moe=ep"),
        (CHANNELS, "tp=2", "tp=2 cuts through the blocks of 96 of the 96 columns of wo_b; nearest legal: dp=2,moe=tp"),
        (FLASH, "tbo=all", "tbo=all has nothing to overlap"),
    ],
)  # fmt: skip
def test_an_illegal_cut_names_the_number_and_the_nearest_legal_ones(sizes: ModelSizes, text: str, why: str) -> None:
    with pytest.raises(LayoutError) as error:
        parse_layout(text).check(sizes)
    assert why in str(error.value)


@given(st.integers(1, 40), st.integers(1, 20), st.sampled_from(["tp", "ep"]), st.sampled_from([FLASH, PRO, NANO]))
def test_the_nearest_that_an_error_names_are_legal(dp: int, tp: int, moe: str, sizes: ModelSizes) -> None:
    layout = parse_layout(f"dp={dp},tp={tp},moe={moe}")
    try:
        layout.check(sizes)
    except LayoutError as error:
        named = str(error).split("nearest legal: ")[1].rstrip(".").split(" or ")
        assert [str(n) for n in layout.nearest(sizes)] == named
        for text in named:
            parse_layout(text).check(sizes)
    else:
        assert sizes.groups % tp == 0
        assert dp * tp == 1 or (sizes.experts if moe == "ep" else sizes.inner // sizes.block) % (dp * tp) == 0


def test_ranks_are_coordinates_of_the_mesh() -> None:
    mesh = Layout(dp=2, tp=3).mesh
    assert mesh == Mesh((("dp", 2), ("tp", 3)))
    assert [mesh.coordinate(r) for r in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert mesh.groups("tp") == [[0, 1, 2], [3, 4, 5]]
    assert mesh.groups("dp") == [[0, 3], [1, 4], [2, 5]]
    assert Layout().mesh.groups("dp") == [[0]]


def test_one_rank_fits_any_model() -> None:
    """A block may be wider than all of a small model's columns."""
    Layout().check(ModelSizes(heads=3, groups=1, experts=5, inner=32, vocabulary=7, block=128))
    with pytest.raises(
        LayoutError, match=r"32 columns in blocks of 128 of an expert \(moe=tp\); nearest legal: dp=1\."
    ):
        Layout(dp=2).check(ModelSizes(heads=3, groups=1, experts=5, inner=32, vocabulary=7, block=128))


def test_divisors() -> None:
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert divisors(1) == [1]
