"""An artifact's weights against the checkpoint's tensors, each decoded by its own way from its definition.

Contract:
    Every weight of every call is compared. What the artifact takes from the checkpoint as it is, or converts without
    loss, must be equal. What it rounds must be what the checkpoint's value rounds to at the scale of its block, so it
    is within half a spacing; the scale must be the rule's. Only where scales were chosen by least squares may one be
    smaller, which cuts the largest values of its block, or a float32 scale the power of two above: it is then one of
    those that are tried, and without a calibration, which is not kept, the one of them that loses least.

Terms:
    parameter   a name of the model (spec 3.1); a weight of a region may be several joined, or all experts stacked
    origin      how the compiler says it made a weight: stored, exact, or quantized (`layouts.json`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from atomc.artifact.check_layouts import given_steps, pairs_of
from atomc.artifact.check_region import operator_of
from atomc.artifact.plan import RegionPlan
from atomc.models.bundled import bundled_names, bundled_path
from atomc.models.deepseek_v4.layers import inverse_frequencies
from atomc.models.deepseek_v4.weights import official_parameter
from atomc.models.source import ModelSource, open_model
from atomc.recipes import members
from atomc.report import read_layouts
from atomc.runtime.loader import LoadedArtifact
from atomc.verify import grid
from atomc.verify.errors import VerifyError

EXPERTS: Final = {"ffn.experts.w13": ("w1", "w3"), "ffn.experts.w2": ("w2",)}
# Of the rule's scale, those that `--scales mse` chooses from: where scales are powers of two, and where they are not.
SMALLER: Final = ((1.0, 0.5), (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6))
ROPE: Final = ("rope_plain", "rope_yarn")


@dataclass(frozen=True)
class WeightReport:
    """One weight: its layout (or dtype) and origin, its relative error, and what is wrong with it, if anything is."""

    name: str
    layout: str
    origin: str
    error: float
    why: str = ""

    @property
    def ok(self) -> bool:
        return not self.why


def find_checkpoint(artifact: LoadedArtifact, wanted: str | None) -> ModelSource | None:
    """The checkpoint of an artifact: the one named, or the bundled one of the model's name; None if there is none.

    Raises:
        VerifyError: the checkpoint named is of another configuration. AtomcError: it cannot be read.
    """
    from atomc.compiler import config_hash

    model = artifact.manifest.model
    if wanted is None and not (model in bundled_names() and bundled_path(model).is_dir()):
        return None
    source = open_model(wanted or model, with_weights=True)
    if config_hash(source.config) == artifact.manifest.config_sha256:
        return source
    if wanted is None:
        return None
    raise VerifyError(
        f"--checkpoint {wanted}: its configuration is not the one that {artifact.folder} was compiled for."
    )


def compare_weights(
    artifact: LoadedArtifact, source: ModelSource, progress: Callable[[str], None] = lambda _: None
) -> Iterator[WeightReport]:
    """A report on each weight of each call, in the order of the program."""
    origins = {
        (region, row.name): row.origin
        for region, rows in read_layouts(artifact.folder).items()
        for row in rows
        if row.kind == "weight"
    }
    comparing = _Comparing(artifact, source)
    for call in artifact.program.calls:
        region = artifact.regions[call.region]
        for name in (i.name for i in region.inputs if i.role == "weight"):
            if comparing.is_scale(region, name):
                continue
            progress(call.prefix + name)
            bare = name.removesuffix(".weight")
            # What nobody says was rounded must be equal.
            yield comparing.weight(region, call.prefix, name, origins.get((call.region, bare), "stored"))


class _Comparing:
    def __init__(self, artifact: LoadedArtifact, source: ModelSource) -> None:
        self.artifact, self.source = artifact, source
        self.pairs = {name: _pairs(region) for name, region in artifact.regions.items()}

    def is_scale(self, region: RegionPlan, name: str) -> bool:
        """Whether it is the scales of another weight, and compared with it."""
        return any(scales == name for scales, _ in self.pairs[region.name].values())

    def weight(self, region: RegionPlan, prefix: str, name: str, origin: str) -> WeightReport:
        """The verdict on one weight."""
        stored, full = self.artifact.weights[prefix + name], prefix + name
        parts = self._parts(prefix, name)
        if name not in self.pairs[region.name]:
            layout = str(stored.dtype).removeprefix("torch.")
            expected = torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]
            return _plain(full, layout, origin, stored, expected)
        scales, text = self.pairs[region.name][name]
        try:
            found, scale = grid.unpacked(stored, self.artifact.weights[prefix + scales], text)
        except VerifyError as error:
            return WeightReport(full, text, origin, torch.inf, error.message)
        return _packed(full, text, origin, found, scale, parts, self.artifact.manifest.scales)

    def _parts(self, prefix: str, name: str) -> list[Tensor]:
        """float64 values of the checkpoint, for each parameter that a weight joins; experts: [E, rows, columns]."""
        local = official_parameter(name)
        if local in EXPERTS:
            count = self.source.config.n_routed_experts
            return [
                torch.stack([self.dense(f"{prefix}ffn.experts.{e}.{p}.weight") for e in range(count)])
                for p in EXPERTS[local]
            ]
        if local in ROPE:
            return [inverse_frequencies(self.source.config, local == "rope_yarn").double()]
        names = [official_parameter(prefix + part) for part in members(name)]
        return [self.dense(n) for n in names]

    def dense(self, name: str) -> Tensor:
        """float64 values of a checkpoint tensor, by the definition of what it is stored in (spec 3.2)."""
        stored = self.source.load(name)
        if stored.dtype not in (torch.int8, torch.float8_e4m3fn):
            return stored.double()
        scales = self.source.load(name.removesuffix("weight") + "scale")
        if stored.dtype == torch.int8:
            return grid.unpacked(stored, scales, "e2m1:1x32:e8m0")[0]
        kind = "e8m0" if scales.dtype == torch.float8_e8m0fnu else "float32"
        return grid.unpacked(stored, scales, f"e4m3:128x128:{kind}")[0]


def _pairs(region: RegionPlan) -> dict[str, tuple[str, str]]:
    """Weight -> its scales and their layout's text, by the step that multiplies it or expands it."""
    weights = {i.slot: i.name for i in region.inputs if i.role == "weight"}
    found: dict[str, tuple[str, str]] = {}
    for given in given_steps(region, operator_of):
        for codes_name, scales_name, layout in pairs_of(given):
            codes, scales = given.slot(codes_name), given.slot(scales_name)
            if codes in weights and scales is not None:
                found[weights[codes]] = weights.get(scales, "?"), given.arguments[layout]
    return found


