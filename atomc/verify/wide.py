"""Running an operator's reference in float64: the same code, with every float32 and bfloat16 it asks for made wider.

Contract:
    While a `Wide` is active, `.float()`, `.to(dtype)` and `dtype=` of a narrow float give float64, and what is still
    narrow is widened where it meets a float64. Integers, codes and bytes stay as they are. Quantising and dequantising
    are recorded and computed by `atomc.verify.grid`; packing cache rows runs as it is, on the row rounded to float32.

Terms:
    rounding    a place where the reference quantises: what it was before, float64, and what it became
    choice      a `topk` of the reference: the scores it chose by
    halving     a call of torch in which the reference, on its own arguments, rounds what it computes to a 16-bit float;
                or in which a GPU's kernel does, that computes the same
    jitter      one more run with every number off by at most `unit`, rounded to the nominal run's values and choosing
                what it chose: how far its results move says how the result depends on rounding errors of that size

Why the redirection: references call `quantize` and `RowLayout.pack` as plain functions, which torch's modes do not see.
They are replaced while a `Wide` is active, in this process; a verification runs in one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import atomc.ops.quantize as quantize_ops
from atomc.formats import Layout, Records, RowLayout
from atomc.formats import dequantize as from_layout
from atomc.formats import quantize as to_layout
from atomc.verify import grid, narrow
from atomc.verify.errors import VerifyError

NARROW: Final = (torch.float32, torch.bfloat16, torch.float16)
_CASTS: Final = (Tensor.float, Tensor.bfloat16, Tensor.half)
_TOPK: Final = (torch.topk, Tensor.topk)
_PRODUCTS: Final = (F.linear, torch.bmm)
_BITS: Final = (Tensor.view,)  # a dtype here is a reading of bits, not a conversion


@dataclass(frozen=True)
class Rounding:
    """A `quantize` of the reference: float64 x, and what stands for its codes (values, float64) and scales."""

    text: str
    x: Tensor
    values: Tensor
    scales: Tensor


@dataclass(frozen=True)
class PackedRows:
    """Cache rows that the reference packed: float64 x [N, channels]; flat places [N] where it stored them."""

    text: str
    x: Tensor
    places: list[Tensor] = field(default_factory=list)


@dataclass
class Trace:
    """What a run recorded, in order, beside its results."""

    roundings: list[Rounding] = field(default_factory=list)
    packed: list[PackedRows] = field(default_factory=list)
    choices: list[Tensor] = field(default_factory=list)
    results: tuple[Any, ...] = ()
    mutated: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Script:
    """What a run is to do other than compute.

    Attributes:
        unit: of the jitter of every input; 0 for none. seed: of its signs.
        halvings: by its number, how far off each call's result is to be: u of the dtype it is rounded to, or 0.
        nearest: what halvings say is to be rounded to nearest instead.
        frozen: roundings by their number: take these values. chosen: choices by their number: take these indices.
        sums: products are to be off by what FP8 sums lose (`atomc.verify.narrow`): +1 upwards, -1 the second half of
            their columns downwards (of gate and up one each way), 0 not at all.
    """

    unit: float = 0.0
    seed: int = 0
    frozen: Sequence[Tensor] = ()
    chosen: Sequence[Tensor] = ()
    halvings: Sequence[float] = ()
    nearest: bool = False
    sums: int = 0


class Wide(TorchFunctionMode):
    """See the module's contract."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script, self.trace, self.asleep = script, Trace(), False
        self._signs: torch.Generator | None = None  # on the device of what is jittered
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.asleep:
            return func(*args, **kwargs)
        return self._halved(self._call(func, args, kwargs))

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _CASTS:
            return args[0].double()
        if func in _TOPK:
            return self._choose(func, args, kwargs)
        if func not in _BITS:
            args, kwargs = tuple(widen_dtype(a) for a in args), {k: widen_dtype(v) for k, v in kwargs.items()}
            tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
            if any(t.dtype == torch.float64 for t in tensors):
                args = tuple(widen(a) for a in args)
                kwargs = {k: widen(v) for k, v in kwargs.items()}
        found = func(*args, **kwargs)
        return self._summed(func, args, found) if self.script.sums and func in _PRODUCTS else found

    def _summed(self, func: Callable[..., Any], args: tuple[Any, ...], found: Tensor) -> Tensor:
        """A product, off by what its sums may lose."""
        x, w = args
        lost = narrow.loss(x, w if func is F.linear else w.mT)
        if self.script.sums < 0:
            lost[..., lost.shape[-1] // 2 :].neg_()
        return found + lost

    def jitter(self, x: Tensor, unit: float | None = None) -> Tensor:
        """x off by a unit (none: the script's), up or down; as it is where that is 0."""
        unit = self.script.unit if unit is None else unit
        if not unit:
            return x
        if self._signs is None:
            self._signs = generator_on(x.device).manual_seed(self.script.seed)
        signs = torch.randint(0, 2, x.shape, generator=self._signs, dtype=torch.int8, device=x.device)
        return x * (1 + unit * (2.0 * signs - 1))

    def _halved(self, found: Any) -> Any:
        """The result of a call, off by what its rounding to 16 bits may be."""
        at, self.calls = self.calls, self.calls + 1
        unit = self.script.halvings[at] if at < len(self.script.halvings) else 0.0
        if unit and self.script.nearest:
            with self._asleep():
                return found.to(torch.bfloat16 if unit == HALF[torch.bfloat16] else torch.float16).double()
        return self.jitter(found, unit) if unit else found

    def _choose(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = func(*args, **kwargs)
        number = len(self.trace.choices)
        self.trace.choices.append(args[0])
        if number < len(self.script.chosen):
            indices = self.script.chosen[number]
            return torch.return_types.topk((args[0].gather(-1, indices), indices))
        return found

    # -- what the redirected functions do ------------------------------------------------------------------------------

    def quantize(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The values that stand for the codes, and the scales."""
        with self._asleep():
            number, x = len(self.trace.roundings), x.double()
            values, scales = grid.rounded(x, str(layout))
            if number < len(self.script.frozen):
                values = self.script.frozen[number]
            self.trace.roundings.append(Rounding(str(layout), x, values, scales))
            return values, scales

    def dequantize(self, codes: Tensor, scales: Tensor, layout: Layout, dtype: torch.dtype = torch.float32) -> Tensor:
        """float64 values of stored codes, or of what stands for codes."""
        with self._asleep():
            values = codes if codes.dtype == torch.float64 else grid.unpacked(codes, scales, str(layout))[0]
            jittered: Tensor = self._halved(self.jitter(values))
            return jittered

    def pack(self, rows: RowLayout, x: Tensor) -> Records:
        """Stored bytes, of x in float32."""
        with self._asleep():
            self.trace.packed.append(PackedRows(str(rows), x.double()))
            return PACK(rows, x.float())

    def unpack(self, rows: RowLayout, records: Records) -> Tensor:
        """float64 rows of stored bytes."""
        with self._asleep():
            return self.jitter(grid.unpacked_records(records.body, records.scales, str(rows)))

    def store(self, rows: RowLayout, pages: Tensor, places: Tensor, records: Records) -> None:
        """Write records, and note where."""
        with self._asleep():
            if not self.trace.packed:
                self.trace.packed.append(PackedRows(str(rows), torch.empty(0)))
            self.trace.packed[-1].places.append(places)
            STORE(rows, pages, places, records)

    @contextmanager
    def _asleep(self) -> Iterator[None]:
        before, self.asleep = self.asleep, True
        try:
            yield
        finally:
            self.asleep = before


@dataclass(frozen=True)
class Halvings:
    """Where a reference rounds to 16 bits.

    Attributes:
        units: of each call, in order, u of the dtype that it rounds to; 0 where it does not.
        quantized: dtype of what it quantises, or packs as cache rows.
    """

    units: tuple[float, ...] = ()
    quantized: torch.dtype = torch.float32


class Narrow(Wide):
    """Runs a reference as it is, and notes its halvings: the same calls as a `Wide` sees, in the same order."""

    def __init__(self, rounded: Mapping[str, float]) -> None:
        super().__init__(Script())
        self.rounded = rounded
        self.units: list[float] = []
        self.quantized: set[torch.dtype] = set()

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = func(*args, **kwargs)
        self.units.append(self.rounded.get(func.__name__) or _halving(func, args, found))
        return found

    def quantize(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """As it is."""
        with self._asleep():
            self.quantized.add(x.dtype)
            return to_layout(x, layout)

    def dequantize(self, codes: Tensor, scales: Tensor, layout: Layout, dtype: torch.dtype = torch.float32) -> Tensor:
        """As it is; a code times a power of two is exact in 16 bits, times another scale it is not."""
        with self._asleep():
            inexact = grid.grid_of(str(layout)).scale == "float32"
            self.units.append(HALF.get(dtype, 0.0) if inexact else 0.0)
            return from_layout(codes, scales, layout, dtype)

    def pack(self, rows: RowLayout, x: Tensor) -> Records:
        """As it is."""
        with self._asleep():
            self.quantized.add(x.dtype)
            return PACK(rows, x)

    def unpack(self, rows: RowLayout, records: Records) -> Tensor:
        """As it is."""
        with self._asleep():
            return UNPACK(rows, records)

    def store(self, rows: RowLayout, pages: Tensor, places: Tensor, records: Records) -> None:
        """As it is."""
        with self._asleep():
            STORE(rows, pages, places, records)


HALF: Final = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# What hands on numbers as they are, or one of them.
_MOVES: Final = frozenset(
    (
        "__get__", "__getitem__", "__setitem__", "amax", "amin", "cat", "chunk", "clamp", "clone", "contiguous",
        "detach", "embedding", "empty", "empty_like", "expand", "eye", "flatten", "flip", "full", "full_like", "gather",
        "index", "index_copy_", "index_select", "masked_fill", "max", "min", "narrow", "neg", "new_empty", "new_full",
        "new_zeros", "ones", "ones_like", "pad", "permute", "relu", "repeat_interleave", "reshape", "roll", "select",
        "split", "squeeze", "stack", "topk", "transpose", "unbind", "unflatten", "unsqueeze", "view", "where", "zeros",
        "zeros_like",
    )
)  # fmt: skip


def _halving(func: Callable[..., Any], args: tuple[Any, ...], found: Any) -> float:
    """u of the 16-bit dtype that a call rounds its result to; 0 if it does not, or computes nothing."""
    name = func.__name__.partition(".")[0]  # an operator's has its overload behind it
    if not isinstance(found, Tensor) or found.dtype not in HALF or name in _MOVES:
        return 0.0
    cast = name in ("to", "bfloat16", "half", "type_as")
    return 0.0 if cast and args[0].dtype == found.dtype else HALF[found.dtype]


PACK: Final = RowLayout.pack
UNPACK: Final = RowLayout.unpack
STORE: Final = RowLayout.store


@contextmanager
def _redirected(mode: Wide) -> Iterator[None]:
    places: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (quantize_ops, "to_layout", mode.quantize),
        (quantize_ops, "from_layout", mode.dequantize),
        (RowLayout, "pack", lambda rows, x: mode.pack(rows, x)),
        (RowLayout, "unpack", lambda rows, records: mode.unpack(rows, records)),
        (RowLayout, "store", lambda rows, pages, at, records: mode.store(rows, pages, at, records)),
    )
    before = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, function in places:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name, _), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def run_wide(function: Callable[..., Any], arguments: dict[str, Any], mutated: Sequence[str], script: Script) -> Trace:
    """Run a reference on float64 copies of its arguments, by name; those in `mutated` are copied and given back.

    A jittered run leaves what is mutated as it is: a cache's old rows are no input of the arithmetic.
    """
    mode = Wide(script)
    wide = {name: widen(value) for name, value in arguments.items()}
    for name in mutated:
        wide[name] = arguments[name].double() if arguments[name].dtype in NARROW else arguments[name].clone()
    for name, value in wide.items():
        if name not in mutated:
            wide[name] = _jittered(mode, value)
    with _redirected(mode), mode:
        mode.trace.results = results_of(function(**wide))
    if script.halvings and mode.calls != len(script.halvings):
        raise VerifyError(f"{function.__name__} makes {mode.calls} calls in float64, {len(script.halvings)} else")
    mode.trace.mutated = {name: wide[name] for name in mutated}
    return mode.trace


def halvings_of(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    mutated: Sequence[str],
    rounded: Mapping[str, float] | None = None,
) -> Halvings:
    """Where a reference rounds to 16 bits on its way, as it runs on these arguments.

    Args:
        rounded: functions of torch, by name, whose results a kernel rounds although the reference does not: u.
    """
    mode, given = Narrow(rounded or {}), arguments | {name: arguments[name].clone() for name in mutated}
    with _redirected(mode), mode:
        function(**given)
    widest = max(mode.quantized, key=lambda d: d.itemsize, default=torch.float32)
    return Halvings(tuple(mode.units), widest)


def results_of(returned: Any) -> tuple[Any, ...]:
    """What an operator returned, as its schema counts it: nothing, one result, or several."""
    if returned is None:
        return ()
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def generator_on(device: torch.device) -> torch.Generator:
    """A generator of random numbers that a device can use."""
    return torch.Generator(device)


# Of larger ones (weights) the rounding acts as that of what they are multiplied with does, and takes long to draw.
_MOST_JITTERED: Final = 1 << 18


def _jittered(mode: Wide, value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float64 and value.numel() <= _MOST_JITTERED:
        return mode.jitter(value)
    return [_jittered(mode, v) for v in value] if isinstance(value, list) else value


def widen(value: Any) -> Any:
    """float64 for a narrow float tensor, also in lists; anything else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype in NARROW else value
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        return type(value)(widen(v) for v in value)
    return value


def widen_dtype(value: Any) -> Any:
    """float64 for a narrow float dtype; anything else as it is."""
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value
