"""Number formats as types: elements, scales, layouts, cache rows; bit-exact, in plain torch (spec 3.2, 3.4)."""

from atomc.formats.convert import expand_mxfp4, hadamard_matrix, to_fnuz
from atomc.formats.element import E2M1, E4M3, E4M3_FNUZ, E5M2, E5M2_FNUZ, ELEMENTS, INT8, Element
from atomc.formats.layout import (
    FP4_ACTIVATION,
    FP8_ACTIVATION,
    FP8_CHANNEL,
    FP8_INDEX,
    FP8_ROW_CHANNELS,
    FP8_TILE,
    FP8_TILE_F32,
    MXFP4,
    NAMES,
    Layout,
    dequantize,
    quantize,
)
from atomc.formats.rows import Records, RowLayout

__all__ = [
    "E2M1", "E4M3", "E4M3_FNUZ", "E5M2", "E5M2_FNUZ", "ELEMENTS", "FP4_ACTIVATION", "FP8_ACTIVATION", "FP8_CHANNEL",
    "FP8_INDEX", "FP8_ROW_CHANNELS", "FP8_TILE", "FP8_TILE_F32", "INT8", "MXFP4", "NAMES", "Element", "Layout",
    "Records", "RowLayout", "dequantize", "expand_mxfp4", "hadamard_matrix", "quantize", "to_fnuz",
]  # fmt: skip
