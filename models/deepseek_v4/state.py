"""The caches a layer keeps (spec 4.1): their shapes, as data that capture, planner and runtime share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