def _plain(name: str, layout: str, origin: str, stored: Tensor, expected: Tensor) -> WeightReport:
    """A weight in a dtype of torch: what the checkpoint's numbers are in that dtype."""
    if stored.shape != expected.shape:
        return WeightReport(
            name, layout, origin, torch.inf, f"has shape {list(stored.shape)}, the checkpoint {list(expected.shape)}"
        )
    ideal = expected.float().to(stored.dtype) if stored.is_floating_point() else expected.to(stored.dtype)
    return _equal(name, layout, origin, stored.double(), ideal.double())


def _equal(name: str, layout: str, origin: str, found: Tensor, expected: Tensor) -> WeightReport:
    error = _relative(found, expected)
    differs = found != expected
    if bool((broken := ~expected.isfinite()).any()):
        at = broken.nonzero()[0].tolist()
        why = f"{int(broken.sum()):,} values of the checkpoint are not finite, the first at {at}"
        return WeightReport(name, layout, origin, torch.inf, why)
    if not bool(differs.any()):
        return WeightReport(name, layout, origin, error)
    return WeightReport(name, layout, origin, error, _difference(differs, found, expected))


def _difference(differs: Tensor, found: Tensor, expected: Tensor) -> str:
    at = tuple(differs.nonzero()[0].tolist())
    share = f"{int(differs.sum()):,} of {differs.numel():,} values differ from the checkpoint's"
    return f"{share}, the first at {list(at)}: {float(found[at]):.6g}, not {float(expected[at]):.6g}"


