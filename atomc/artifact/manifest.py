"""The manifest: what an artifact is, for whom it was compiled, and the hash of every file in it."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from atomc.recipes import Recipe

SCHEMA_VERSION: Final = 4


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The largest step the artifact is compiled for; tokens unless said otherwise.

    Attributes:
        max_context: longest sequence. max_batch_tokens: tokens of one step. max_requests: requests of one step.
        max_logit_rows: rows of logits of one step.
    """

    max_context: int
    max_batch_tokens: int
    max_requests: int
    max_logit_rows: int


class Serving(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the runtime must know of the model to build batches and answer requests."""

    model_name: str
    vocab_size: int
    bos_id: int
    eos_ids: list[int]
    window: int
    window_page: int
    block_tokens: int
    csa_ratio: int
    hca_ratio: int
    max_context: int
    max_batch_tokens: int
    max_requests: int
    max_logit_rows: int
    window_table_width: int
    block_table_width: int

    def bounds(self) -> dict[str, int]:
        """The largest value of each symbol of a step; the pools of state are sized when the artifact is loaded."""

        def windows(ratio: int) -> int:
            # b requests of t tokens complete at most (t + (ratio - 1)·b) // ratio windows: each may need but one token
            # for its first. Where none is completed, or no layer has the ratio, one padding entry stands.
            if ratio == 0:
                return 1
            return (self.max_batch_tokens + (ratio - 1) * self.max_requests) // ratio

        return {
            "T": self.max_batch_tokens, "B": self.max_requests, "N4": windows(self.csa_ratio),
            "NH": windows(self.hca_ratio), "L": self.max_logit_rows, "window_pages": 1, "blocks": 1, "slots": 1,
        }  # fmt: skip


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the artifact."""

    sha256: str
    bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`manifest.json`.

    Attributes:
        arch: instruction set of the target (`sm_90`, `gfx950`); empty for the cpu. A GPU that has it runs the artifact.
        config_sha256: of the model's canonical config.json.
        scheme: the quantisation scheme, as `--scheme` takes it from a file. scales: how scales of weights were chosen.
        calibration: sha256 of the calibration file; empty without one.
        tools: versions of what compiled it; a different version may give different bytes.
        passes: region -> fingerprints of the passes that ran, in order.
        recipes: region -> weight name in the region -> recipe with `{prefix}`.
        files: path below the artifact -> hash and size of every other file.
        seal: sha256 of this file as it is with an empty seal, for nothing else holds its hash.
    """

    schema: int
    model: str
    config_sha256: str
    target: str
    arch: str
    dtype: str
    scheme: dict[str, Any]
    scales: str
    with_weights: bool
    limits: Limits
    serving: Serving
    tools: dict[str, str]
    passes: dict[str, list[str]]
    recipes: dict[str, dict[str, Recipe]]
    files: dict[str, FileEntry]
    calibration: str = ""
    seal: str = ""
