"""The checkpoint format of DeepSeek-V4 (spec section 3): what must be there, reading, checking and writing it."""

from atomc.models.deepseek_v4.reader import CheckpointReader
from atomc.models.deepseek_v4.schema import Entry, Storage, TensorSpec, entries, expected_tensors
from atomc.models.deepseek_v4.validate import validate
from atomc.models.deepseek_v4.writer import write_checkpoint

__all__ = [
    "CheckpointReader",
    "Entry",
    "Storage",
    "TensorSpec",
    "entries",
    "expected_tensors",
    "validate",
    "write_checkpoint",
]