def _packed(
    name: str, text: str, origin: str, found: Tensor, scale: Tensor, parts: list[Tensor], method: str
) -> WeightReport:
    expected = torch.cat(parts, dim=-2)
    if found.shape != expected.shape:
        return WeightReport(
            name, text, origin, torch.inf, f"has shape {list(found.shape)}, the checkpoint {list(expected.shape)}"
        )
    if origin != "quantized":
        return _equal(name, text, origin, found, expected)
    error, layout = _relative(found, expected), grid.grid_of(text)
    why, row = "", 0
    for part in parts:
        rows = slice(row, row + part.shape[-2])
        row = rows.stop
        wanted = _rule(part, layout)
        why = why or _off(found[..., rows, :], part, scale[..., rows, :], wanted, layout, method)
    return WeightReport(name, text, origin, error, why)


def _rule(part: Tensor, layout: grid.Grid) -> Tensor:
    """Each element's scale by the rule. Where tiles were cut to join weights, the scale is of the uncut tile of 128."""
    whole = layout if layout.rows in (1, 128) else grid.grid_of(layout.text.replace(f":{layout.rows}x", ":128x", 1))
    return grid.spread(grid.scale_of(grid.block_amax(part, whole), whole), whole, tuple(part.shape))


def _off(found: Tensor, part: Tensor, scale: Tensor, wanted: Tensor, layout: grid.Grid, method: str) -> str:
    """What is wrong with values that were rounded anew; empty if nothing is."""
    candidates = _candidates(wanted, layout, method)
    near = torch.stack([(scale / c - 1).abs() for c in candidates])  # float32 scales are rounded themselves
    outside = near.amin(0) > 2.0**-20
    if bool(outside.any()):
        at = tuple(outside.nonzero()[0].tolist())
        return f"the scale at {list(at)} is {float(scale[at]):g}, by the rule ({method}) {float(wanted[at]):g}"
    expected = _rounded(part, scale, layout)
    differs = ~(found == expected)
    if bool(differs.any()):
        return _difference(differs, found, expected)
    return _not_the_least(part, candidates, found, scale, wanted, layout) if method == "mse" else ""


def _candidates(wanted: Tensor, layout: grid.Grid, method: str) -> list[Tensor]:
    """The scales that a block may have: by the rule, or one of those that least squares chooses from."""
    if method == "amax":
        return [wanted]
    found = [(wanted * factor).clamp(min=2.0**-126) for factor in SMALLER[layout.scale == "float32"]]
    if layout.scale == "float32":  # also the power of two above the rule's: the grid of stored FP8
        mantissa, exponent = torch.frexp(wanted.float())
        found.append(torch.exp2((exponent - (mantissa == 0.5).int()).double()))
    return found


def _rounded(part: Tensor, scale: Tensor, layout: grid.Grid) -> Tensor:
    number = (part.float() / scale.float()).double()
    step = grid.grid_spacing(number, torch.ones(()).double(), layout)
    return (torch.round(number / step) * step).clamp(-layout.code.top, layout.code.top) * scale


def _not_the_least(
    part: Tensor, candidates: list[Tensor], found: Tensor, scale: Tensor, wanted: Tensor, layout: grid.Grid
) -> str:
    """Where a block's scale loses more than another candidate; blocks of one row, whose tiles are never cut."""
    if layout.rows != 1:
        return ""
    losses = [_block_loss(_rounded(part, c, layout) - part, layout) for c in candidates]
    least, ours = torch.stack(losses).amin(0), _block_loss(found - part, layout)
    worse = ours > least * (1 + 2.0**-16) + 2.0**-40 * _block_loss(part, layout)  # sums in float32 chose
    if not bool(worse.any()):
        return ""
    at = tuple(worse.nonzero()[0].tolist())
    first = (*at[:-1], at[-1] * (layout.columns or part.shape[-1]))
    return (
        f"the scale at {list(first)} is {float(scale[first]):g}, by the rule {float(wanted[first]):g}: of the scales "
        f"that mse chooses from another loses less ({float(least[at]):g}, not {float(ours[at]):g})"
    )


def _block_loss(error: Tensor, layout: grid.Grid) -> Tensor:
    width = layout.columns or error.shape[-1]
    padded = torch.nn.functional.pad(error.square(), (0, -error.shape[-1] % width))
    total: Tensor = padded.unflatten(-1, (-1, width)).sum(-1)
    return total


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm()) / (float(expected.norm()) or 1.0)
