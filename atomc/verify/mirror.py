"""What a GPU's memory should hold: a copy of what each step has left, held against what the next one finds.

Contract:
    A step of a GPU is judged on what it finds in its arguments. If a step before has written over one of them (out of
    its bounds, or into memory that the plan gives to two at a time), that is no error of either by its own numbers.
    Weights are those of the artifact, and state is what the executor has made of it before the first step; a value of
    one step of the model is no value of the next. Scratch of a step is nobody's after it: only what it spoils is seen.
    Copies are on the device, but for weights that the artifact has on the CPU.

Terms:
    key    a role, and a name: of weights and state with the call's prefix, of values that pass between calls the
           program's; of all else the slot's number in its call
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from atomc.artifact.plan import CallPlan, RegionPlan
from atomc.verify.launched import as_bytes

Key = tuple[str, str]
Left = tuple[Tensor, str]  # what it is, and who left it there


class Mirror:
    """See the module's contract."""

    def __init__(self, first: CallPlan, weights: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
        """`states`: zeros, whatever ran before; a write out of the reserved rows then shows at the first reader."""
        self._first = first
        self._known: dict[Key, Left] = {("weight", n): (w, "the artifact") for n, w in weights.items()}
        self._known |= {("state", n): (torch.zeros_like(s), "the executor") for n, s in states.items()}
        self._outputs: dict[str, Key] = {}

    def enter(self, call: CallPlan, region: RegionPlan) -> None:
        """A call begins: what the one before gave is a value now, the rest of its slots is gone."""
        values = {name: self._known.get(key) for name, key in self._outputs.items()}
        gone = {"slot", "batch", "value"} if call is self._first else {"slot"}
        self._known = {key: left for key, left in self._known.items() if key[0] not in gone}
        for name, left in values.items() if call is not self._first else ():
            self._known.pop(("value", name), None)
            if left is not None:
                self._known["value", name] = left
        self._outputs = {name: key_of(call, region, slot) for name, slot in region.outputs.items()}

    def changed(self, key: Key, now: Tensor) -> str:
        """How a tensor is not what was left there; empty if it is, or nothing is known of it yet."""
        if key not in self._known:
            self._known[key] = now, "its first reader"
            return ""
        before, who = self._known[key]
        before = before.to(now.device)
        if before.dtype != now.dtype or before.shape != now.shape:
            return f"is {list(now.shape)} {now.dtype}; {who} left {list(before.shape)} {before.dtype}"
        a, b = as_bytes(before.reshape(-1)), as_bytes(now.reshape(-1))
        if torch.equal(a, b):
            return ""
        self._known[key] = now, "a step that has no right to it"
        differs = (a != b).nonzero().flatten()
        first = torch.unravel_index(differs[0].cpu() // now.dtype.itemsize, now.shape) if now.dim() else ()
        place = ", ".join(str(int(i)) for i in first)
        return f"is not what {who} left: {len(differs)} bytes were written over, the first in element [{place}]"

    def left(self, key: Key, now: Tensor, who: str) -> None:
        """A step has made a tensor, or has written into it as it may."""
        self._known[key] = now, who

    def forget(self, key: Key) -> None:
        """What is known of a tensor is true no longer."""
        self._known.pop(key, None)


def key_of(call: CallPlan, region: RegionPlan, slot: int) -> Key:
    """The key of a slot during a call."""
    item: Any = next((i for i in region.inputs if i.slot == slot), None)
    if item is None:
        prepared = region.slots[slot].role == "prepared"
        return ("prepared", f"{call.prefix}{slot}") if prepared else ("slot", str(slot))
    if item.role == "value":
        return "value", call.binds.get(item.name, item.name)
    return item.role, item.name if item.role == "batch" else call.prefix + item.name
