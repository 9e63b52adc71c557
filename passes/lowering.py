"""What a target does with a layout: multiply it as it is, expand it exactly, or nothing: a compile error."""

from __future__ import annotations

from dataclasses import replace

from atomc.formats import Layout, RowLayout
from atomc.passes.graph import PassError
from atomc.targets import Target


def on_target(layout: Layout, target: Target) -> Layout:
    """The layout in the target's FP8 dialect; the numbers are the same."""
    return layout.fnuz() if target.fp8 == "fnuz" else layout


def rows_on_target(rows: RowLayout, target: Target) -> RowLayout:
    """The row layout in the target's FP8 dialect; the numbers are the same."""
    return replace(rows, layout=on_target(rows.layout, target) if rows.layout else None)


def lowering_of(weight: Layout, activation: Layout | None, target: Target, dtype: str, name: str, where: str) -> str:
    """How the target multiplies a weight in that layout, in words for the table.

    Raises:
        PassError: it cannot, and no exact expansion exists; names the weight and the ways out.
    """
    if not target.is_gpu:
        return f"expanded to {dtype.removeprefix('torch.')} when loaded"
    for what, layout in (("weight", weight), ("activation", activation)):
        if layout is None:
            continue
        element = layout.element
        if element.name.startswith("e4m3") and element.dialect != target.fp8:
            other = target.fp8.upper()
            raise PassError(
                f"{name} ({where}): {what} layout {layout} is of the {element.dialect.upper()} dialect, but "
                f"{target.name} multiplies {other}; read as {other} its bytes would be other numbers. Write the "
                f"{other} layout."
            )
        if element.name.startswith("e5m2") or element.name == "int8":
            raise PassError(
                f"{name} ({where}): {target.name} has no product for {what} layout {layout}. Choose an e4m3 or e2m1 "
                "layout for it, or `bfloat16`."
            )
    if activation is None:
        return "expanded to bf16 in registers: its input is not quantised"
    narrow = f"e4m3 matrix instructions ({target.fp8.upper()})"
    if target.peaks.fp8 is None:
        return "both expanded to bf16 in registers"
    fours = [what for what, layout in (("weight", weight), ("input", activation)) if layout.element.bits == 4]
    if fours and target.mx != "native":
        wide = "e4m3fnuz" if target.fp8 == "fnuz" else "e4m3"
        return f"{' and '.join(fours)} expanded to {wide} in registers, exactly; {narrow}"
    return f"scaled matrix instructions, {weight.element.name} x {activation.element.name}" if fours else narrow
