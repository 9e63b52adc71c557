"""How the products of the routed experts are cut, for a target and a bucket: by a static model, or as measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

from atomc.codegen.device import Device
from atomc.codegen.tuning import STATIC, tuned


@dataclass(frozen=True)
class Part:
    """How one of the two products is cut.

    Attributes:
        rows: of the weight, of a program; of the first product as many of gate and of up. splits: parts of the first
            product's columns that programs of their own sum. blocks: of 128 columns, of a step.
    """

    rows: int
    warps: int
    stages: int
    splits: int = 1
    blocks: int = 1


@dataclass(frozen=True)
class Config:
    """How the products are cut.

    Attributes:
        bm: tokens of a tile. fused: `experts_in` ends with SwiGLU. origin: who chose it (`codegen.tuning`).
    """

    bm: int
    first: Part
    second: Part
    fused: bool = True
    origin: str = STATIC

    @property
    def table(self) -> dict[str, int | bool]:
        """What a table of tuned configurations has of it."""
        parts = {"in": asdict(self.first), "out": asdict(self.second)}
        named = {f"{name}_{end}": value for end, part in parts.items() for name, value in part.items()}
        return {"bm": self.bm, "fused": self.fused, **named}

    @staticmethod
    def of(table: Mapping[str, int | bool], origin: str) -> Config:
        """A configuration from its `table`."""
        first, second = ({f.name: table[f"{f.name}_{end}"] for f in fields(Part)} for end in ("in", "out"))
        return Config(table["bm"], Part(**first), Part(**second), bool(table["fused"]), origin)  # type: ignore[arg-type]


def choose(device: Device, choices: int, experts: int, fused: bool, eights: bool) -> Config:
    """The static model's configuration for a bucket; `fused`: whether the inner layout's groups fit 128 rows."""
    pairs = device.tokens * choices
    rows = pairs / experts  # of an expert, if all are alike
    few = pairs <= 16  # few experts: programs with fewer rows, or parts of the columns, fill the device
    bm = 16 if rows <= 12 else 32 if rows <= 40 else 64
    if device.target.vendor == "amd":
        if few:
            return Config(16, Part(64, 4, 2, splits=2), Part(64, 4, 2), fused=False)
        return Config(bm, Part(128, 4, 2), Part(128, 4, 2), fused=fused)
    if device.target.mx == "native":  # its scaled instructions have 128 rows
        if bm == 16:
            part = Part(128, 4, 4)
            return Config(16, replace(part, splits=4 if few else 1), part, fused=fused and not few)
        bm = 32 if eights else bm
    elif bm == 16:  # bound by memory: several programs on a multiprocessor, of few registers each
        return Config(16, Part(64, 4, 4, splits=2 if few else 1), Part(64 if few else 128, 4, 4), fused=False)
    return Config(bm, Part(128, 8, 3), Part(128, 8, 3), fused=fused)


def measured(device: Device, problem: Mapping[str, int | str]) -> Config | None:
    """The configuration that was measured for a problem (`problem_of`) and the bucket, if one was."""
    found = tuned(device.target, "experts", device.tokens, problem)
    return None if found is None else Config.of(*found)


def problem_of(experts: int, choices: int, d: int, i: int, layouts: Sequence[str]) -> dict[str, int | str]:
    """What a configuration is measured for; layouts of the activations, of the inner ones, of w13 and of w2."""
    known: dict[str, int | str] = dict(zip(("x", "inner", "w13", "w2"), layouts, strict=True))
    return {"experts": experts, "choices": choices, "d": d, "i": i, **known}
