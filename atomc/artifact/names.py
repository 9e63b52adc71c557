"""What a step is about, in names a user knows: the weights behind a slot, the state it reads or writes."""

from __future__ import annotations

from atomc.artifact.facts import is_scale
from atomc.artifact.plan import RegionPlan, Step, slots_of


class Names:
    """Names of a region's slots: inputs by role, and the weights and state behind what views or is prepared of them."""

    def __init__(self, region: RegionPlan) -> None:
        self.role = {item.slot: item.role for item in region.inputs}
        self.name = {item.slot: item.name for item in region.inputs}
        self._slots = region.slots
        self._behind: dict[int, list[str]] = {i.slot: [i.name] for i in region.inputs if i.role == "weight"}
        for step in region.prepare:
            weights = [name for slot in slots_of(step) for name in self._weights_of(slot)]
            self._behind |= {slot: weights for slot in step.outputs if slot is not None}

    def weights(self, step: Step) -> list[str]:
        """Names of the weights that a step reads, directly or as they were prepared; scales go with what they scale."""
        found = list(dict.fromkeys(name for slot in slots_of(step) for name in self._weights_of(slot)))
        return [name for name in found if not is_scale(name, found)]

    def states(self, step: Step) -> list[str]:
        """Names of the state that a step reads or writes."""
        owners = [self._owner(slot) for slot in slots_of(step)]
        return list(dict.fromkeys(self.name[s] for s in owners if self.role.get(s) == "state"))

    def reads(self, step: Step) -> list[str]:
        """Names of the weights and the state of a step."""
        return self.weights(step) + self.states(step)

    def place(self, phase: str, at: int, step: Step) -> str:
        """A step in a message: `step 3 (atom.dequantize.default, model.py:7, reads attn.wq_b.weight)`."""
        names = ", ".join(self.reads(step))
        return f"{phase} {at} ({step.op}, {step.source}{', reads ' if names else ''}{names})"

    def subject(self, step: Step, prefix: str, written: str | None) -> str:
        """What to call the tensor that is wrong: the state written, else the weight, else the state read, else a slot.

        Args:
            written: name of the state that the step writes, where that is what is wrong.
        """
        if written is not None:
            return prefix + written
        if weights := self.weights(step):
            return f"{prefix}{weights[0]}" + (f" and {len(weights) - 1} more" if len(weights) > 1 else "")
        if states := self.states(step):
            return prefix + states[0]
        made = [self._slots[s].name for s in step.outputs if s is not None]
        return prefix + (made[0] if made else "?")

    def _owner(self, slot: int) -> int:
        base = self._slots[slot].base if 0 <= slot < len(self._slots) else None  # a plan that is being checked
        return slot if base is None else base

    def _weights_of(self, slot: int) -> list[str]:
        return self._behind.get(slot) or self._behind.get(self._owner(slot), [])
