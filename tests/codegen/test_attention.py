"""Which kernel sparse attention launches: rows read ahead where Hopper can read them, else the general one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")

from atomc.codegen.device import Recorder
from atomc.codegen.kernels.attention import sparse_attention, sparse_attention_inverse_rope_quant
from atomc.codegen.kernels.attention_records import group_of
from atomc.formats import RowLayout
from atomc.targets import get_target

MAIN, NANO = "448:e4m3:1x64:e8m0:0.0001+64", "64:e4m3:1x64:e8m0:0.0001+64"
FP8 = "e4m3:1x128:e8m0:0.0001"
BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("rows", "dtype", "pages", "group"),
    [
        (MAIN, BF16, (64 * 584, 2 * 584), 64),
        (NANO, BF16, (32 * 200, 2 * 200), 64),
        (MAIN, F32, (64 * 584, 64 * 584), 0),  # float32 keeps its precision: no matrix instruction
        (NANO, BF16, (32 * 200, 200), 0),  # a record would begin at an odd multiple of 8 bytes
        ("12:e4m3:1x8:e8m0:0.0001+8", BF16, (320, 320), 0),  # no whole groups of 16
        ("448:e4m3:1x64:float32:0.0001+64", BF16, (64 * 608, 64 * 608), 0),  # scales of four bytes
        ("128:e4m3:1x*:e8m0+0", BF16, (64 * 129, 64 * 129), 0),  # one group, unpadded scales
        ("0+512", BF16, (1024, 1024), 0),
        ("", BF16, (512, 512), 0),
    ],
)
def test_rows_are_read_ahead_only_in_whole_aligned_groups(
    rows: str, dtype: torch.dtype, pages: tuple[int, int], group: int
) -> None:
    assert group_of(rows, dtype, pages) == group


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("tokens", [1, 64, 8192])
@pytest.mark.parametrize(
    ("target", "rows", "kernel"),
    [("h100", MAIN, "ahead"), ("h100", "", "attend"), ("mi355x", MAIN, "attend"), ("b200", MAIN, "attend")],
)
def test_hopper_alone_reads_packed_rows_ahead(target: str, rows: str, kernel: str, tokens: int) -> None:
    def pool(page: int) -> torch.Tensor:
        return meta(9, page * 584, dtype=torch.uint8) if rows else meta(9, page, 512, dtype=BF16)

    recorder = Recorder(get_target(target), tokens)
    sparse_attention(
        recorder, meta(tokens, 64, 512, dtype=BF16), pool(64), meta(4, 133), pool(2), meta(4, 512), None,
        meta(64, dtype=F32), meta(tokens), meta(tokens), 512**-0.5, 128, 128, rows,
    )  # fmt: skip
    ahead = "attend_shares" if tokens <= 64 else "attend_tokens"
    assert recorder.launches[0][0].name == (ahead if kernel == "ahead" else kernel)


@pytest.mark.parametrize(
    ("target", "rows", "layout", "ratio", "tokens", "kernels"),
    [
        ("h100", MAIN, FP8, 128, 8192, ["attend_apart"]),
        ("h100", MAIN, FP8, 128, 128, ["attend_apart"]),
        ("h100", MAIN, FP8, 128, 64, ["attend_shares", "join"]),  # a machine is not full of whole tokens
        ("h100", MAIN, FP8, 0, 64, ["attend_apart"]),  # a window alone is not split
        ("h100", MAIN, FP8, 0, 16, ["attend_shares", "join"]),
        ("h100", MAIN, "e4m3:1x64:e8m0:0.0001", 128, 8192, ["attend_tokens"]),  # groups of another width
        ("h100", MAIN, "e4m3:1x128:float32", 128, 8192, ["attend_tokens"]),
        ("h100", "384:e4m3:1x64:e8m0:0.0001+128", FP8, 128, 8192, ["attend_tokens"]),
        ("b200", MAIN, FP8, 128, 8192, ["attend"]),
    ],
)
def test_warps_have_tasks_of_their_own_where_whole_tokens_fill_a_hopper(
    target: str, rows: str, layout: str, ratio: int, tokens: int, kernels: list[str]
) -> None:
    size = RowLayout.parse(rows).row_bytes
    recorder = Recorder(get_target(target), tokens)
    sparse_attention_inverse_rope_quant(
        recorder, meta(tokens, 64, 512, dtype=BF16), meta(9, 64 * size, dtype=torch.uint8), meta(4, 133),
        meta(9, 2 * size, dtype=torch.uint8) if ratio else None, meta(4, 512), None, meta(64, dtype=F32), meta(tokens),
        meta(tokens), 512**-0.5, 128, ratio, meta(tokens, 32, dtype=F32), meta(tokens, 32, dtype=F32), rows, 8, layout,
    )  # fmt: skip
    assert [variant.name for variant, _ in recorder.launches] == kernels
    if kernels == ["attend_apart"]:  # a program has a multiprocessor to itself
        assert recorder.launches[0][1] == (min(tokens, get_target(target).compute_units),)
