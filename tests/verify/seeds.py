"""Seeded faults: the ways in which a quantised model goes wrong without crashing, each for several tensors.

A fault is put where it would come from: into the bytes of a checkpoint or of an artifact, into a plan, into a recipe,
into the code of a format or an operator. `expected` is what the message must name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atomc.ops import OPS

KINDS = (
    "scale transposed", "E8M0 off by one", "FNUZ read as OCP", "nibbles swapped", "dialect mismatch", "missing scale",
    "Hadamard on one side", "group 32 read as 128",
)  # fmt: skip
Json = Any
Damage = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # codes, scales


# -- bytes -------------------------------------------------------------------------------------------------------------


def byte(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def transposed(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Written in the other order, under the same shape."""
    return codes, byte(scales).mT.contiguous().view(scales.shape).view(scales.dtype)


def off_by_one(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return codes, (byte(scales) + 1).view(scales.dtype)


def fnuz(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of the FNUZ dialect, labelled as OCP."""
    return codes.float().clamp(-240, 240).to(torch.float8_e4m3fnuz).view(torch.uint8).view(codes.dtype), scales


def swapped(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return ((byte(codes) << 4) | (byte(codes) >> 4)).view(codes.dtype), scales


def without_scale(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return codes, torch.full_like(byte(scales), 127).view(scales.dtype)


def coarse(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The first of four groups' scales for all four."""
    wide = byte(scales)[..., ::4].repeat_interleave(4, -1)[..., : scales.shape[-1]]
    return codes, wide.contiguous().view(scales.dtype)


FP8: dict[str, Damage] = {
    "scale transposed": transposed, "E8M0 off by one": off_by_one, "FNUZ read as OCP": fnuz,
    "missing scale": without_scale,
}  # fmt: skip
FP4: dict[str, Damage] = {
    "scale transposed": transposed, "E8M0 off by one": off_by_one, "nibbles swapped": swapped,
    "missing scale": without_scale, "group 32 read as 128": coarse,
}  # fmt: skip
# Weights of the artifact: codes, scales.
ARTIFACT_FP8 = ("layers.0.attn.wq_b", "layers.1.attn.wo_b", "layers.2.attn.indexer.wq_b")
ARTIFACT_FP4 = ("layers.0.ffn.experts.w13", "layers.2.ffn.experts.w2")
# Of the checkpoint, one tensor for each kind, so that one compile shows them all.
CHECKPOINT = {
    ("scale transposed", "layers.0.attn.wq_b"): "layers.0.attn.wq_b.weight",
    ("E8M0 off by one", "layers.0.attn.wo_b"): "layers.0.attn.wo_b.weight",
    ("FNUZ read as OCP", "layers.1.attn.wo_b"): "layers.1.attn.wo_b.weight",
    ("missing scale", "layers.1.attn.wq_b"): "layers.1.attn.wq_b.weight",
    ("E8M0 off by one", "layers.2.attn.wkv"): "layers.2.attn.wq_a|attn.wkv.weight",
    (
        "FNUZ read as OCP",
        "layers.1.ffn.shared_experts.w3",
    ): "layers.1.ffn.shared_experts.w1|ffn.shared_experts.w3.weight",
    ("scale transposed", "layers.0.ffn.experts.1.w1"): "layers.0.ffn.experts.w13",
    ("nibbles swapped", "layers.0.ffn.experts.2.w2"): "layers.0.ffn.experts.w2",
    ("nibbles swapped", "layers.1.ffn.experts.3.w3"): "layers.1.ffn.experts.w13",
    ("group 32 read as 128", "layers.1.ffn.experts.0.w2"): "layers.1.ffn.experts.w2",
    ("group 32 read as 128", "layers.2.ffn.experts.0.w1"): "layers.2.ffn.experts.w13",
    ("E8M0 off by one", "layers.2.ffn.experts.3.w2"): "layers.2.ffn.experts.w2",
}


# Of an artifact whose weights were rounded by the compiler: not equal to the checkpoint even where nothing is wrong.
ROUNDED = {
    ("E8M0 off by one", "layers.0.attn.wq_b"): "layers.0.attn.wq_b.weight",
    ("FNUZ read as OCP", "layers.1.attn.wo_b"): "layers.1.attn.wo_b.weight",
    ("missing scale", "layers.2.attn.indexer.wq_b"): "layers.2.attn.indexer.wq_b.weight",
    ("nibbles swapped", "layers.0.ffn.experts.w13"): "layers.0.ffn.experts.w13",
    ("group 32 read as 128", "layers.2.ffn.experts.w13"): "layers.2.ffn.experts.w13",
}


def edit_tensors(folder: Path, edits: dict[str, Callable[[dict[str, Tensor]], None]]) -> None:
    """Change tensors of the files below a folder; each edit is given the tensors of the file that holds its name."""
    left = dict(edits)
    for file in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(file)
        here = [name for name in left if name in tensors]
        for name in here:
            left.pop(name)(tensors)
        if here:
            save_file(tensors, file, metadata={"format": "pt"})
            _reindex(folder, file, tensors)
    assert not left, left


def _reindex(folder: Path, file: Path, tensors: dict[str, Tensor]) -> None:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        found = json.loads(index.read_text())
        found["weight_map"] = {n: f for n, f in found["weight_map"].items() if f != file.name or n in tensors}
        found["weight_map"] |= dict.fromkeys(tensors, file.name)
        index.write_text(json.dumps(found))


def damaged(pairs: dict[str, tuple[str, Damage]]) -> dict[str, Callable[[dict[str, Tensor]], None]]:
    """Edits of codes and their scales (name of the scales, damage), by the name of the codes; both are in one file."""

    def edit(codes: str, scales: str, damage: Damage) -> Callable[[dict[str, Tensor]], None]:
        def change(tensors: dict[str, Tensor]) -> None:
            before = tensors[codes], tensors[scales]
            tensors[codes], tensors[scales] = (t.contiguous() for t in damage(*before))
            same = all(
                torch.equal(byte(a), byte(b)) for a, b in zip(before, (tensors[codes], tensors[scales]), strict=True)
            )
            assert not same, f"{codes}: the damage changes nothing"

        return change

    return {codes: edit(codes, scales, damage) for codes, (scales, damage) in pairs.items()}


# -- checkpoints that are refused --------------------------------------------------------------------------------------


class Refused(NamedTuple):
    kind: str
    tensor: str
    change: Callable[[dict[str, Tensor], str], None]


def _set(change: Callable[[Tensor], Tensor | None]) -> Callable[[dict[str, Tensor], str], None]:
    def run(tensors: dict[str, Tensor], name: str) -> None:
        value = change(tensors.pop(name))
        if value is not None:
            tensors[name] = value.contiguous()

    return run


REFUSED = [
    Refused("missing scale", "layers.0.attn.wq_a.scale", _set(lambda _: None)),
    Refused("missing scale", "layers.1.ffn.experts.2.w1.scale", _set(lambda _: None)),
    Refused("missing scale", "layers.2.attn.indexer.wq_b.scale", _set(lambda _: None)),
    Refused("scale transposed", "layers.0.attn.wkv.scale", _set(lambda s: s.mT)),
    Refused("scale transposed", "layers.2.attn.indexer.wq_b.scale", _set(lambda s: s.mT)),
    Refused("scale transposed", "layers.1.ffn.experts.0.w1.scale", _set(lambda s: s.mT)),
    Refused("dialect mismatch", "layers.0.attn.wq_b.weight", _set(lambda w: byte(w).view(torch.float8_e4m3fnuz))),
    Refused("dialect mismatch", "layers.1.attn.wo_a.weight", _set(lambda w: byte(w).view(torch.float8_e5m2))),
    Refused("group 32 read as 128", "layers.1.ffn.experts.0.w1.scale", _set(lambda s: s[:, ::4])),
    Refused("group 32 read as 128", "layers.2.ffn.experts.3.w2.scale", _set(lambda s: s[:, ::4])),
]


# -- plans -------------------------------------------------------------------------------------------------------------


class Edit(NamedTuple):
    """A change of a region's plan; the message says `expected`, which names the tensor.

    Activations have no name but the plan's: there it is a function of the plan.
    """

    kind: str
    expected: str | Callable[[Json], str]
    region: str
    change: Callable[[Json], None]


def reads(region: Json, name: str) -> Json:
    """The first step that reads an input."""
    slot = next(i["slot"] for i in region["inputs"] if i["name"] == name)
    return next(
        s
        for s in region["prepare"] + region["steps"]
        if any(isinstance(a, dict) and a.get("id") == slot for a in s["args"])
    )


def of(region: Json, op: str, number: int = 0) -> Json:
    return [s for s in region["steps"] if s["op"].split(".")[1] == op][number]


def codes_of(op: str) -> Callable[[Json], str]:
    """The codes that an operator reads, as the plan calls them."""
    return lambda region: f"): {region['slots'][of(region, op)['args'][0]['id']]['name']} in e4m3"


def text(step: Json, old: str, new: str, last: bool = True) -> None:
    """Replace in the last (or the first) layout of a step."""
    found = [i for i, a in enumerate(step["args"]) if isinstance(a, str) and old in a]
    at = found[-1 if last else 0]
    step["args"][at] = step["args"][at].replace(old, new)


def weight_text(name: str, old: str, new: str) -> Callable[[Json], None]:
    return lambda region: text(reads(region, name), old, new)


def step_text(op: str, old: str, new: str, number: int = 0, last: bool = True) -> Callable[[Json], None]:
    return lambda region: text(of(region, op, number), old, new, last)


def index_writer(region: Json) -> Json:
    return next(s for s in region["steps"] if s["op"].startswith("atom.compressor_pool") and "e2m1" in s["args"][-1])


def without_rotation(region: Json) -> None:
    index_writer(region)["args"][-2] = False


def with_rotation(region: Json) -> None:
    """The main compressor's rows; the attention's queries are not rotated, but no rule knows: it is the index rows'."""
    step = of(region, "index_rope_topk")
    step["args"][-1] = ""


def without_scale_argument(name: str) -> Callable[[Json], None]:
    def change(region: Json) -> None:
        del reads(region, name)["args"][1]

    return change


def cast_instead(name: str) -> Callable[[Json], None]:
    """Codes taken for numbers."""

    def change(region: Json) -> None:
        step = reads(region, name)
        step["op"], step["args"] = "aten.to.dtype", [step["args"][0], step["args"][3]]

    return change


def scales_of(name: str, other: str) -> Callable[[Json], None]:
    def change(region: Json) -> None:
        slots = {i["name"]: i["slot"] for i in region["inputs"]}
        reads(region, name)["args"][1]["id"] = slots[other]

    return change


ATTENTION, COMPRESSOR = "sparse_attention_inverse_rope_quant", "compressor_pool_norm_rope_insert"
CSA, HCA, SWA = "layer_csa_topk", "layer_hca_topk", "layer_swa_hash"


def of_weight(kind: str, name: str, region: str, old: str, new: str) -> Edit:
    return Edit(kind, f"reads {name}): {name} in ", region, weight_text(name, old, new))


WINDOW, ROWS, INDEX = "cache 'window' in", "cache 'rows' in", "index rows 'index_rows' are"
PAGES, NORMS = "cache 'index_rows' has pages", "reads attn.q_norm.weight, attn.kv_norm.weight): result"
BARE, OTHERS = "codes of 'attn.wo_b.weight'", "attn.wq_b.weight in e4m3:128x128:e8m0: read with"
MOE = "moe_experts_quant"
PLANS = [
    of_weight("dialect mismatch", "attn.wq_b.weight", SWA, "e4m3:", "e4m3fnuz:"),
    of_weight("dialect mismatch", "attn.wo_a.weight", HCA, "e4m3:", "e5m2:"),
    of_weight("dialect mismatch", "ffn.experts.w2", CSA, "e2m1:", "int8:"),
    Edit("dialect mismatch", codes_of("dequantize"), SWA, step_text("dequantize", "e4m3:", "e4m3fnuz:")),
    Edit("dialect mismatch", WINDOW, SWA, step_text(ATTENTION, "e4m3:", "e4m3fnuz:", last=False)),
    Edit("dialect mismatch", ROWS, HCA, step_text(COMPRESSOR, "e4m3:", "e4m3fnuz:")),
    Edit("dialect mismatch", WINDOW, CSA, step_text("qk_norm_rope_insert", "e4m3:", "e4m3fnuz:")),
    of_weight("group 32 read as 128", "ffn.experts.w13", SWA, "1x32", "1x128"),
    of_weight("group 32 read as 128", "ffn.experts.w2", HCA, "1x32", "1x128"),
    Edit("group 32 read as 128", PAGES, CSA, step_text("index_rope_topk", "1x32", "1x128", last=False)),
    Edit("group 32 read as 128", codes_of(MOE), CSA, step_text(MOE, "1x128", "1x32", last=False)),
    Edit("group 32 read as 128", NORMS, HCA, step_text("rms_norm_pair_quant", "1x128", "1x32")),
    of_weight("scale transposed", "attn.wq_b.weight", SWA, "128x128", "64x256"),
    Edit("E8M0 off by one", WINDOW, SWA, step_text("qk_norm_rope_insert", "e8m0", "pow2")),
    Edit("missing scale", "reads attn.wq_b.weight): argument", SWA, without_scale_argument("attn.wq_b.weight")),
    Edit("missing scale", BARE, HCA, cast_instead("attn.wo_b.weight")),
    Edit("missing scale", OTHERS, CSA, scales_of("attn.wq_b.weight", "attn.wo_b.scale")),
    Edit("Hadamard on one side", INDEX, CSA, without_rotation),
    Edit("Hadamard on one side", INDEX, CSA, with_rotation),
]  # fmt: skip


# -- code --------------------------------------------------------------------------------------------------------------


class Mistake(NamedTuple):
    """A mistake in a format's code or an operator's; a broken step is about each tensor of `expected`."""

    kind: str
    expected: tuple[str, ...]
    put: Callable[[pytest.MonkeyPatch], None]


def _scales_read(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """Dequantising with other scales than those stored."""

    def put(patch: pytest.MonkeyPatch) -> None:
        import atomc.ops.quantize as ops

        right = ops.from_layout
        patch.setattr(ops, "from_layout", lambda codes, scales, *rest: right(codes, change(scales), *rest))

    return put


def _stored_one_up(patch: pytest.MonkeyPatch) -> None:
    from atomc.formats import layout

    right = layout.store_scale
    patch.setattr(layout, "store_scale", lambda scale, kind: right(scale * 2, kind))


def _loaded_one_up(patch: pytest.MonkeyPatch) -> None:
    from atomc.formats import layout

    right = layout.load_scale
    patch.setattr(layout, "load_scale", lambda stored: right(stored) * 2)


def _both_one_up(patch: pytest.MonkeyPatch) -> None:
    """A pair of mistakes that cancel: rows are read as they were written, but no other engine could read them."""
    from atomc.formats import layout

    store, load = layout.store_scale, layout.load_scale
    patch.setattr(layout, "store_scale", lambda scale, kind: store(scale * 2, kind))
    patch.setattr(layout, "load_scale", lambda stored: load(stored) / 2)


def _swap(packed: Tensor) -> Tensor:
    return ((byte(packed) << 4) | (byte(packed) >> 4)).view(packed.dtype)


def _packs_swapped(patch: pytest.MonkeyPatch) -> None:
    from atomc.formats import element

    right = element.pack_e2m1
    patch.setattr(element, "pack_e2m1", lambda code: _swap(right(code)))


def _unpacks_swapped(patch: pytest.MonkeyPatch) -> None:
    from atomc.formats import element

    right = element.unpack_e2m1
    patch.setattr(element, "unpack_e2m1", lambda packed: right(_swap(packed)))


def _both_swapped(patch: pytest.MonkeyPatch) -> None:
    _packs_swapped(patch)
    _unpacks_swapped(patch)


def _reads_fnuz(patch: pytest.MonkeyPatch) -> None:
    from atomc.formats.element import Element

    right = Element._values

    def values(self: Element, codes: Tensor) -> Tensor:
        return byte(codes).view(torch.float8_e4m3fnuz).float() if self.name == "e4m3" else right(self, codes)

    patch.setattr(Element, "_values", values)


def _writes_fnuz(patch: pytest.MonkeyPatch) -> None:
    from atomc.formats.element import Element

    def cast(self: Element, x: Tensor) -> Tensor:
        return x.clamp(-240, 240).to(torch.float8_e4m3fnuz).view(torch.uint8).view(self.storage)

    patch.setattr(Element, "_cast", cast)


def _one_group(patch: pytest.MonkeyPatch) -> None:
    """Groups of 32 that take the scale of the first of four."""
    from atomc.formats import layout

    right = layout.spread

    def spread(scale: Tensor, wanted: layout.Layout, rows: int, columns: int) -> Tensor:
        if wanted.columns == 32:
            scale = scale[..., ::4].repeat_interleave(4, -1)[..., : scale.shape[-1]]
        return right(scale, wanted, rows, columns)

    patch.setattr(layout, "spread", spread)


def _argument(op: str, **changed: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """An operator of the cpu that takes an argument for something else."""

    def put(patch: pytest.MonkeyPatch) -> None:
        right, order = OPS[op].cpu, [a.name for a in OPS[op].overload._schema.arguments]

        def run(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(order, args, strict=False)) | kwargs
            return right(**(given | {n: f(given[n]) if callable(f) else f for n, f in changed.items()}))

        patch.setitem(OPS, op, dataclasses.replace(OPS[op], cpu=run))

    return put


def _shuffled(scales: Tensor) -> Tensor:
    return byte(scales).mT.contiguous().view(scales.shape).view(scales.dtype) if scales.dim() > 1 else scales


WEIGHTS = ("layers.0.attn.wq_b.weight", "layers.1.attn.wo_b.weight")
CACHES = ("layers.0.window", "layers.1.rows", "layers.2.rows", "layers.2.index_rows")
MISTAKES = [
    Mistake("scale transposed", WEIGHTS, _scales_read(_shuffled)),
    Mistake("missing scale", WEIGHTS, _scales_read(lambda s: torch.full_like(byte(s), 127).view(s.dtype))),
    Mistake("E8M0 off by one", WEIGHTS, _scales_read(lambda s: (byte(s) - 1).view(s.dtype))),
    Mistake("E8M0 off by one", CACHES, _stored_one_up),
    Mistake("E8M0 off by one", WEIGHTS, _loaded_one_up),
    Mistake("E8M0 off by one", CACHES, _both_one_up),
    Mistake("nibbles swapped", ("layers.2.index_rows",), _packs_swapped),
    Mistake("nibbles swapped", ("layers.0.ffn.experts.w13", "layers.1.ffn.experts.w2"), _unpacks_swapped),
    Mistake("nibbles swapped", ("layers.2.index_rows", "layers.1.ffn.experts.w2"), _both_swapped),
    Mistake("FNUZ read as OCP", WEIGHTS, _reads_fnuz),
    Mistake("FNUZ read as OCP", CACHES[:3], _writes_fnuz),
    Mistake("group 32 read as 128", ("layers.2.index_rows",), _one_group),
    Mistake("Hadamard on one side", ("layers.2.index_rows",), _argument(COMPRESSOR, rotate=False)),
    Mistake("Hadamard on one side", ("layers.2.index_rows",), _argument("index_rope_topk", layout="")),
]  # fmt: skip

# Faults of an operator that are none of a format: the operator, the tensor that must be named at its step, the change.
OPERATORS = {
    "rope the other way": ("qk_norm_rope_insert", "window", {"sin": lambda s: -s}),
    "window one short": ("sparse_attention_inverse_rope_quant", "window", {"window_size": lambda n: n - 1}),
    "wrong clamp": ("moe_experts_quant", "ffn.experts.w13", {"limit": 100.0}),
    "no routing weight": ("moe_experts_quant", "ffn.experts.w2", {"weights": torch.ones_like}),
    "experts without their bias": ("route_topk", "ffn.gate.bias", {"bias": torch.zeros_like}),
    "streams mixed by the transpose": ("hc_post_pre_norm_quant", "hc_ffn.fn", {"comb": lambda c: c.mT}),
    "partial state in the wrong place": ("compressor_update", "partial", {"positions": lambda p: p + 1}),
    "swiglu without its clamp": ("swiglu_quant", "getitem_44", {"limit": 100.0}),  # an activation: the plan's name
}
