"""The caches a layer keeps (spec 4.1): their shapes, as data that capture, planner and runtime share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from atomc.formats import FP4_ACTIVATION, FP8_ACTIVATION, FP8_INDEX, FP8_ROW_CHANNELS, RowLayout, hadamard_matrix
from atomc.models.deepseek_v4.config import DeepseekV4Config

Pool = Literal["window_pages", "blocks", "slots"]


@dataclass(frozen=True)
class Paging:
    """How caches are cut: `window_page` window rows a page; `block_tokens` tokens of context a block."""

    window_page: int
    block_tokens: int

    @staticmethod
    def of(config: DeepseekV4Config) -> Paging:
        """Half a window a page; blocks of 256 tokens, a multiple of every ratio (64 CSA rows, 2 HCA rows of 128)."""
        block = 256
        for ratio in (config.csa_ratio, config.hca_ratio):
            while ratio and block % ratio:
                block += 256
        return Paging(max(config.sliding_window // 2, 1), block)


@dataclass(frozen=True)
class StateSpec:
    """One state tensor: `pool` names the size of dim 0, `shape` the rest; dtype is a torch dtype name."""

    name: str
    pool: Pool
    shape: tuple[int, ...]
    dtype: str


def layer_state(config: DeepseekV4Config, ratio: int, paging: Paging, dtype: str) -> list[StateSpec]:
    """The state tensors of a layer of compress ratio `ratio`, named as the fields of `AttentionState`."""
    dh, di, block = config.head_dim, config.index_head_dim, paging.block_tokens
    specs = [StateSpec("window", "window_pages", (paging.window_page, dh), dtype)]
    if ratio == 0:
        return specs
    ring, width = (2 * ratio, 2 * dh) if ratio == 4 else (ratio, dh)
    specs += [
        StateSpec("rows", "blocks", (block // ratio, dh), dtype),
        StateSpec("partial", "slots", (ring, 2, width), "float32"),
    ]
    if ratio == 4:
        specs += [
            StateSpec("index_rows", "blocks", (block // ratio, di), dtype),
            StateSpec("index_partial", "slots", (ring, 2, 2 * di), "float32"),
        ]
    return specs


def row_layouts(config: DeepseekV4Config, rows: str, index_rows: str, dtype: str) -> tuple[dict[str, str], str]:
    """How caches are stored: state field -> text of its row layout (plain ones left out); and that of index queries.

    Args:
        rows: `compute`, `bf16`, `fp8`. index_rows: these and `mxfp4`. dtype: the compute dtype.
    Raises:
        ValueError: index rows cannot be rotated, which quantised ones are (spec 2.7), or no layout fits a width.
    """
    dh, di, rope = config.head_dim, config.index_head_dim, config.qk_rope_head_dim
    bf16 = "" if dtype == "bfloat16" else "bf16"
    plain = bf16 and str(RowLayout(0, None, dh))
    fp8 = str(RowLayout(dh - rope, FP8_ROW_CHANNELS, rope)) if dh > rope else plain  # rotated channels stay in bf16
    main = {"compute": "", "bf16": plain, "fp8": fp8}[rows]
    if index_rows in ("fp8", "mxfp4"):
        hadamard_matrix(di)
    index, query = {
        "compute": ("", ""), "bf16": (bf16 and str(RowLayout(0, None, di)), ""),
        "fp8": (str(RowLayout(di, FP8_INDEX, 0)), str(FP8_ACTIVATION)),
        "mxfp4": (str(RowLayout(di, FP4_ACTIVATION, 0)), str(FP4_ACTIVATION)),
    }[index_rows]  # fmt: skip
    layouts = {"window": main, "rows": main, "index_rows": index}
    found = {name: str(RowLayout.parse(text)) for name, text in layouts.items() if text}
    return found, query
