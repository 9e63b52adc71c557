"""What collectives cost: what is sent, over the links there are, and never less than the least time."""

from __future__ import annotations

import pytest

from atomc.parallel.links import LinkError, collective_seconds, sent_bytes
from atomc.targets import TARGETS, get_target

GPUS = [target for target in TARGETS.values() if target.is_gpu]


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    size, ranks = 8_000_000.0, 8
    parts = sent_bytes("reduce_scatter", size / ranks, ranks) + sent_bytes("all_gather", size / ranks, ranks)
    assert sent_bytes("all_reduce", size, ranks) == parts


def test_bytes_against_the_bus_bandwidth_of_the_tests_of_nccl() -> None:
    """Their bus bandwidth of an all-gather is S (n - 1) / n over time, S being what a rank has afterwards."""
    h100, ranks, mine = get_target("h100"), 8, 1 << 30
    seconds = collective_seconds("all_gather", mine, ranks, h100.link)
    assert mine * ranks * (ranks - 1) / ranks / seconds == pytest.approx(0.79 * 450e9, rel=0.01)


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_facts_of_links(target: object) -> None:
    link = target.link  # type: ignore[attr-defined]
    assert 0.5 < link.share < 1
    assert 1e-6 < link.latency < 1e-4
    assert collective_seconds("all_reduce", 0, 8, link) == 2 * link.latency
    assert collective_seconds("all_reduce", 1e9, 1, link) == 0


def test_two_ranks_of_a_mesh_have_one_link() -> None:
    mesh, switch = get_target("mi355x").link, get_target("h200").link
    assert collective_seconds("all_to_all", 2e9, 2, mesh) == pytest.approx(1e9 / (76.8e9 * 0.75), rel=1e-2)
    assert collective_seconds("all_to_all", 2e9, 2, switch) == pytest.approx(1e9 / (450e9 * 0.79), rel=1e-2)


def test_more_ranks_than_a_node_are_refused() -> None:
    with pytest.raises(LinkError, match="16 ranks: the links of one node connect 8"):
        collective_seconds("all_gather", 1, 16, get_target("h100").link)
