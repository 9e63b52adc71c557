"""Regions whose steps are launched, made without kernels: for what looks at the order and the memory of launches."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from atomc.artifact.buffers import slot_bytes
from atomc.artifact.order import is_work, owners_of
from atomc.artifact.plan import SYMBOLS, Arg, Bucket, Launch, RegionInput, RegionPlan, Role, SlotInfo, Step
from atomc.artifact.plan import Slot as SlotArg
from atomc.codegen.liveness import Value, finish

BOUNDS = dict.fromkeys(SYMBOLS, 1) | {"T": 64, "B": 8}
BUCKETS = [Bucket(16, [Launch("k", ["T"], [])], []), Bucket(64, [Launch("k", ["T"], [])], [])]


class Region:
    """A region of float32 [T, n], built step by step; `x` is its input, `s` and `t` are states, `w` is a weight."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.inputs: list[RegionInput] = []
        self.steps: list[Step] = []
        for name, role in (("x", "value"), ("s", "state"), ("t", "state"), ("w", "weight")):
            pool = "slots" if role == "state" else "T" if role == "value" else 64
            self.inputs.append(RegionInput(self._slot(name, role, pool, None), role, name))

    def _slot(self, name: str, role: Role, rows: int | str, base: int | None, width: int = 64) -> int:
        slot = len(self.values)
        size = 4 * width * (rows if isinstance(rows, int) else BOUNDS[rows])
        self.values.append(Value(name, role, [rows, width], "float32", slot if base is None else base, size))
        return slot

    def call(self, op: str, *args: Arg, width: int = 64, scratch: tuple[int, ...] = (), launched: bool = True) -> int:
        """A step with one new result; `scratch`: the width of what each bucket, in order, needs meanwhile."""
        at = len(self.steps)
        made = self._slot(f"r{at}", "temporary", "T", None, width)
        buckets = []
        for index, bucket in enumerate(BUCKETS if launched else []):
            own = [self._slot(f"scratch{at}_{index}", "temporary", "T", None, w) for w in scratch[index : index + 1]]
            buckets.append(msgspec.structs.replace(bucket, scratch=own))
        self.steps.append(Step(op, list(args), {}, [made], [], f"m.py:{at}", buckets))
        return made

    def add(self, a: int, b: int, **how: int) -> int:
        """a + b."""
        return self.call("aten.add.Tensor", SlotArg(a), SlotArg(b), **how)  # type: ignore[arg-type]

    def write(self, state: int, a: int) -> None:
        """Writes a into a state in place."""
        args: list[Arg] = [SlotArg(state), SlotArg(a)]
        self.steps.append(Step("aten.copy_.default", args, {}, [None], [], f"m.py:{len(self.steps)}", BUCKETS))

    def view(self, a: int) -> int:
        """A view of a."""
        made = self._slot(f"v{len(self.steps)}", self.values[a].role, "T", self.values[a].owner)
        args: list[Arg] = [SlotArg(a), -1, 0, 64]
        self.steps.append(Step("aten.slice.Tensor", args, {}, [made], [], f"m.py:{len(self.steps)}", []))
        return made

    def plan(self, *outputs: int) -> RegionPlan:
        """Finished: streams, lifetimes, offsets."""
        named = {f"y{i}": slot for i, slot in enumerate(outputs)}
        return finish("region", self.inputs, named, self.values, [], self.steps)


def launched(region: RegionPlan, bounds: dict[str, int]) -> RegionPlan:
    """A region of the cpu's plan as if a kernel computed each of its steps."""
    owner = owners_of(region.slots)
    kept = {owner[slot] for slot in region.outputs.values()}
    values = [Value(s.name, _role(s, owner[at] in kept), s.shape, s.dtype, owner[at], slot_bytes(s, bounds))
              for at, s in enumerate(region.slots)]  # fmt: skip
    return finish(region.name, region.inputs, region.outputs, values, region.prepare, on_kernels(region.steps, owner))


def on_kernels(steps: Sequence[Step], owner: Sequence[int]) -> list[Step]:
    """Steps with a launch each; views stay as they are."""
    made = [msgspec.structs.replace(step, release=[]) for step in steps]
    return [
        msgspec.structs.replace(step, buckets=[msgspec.structs.replace(BUCKETS[0], tokens=1 << 20)])
        if is_work(step, owner)
        else step
        for step in made
    ]


def _role(info: SlotInfo, kept: bool) -> Role:
    return "temporary" if kept and info.role == "value" and info.first >= 0 else info.role
