"""The plan: what a step of the model does, as data. Regions of steps over numbered slots, and the calls that use them.

Sizes are integer expressions of the artifact's symbols (`4*T`, `T//4 + B`), see `atomc.artifact.expr`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal, TypeAlias

import msgspec

from atomc.parallel.sizes import AGREED, COUNTED, HALVES, INDEX, STEP, of_half

# T tokens, B requests, N4 / NH completed CSA / HCA windows, L wanted logits; sizes of the pools of state.
SYMBOLS: Final = (*STEP, "window_pages", "blocks", "slots")


class Probe(dict[str, int]):
    """Example sizes; `halves`: those of two micro-batches. Of a counted one by its number."""

    halves: Mapping[str, int]

    def __missing__(self, name: str) -> int:
        if name in self.halves:
            return self.halves[name]
        if not (name.startswith(COUNTED) and name[1:].isdigit()):
            raise KeyError(name)
        return 2 * int(name[1:]) + self["slots"]


def _probe(sizes: Sequence[int], halves: Sequence[int]) -> Probe:
    found = Probe(zip((*SYMBOLS, AGREED, *INDEX.values()), sizes, strict=True))
    found.halves = dict(zip((of_half(name, half) for half in HALVES for name in (*STEP, AGREED)), halves, strict=True))
    return found


# Two sets of sizes that no layout's block divides by accident, those of a step, its pools and messages distinct primes:
# shapes that agree on both agree.
PROBES: Final = (
    _probe((11, 3, 5, 7, 2, 13, 17, 19, 23, 1, 1), (29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73)),
    _probe((101, 29, 31, 37, 41, 43, 47, 53, 103, 2, 3), (107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167)),
)
DTYPE_BYTES: Final = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1,
    "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
ALIGNMENT: Final = 256  # bytes, of offsets in an arena: the widest access and the allocation granularity of any target


class Slot(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="slot"):
    """An argument that is the value of a slot."""

    id: int


class Size(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="size"):
    """An argument that is a size: an expression of symbols."""

    expr: str


class DType(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="dtype"):
    """An argument that is a torch dtype, by name."""

    name: str


Scalar: TypeAlias = Slot | Size | DType | bool | int | float | str | None
Arg: TypeAlias = Scalar | list[Scalar]
Role: TypeAlias = Literal["weight", "prepared", "state", "batch", "value", "temporary"]


class SlotInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named value of a region.

    Attributes:
        shape: sizes, expressions where symbolic. dtype: torch dtype name.
        base: the slot whose storage this one views; None if it has its own.
        first, last: steps that define and last use its storage (views included); -1 before the first step, and the
            number of steps for what outlives the region.
        offset: bytes from the start of the region's arena at the largest sizes; None outside the arena.
    """

    name: str
    role: Role
    shape: list[int | str]
    dtype: str
    base: int | None
    first: int
    last: int
    offset: int | None


STATIC: Final = "static model"


class Launch(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One launch of a kernel.

    Attributes:
        kernel: its key in the artifact. grid: programs in each dimension.
        args: its run-time arguments in the order of its signature; slots of tensors, sizes, numbers, None (null).
        origin: who chose its configuration: the static model, or `tuned on` a GPU.
    """

    kernel: str
    grid: list[int | str]
    args: list[Scalar]
    origin: str = STATIC


class LibraryCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A library's kernel that does a step's work, where the torch that runs the artifact has it (`atomc.ops.library`).

    Attributes:
        name: of the call. args: its arguments. launches: kernels that go before it.
    """

    name: str
    args: list[Scalar]
    launches: list[Launch]


class Bucket(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a step of at most `tokens` tokens is launched.

    Attributes:
        launches: what computes it. library: what does so in their place, where it can.
        scratch: slots that live during the step only.
    """

    tokens: int
    launches: list[Launch]
    scratch: list[int]
    library: LibraryCall | None = None

    @property
    def every_launch(self) -> list[Launch]:
        """All launches, those before the library's call too."""
        return self.launches + (self.library.launches if self.library else [])

    @property
    def every_argument(self) -> list[Scalar]:
        """What all launches and the library's call are given."""
        return [a for launch in self.every_launch for a in launch.args] + (self.library.args if self.library else [])


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One operation.

    Attributes:
        op: `namespace.name.overload` below torch.ops.
        outputs: the slot of each result, None for a result nobody uses.
        release: slots whose storage no later step uses.
        source: `file:line` of the model, for messages and tables.
        buckets: on a GPU, the launches that compute it, for the fewest tokens first; empty: torch's own kernel.
        stream: where it is launched in a small decode step, 0 being the main one; see `atomc.artifact.order`.
        waits: steps of other streams that are over when it begins there, in order.
        sizes: counted symbols that its numbers give a value, from there on.
    """

    op: str
    args: list[Arg]
    kwargs: dict[str, Arg]
    outputs: list[int | None]
    release: list[int]
    source: str
    buckets: list[Bucket] = []
    stream: int = 0
    waits: list[int] = []
    sizes: list[str] = []


class RegionInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is bound to a slot before the region runs: a weight, a state tensor, a batch field, a value, by name."""

    slot: int
    role: Role
    name: str


class RegionPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The steps of one region.

    Attributes:
        prepare: steps that read weights only; they run once, when the artifact is loaded, and what they make (slots of
            role `prepared`) stays: packed weights expanded for a target that cannot multiply them as they are.
        arena_bytes: what the temporaries need at the largest sizes.
        halves: it does a step in two micro-batches (`passes.chunk`). Fields of the batch, values and results are there
            once for each, `ids.0` and `ids.1`, and so are sizes, `T_0` and `T_1`. Results and inputs `carried.0` and
            on are what the next region needs of a collective that it waits for: what the collective gives, what it was
            given, and what else the steps read that follow it (`passes.borders`).
    """

    name: str
    inputs: list[RegionInput]
    outputs: dict[str, int]
    slots: list[SlotInfo]
    prepare: list[Step]
    steps: list[Step]
    arena_bytes: int
    halves: bool = False


def of_batch(name: str, half: int) -> str:
    """A field of the batch, or a value, of a micro-batch."""
    return f"{name}.{half}"


def carried(number: int) -> str:
    """The name of something that a region in two micro-batches hands to the next."""
    return f"{CARRIED}{number}"


CARRIED: Final = "carried."


class CallPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One use of a region: weights and state under `prefix`; `binds` renames the region's value inputs."""

    region: str
    prefix: str
    binds: dict[str, str]


class StateTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A state tensor `prefix + name` of shape [size of `pool`, *shape]."""

    name: str
    pool: Literal["window_pages", "blocks", "slots"]
    shape: list[int]
    dtype: str


class ProgramPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole step: calls in order, symbols with their largest values, state by prefix, and the memory it takes.

    Attributes:
        values_bytes: what the values that pass between calls need at the largest sizes.
        arena_bytes: the largest arena of any region.
    """

    calls: list[CallPlan]
    symbols: dict[str, int]
    states: dict[str, list[StateTensor]]
    values_bytes: int
    arena_bytes: int


def slots_in(arg: Arg) -> Iterator[int]:
    """Slots of an argument, in order."""
    for part in arg if isinstance(arg, list) else [arg]:
        if isinstance(part, Slot):
            yield part.id


def slots_of(step: Step) -> list[int]:
    """Slots that a step takes as arguments, to read or to write: in order, with repetitions."""
    return [slot for arg in (*step.args, *step.kwargs.values()) for slot in slots_in(arg)]
