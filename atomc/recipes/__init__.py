"""Declarative weight changes: how a parameter is made from checkpoint tensors, as data that a manifest can hold."""

from atomc.recipes.cut import part_of
from atomc.recipes.evaluate import evaluate, output_spec
from atomc.recipes.halves import Halves
from atomc.recipes.names import joined, members
from atomc.recipes.pairs import Choice, Pair, dense_origin, pair_of, stored_layout, uncast
from atomc.recipes.steps import (
    PREFIX,
    Cast,
    Concat,
    Constant,
    Convert,
    Dequantize,
    DType,
    Load,
    Method,
    Part,
    Permute,
    Quantize,
    Recipe,
    Repeat,
    Reshape,
    Slice,
    Stack,
    TensorSpec,
    children,
    from_json,
    instantiate,
    sources,
    to_json,
    torch_dtype,
)

__all__ = [
    "PREFIX", "Cast", "Choice", "Concat", "Constant", "Convert", "DType", "Dequantize", "Halves", "Load", "Method",
    "Pair", "Part", "Permute", "Quantize", "Recipe", "Repeat", "Reshape", "Slice", "Stack", "TensorSpec", "children",
    "dense_origin", "evaluate", "from_json", "instantiate", "joined", "members", "output_spec", "pair_of", "part_of",
    "sources", "stored_layout", "to_json", "torch_dtype", "uncast",
]  # fmt: skip
