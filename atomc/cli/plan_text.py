"""A region's plan as text: `%12: float32[T, 64] = atom.rms_norm(%3, attn_norm.weight, 1e-06)  # file.py:40`."""

from __future__ import annotations

from collections.abc import Iterator

from atomc.artifact.plan import Arg, DType, RegionPlan, Size, Slot, SlotInfo, Step

_END = 2**63 - 1  # a slice up to the end


def plan_lines(region: RegionPlan) -> Iterator[str]:
    """The inputs by role, the steps in order, the outputs by name."""
    names = slot_names(region)
    for item in region.inputs:
        yield f"{item.role:9} {names[item.slot]}: {_type(region.slots[item.slot])}"
    yield ""
    texts = [step_text(step, region, names) for step in region.steps]
    width = min(max(map(len, texts), default=0), 120)
    for number, (text, step) in enumerate(zip(texts, region.steps, strict=True)):
        yield f"{number:4}  {text:{width}}  # {step.source}"
    yield ""
    for name, slot in region.outputs.items():
        yield f"output    {name} = {names[slot]}"


def slot_names(region: RegionPlan) -> list[str]:
    """Weights, states, fields and values by their names, everything else by its number."""
    names = [f"%{number}" for number in range(len(region.slots))]
    for item in region.inputs:
        names[item.slot] = item.name if item.role in ("weight", "value") else f"{item.role}.{item.name}"
    return names


def step_text(step: Step, region: RegionPlan, names: list[str]) -> str:
    """One step, without its source."""
    args = [_arg(a, names) for a in step.args] + [f"{k}={_arg(v, names)}" for k, v in step.kwargs.items()]
    call = f"{step.op.removesuffix('.default')}({', '.join(args)})"
    outputs = ["_" if i is None else f"{names[i]}: {_type(region.slots[i])}" for i in step.outputs]
    return f"{', '.join(outputs)} = {call}" if outputs else call


def _arg(arg: Arg, names: list[str]) -> str:
    if isinstance(arg, list):
        return f"[{', '.join(_arg(a, names) for a in arg)}]"
    if isinstance(arg, Slot):
        return names[arg.id]
    if isinstance(arg, Size):
        return arg.expr
    if isinstance(arg, DType):
        return arg.name
    return "end" if arg == _END else repr(arg)


def _type(slot: SlotInfo) -> str:
    return f"{slot.dtype}[{', '.join(map(str, slot.shape))}]"
