"""The vocabulary of the IR: importing this package defines every `torch.ops.atom` operator."""

from atomc.ops import (
    activation,
    attention,
    cache,
    compressor,
    exchange,
    experts,
    hyper_connection,
    indexer,
    linear,
    norm,
    pointwise,
    quantize,
    rope,
    router,
    scaled,
)
from atomc.ops import cpu as _cpu  # noqa: F401  after the operators it implements
from atomc.ops.batch import Batch
from atomc.ops.registry import OPS, Op

__all__ = [
    "OPS",
    "Batch",
    "Op",
    "activation",
    "attention",
    "cache",
    "compressor",
    "exchange",
    "experts",
    "hyper_connection",
    "indexer",
    "linear",
    "norm",
    "pointwise",
    "quantize",
    "rope",
    "router",
    "scaled",
]
