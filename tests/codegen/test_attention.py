"""Which kernel sparse attention launches: rows read ahead where Hopper can read them, else the general one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")

from atomc.codegen.device import Recorder
from atomc.codegen.kernels.attention import sparse_attention
from atomc.codegen.kernels.attention_records import group_of
from atomc.targets import get_target

MAIN, NANO = "448:e4m3:1x64:e8m0:0.0001+64", "64:e4m3:1x64:e8m0:0.0001+64"
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


@pytest.mark.parametrize("tokens", [1, 64, 8192])
@pytest.mark.parametrize(
    ("target", "rows", "kernel"),
    [("h100", MAIN, "ahead"), ("h100", "", "attend"), ("mi355x", MAIN, "attend"), ("b200", MAIN, "attend")],
)
def test_hopper_alone_reads_packed_rows_ahead(target: str, rows: str, kernel: str, tokens: int) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def pool(page: int) -> torch.Tensor:
        return meta(9, page * 584, dtype=torch.uint8) if rows else meta(9, page, 512, dtype=BF16)

    recorder = Recorder(get_target(target), tokens)
    sparse_attention(
        recorder, meta(tokens, 64, 512, dtype=BF16), pool(64), meta(4, 133), pool(2), meta(4, 512), None,
        meta(64, dtype=F32), meta(tokens), meta(tokens), 512**-0.5, 128, 128, rows,
    )  # fmt: skip
    ahead = "attend_shares" if tokens <= 64 else "attend_tokens"
    assert recorder.launches[0][0].name == (ahead if kernel == "ahead" else kernel)
