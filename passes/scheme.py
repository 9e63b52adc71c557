"""Quantisation schemes as data: which weights, activations and caches are stored and multiplied in which layout.

Terms:
    rule     selects products by kind and by the weight's path; the first rule that fits decides.
    stored   the weight's layout is the checkpoint's. A weight stored in full stays so, and so does its activation.
    kind     linear: x wᵀ. experts: each token's own experts. grouped_output: wo_a, a group of heads at a time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal, TypeAlias

import msgspec

from atomc.errors import AtomcError
from atomc.formats import FP4_ACTIVATION, FP8_ACTIVATION, FP8_CHANNEL, FP8_TILE, MXFP4, Layout

Kind: TypeAlias = Literal["linear", "experts", "grouped_output"]
Rows: TypeAlias = Literal["compute", "bf16", "fp8"]
IndexRows: TypeAlias = Literal["compute", "bf16", "fp8", "mxfp4"]

# What a release stores in FP8 (spec 3.1); all else stays in full (spec 3.3).
LINEARS: Final = r"attn\.(wq_a|wkv|wq_b|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123]|e_proj|h_proj|main_proj"
GROUPED: Final = r"attn\.wo_a"
EXPERTS: Final = r"ffn\.experts\.w(13|2)"


class SchemeError(AtomcError):
    """A quantisation scheme that is none; the message names the field, the text and what is legal."""


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a scheme.

    Attributes:
        op: the kind of product. path: regular expression that the weight's path matches whole (`attn\\.wq_b`).
        weight: a layout, `stored`, or `bfloat16`. activation: a layout, or None: as it is.
    """

    op: Kind
    path: str
    weight: str
    activation: str | None = None

    def fits(self, op: str, paths: tuple[str, ...]) -> bool:
        """Whether it decides for a product of that kind with the weights `paths` (several: one merged product)."""
        return op == self.op and all(re.fullmatch(self.path, path) for path in paths)

    def packs(self, stored: Layout | None) -> bool:
        """Whether a weight that the checkpoint stores in that layout (None: in full) comes out packed."""
        return self.weight != "bfloat16" and (self.weight != "stored" or stored is not None)


class Scheme(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A quantisation scheme.

    Attributes:
        rows: how window rows and compressed rows are stored. index_rows: the index rows; where quantised, they and the
            index queries are rotated (Hadamard, spec 2.7). `compute` is the compute dtype.
        full: weights that no rule quantises are stored in the `checkpoint`'s dtype, or cast to the `compute` dtype.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    rows: Rows = "compute"
    index_rows: IndexRows = "compute"
    full: Literal["checkpoint", "compute"] = "checkpoint"

    def rule(self, op: str, paths: tuple[str, ...]) -> tuple[int, Rule] | None:
        """The first rule that fits, with its number from 1."""
        return next(((i, r) for i, r in enumerate(self.rules, start=1) if r.fits(op, paths)), None)


def _scheme(
    name: str, linear: Layout | str, experts: Layout | str, act: Layout | None, expert_act: Layout | None, rows: Rows,
    index_rows: IndexRows,
) -> Scheme:  # fmt: skip
    kinds: tuple[tuple[Kind, str, Layout | str, Layout | None], ...] = (
        ("linear", LINEARS, linear, act),
        ("grouped_output", GROUPED, linear, act),
        ("experts", EXPERTS, experts, expert_act),
    )  # fmt: skip
    rules = tuple(Rule(op, path, str(weight), str(a) if a else None) for op, path, weight, a in kinds)
    return Scheme(name, rules, rows, index_rows)


SCHEMES: Final = {
    s.name: s
    for s in (
        _scheme("native", "stored", "stored", FP8_ACTIVATION, FP8_ACTIVATION, "fp8", "mxfp4"),
        _scheme("w4a8", FP8_TILE, MXFP4, FP8_ACTIVATION, FP8_ACTIVATION, "fp8", "mxfp4"),
        _scheme("fp8", FP8_TILE, FP8_TILE, FP8_ACTIVATION, FP8_ACTIVATION, "fp8", "fp8"),
        _scheme("mxfp4", FP8_TILE, MXFP4, FP8_ACTIVATION, FP4_ACTIVATION, "fp8", "mxfp4"),
        _scheme("ptpc-fp8", FP8_CHANNEL, FP8_CHANNEL, FP8_CHANNEL, FP8_CHANNEL, "fp8", "fp8"),
        _scheme("bf16", "bfloat16", "bfloat16", None, None, "bf16", "bf16"),
        Scheme("none", full="compute"),
    )
}
DESCRIPTIONS: Final = {
    "native": "as the checkpoint stores it: FP8 tiles and FP4 experts with FP8 activations; FP8 rows, MXFP4 index",
    "w4a8": "the layouts of a release, whatever the checkpoint stores (quantises a bf16 checkpoint)",
    "fp8": "experts in FP8 tiles too; from FP4 without loss",
    "mxfp4": "experts in MXFP4 with MXFP4 activations",
    "ptpc-fp8": "FP8 with a float32 scale per token and per output channel",
    "bf16": "nothing is quantised; weights and rows in bfloat16",
    "none": "nothing is quantised; weights and rows in the compute dtype",
}


def get_scheme(name: str) -> Scheme:
    """A scheme by name, or from a JSON file of that path.

    Raises:
        SchemeError: no such scheme, or a file that is none.
    """
    if name in SCHEMES:
        return SCHEMES[name]
    path = Path(name)
    if path.suffix != ".json":
        raise SchemeError(f"--scheme {name}: no such scheme; choose one of {', '.join(SCHEMES)}, or give a .json file.")
    try:
        scheme = msgspec.json.decode(path.read_bytes(), type=Scheme)
    except OSError as error:
        raise SchemeError(f"--scheme {name}: cannot be read ({error.strerror}).") from error
    except msgspec.DecodeError as error:
        raise SchemeError(f"--scheme {name}: not a scheme: {error}") from error
    check_scheme(scheme)
    return scheme


def check_scheme(scheme: Scheme) -> None:
    """Whether every text in a scheme means something. Raises `SchemeError` that names the rule."""
    for number, rule in enumerate(scheme.rules, start=1):
        try:
            re.compile(rule.path)
            weight = None if rule.weight in ("stored", "bfloat16") else Layout.parse(rule.weight)
            activation = None if rule.activation is None else Layout.parse(rule.activation)
        except (re.error, ValueError) as error:
            raise SchemeError(f"scheme {scheme.name}, rule {number} ({rule.path}): {error}") from error
        if activation is not None and activation.rows != 1:
            raise SchemeError(
                f"scheme {scheme.name}, rule {number} ({rule.path}): activation {activation} has blocks of several "
                "tokens; they have blocks of one row, such as 1x128."
            )
        if activation is not None and weight is None and rule.weight == "bfloat16":
            raise SchemeError(
                f"scheme {scheme.name}, rule {number} ({rule.path}): a bfloat16 weight takes activations as they are."
            )
