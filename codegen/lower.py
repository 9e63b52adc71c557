"""Lowering: a region's graph becomes the steps of its plan.

Pseudo-code:
    for node in graph: placeholders become inputs; sizes become expressions; calls become steps; getitem names a result
        a call that reads weights only prepares the region: it runs once, when the artifact is loaded
        each call also runs on meta tensors of example sizes: whose storage a result has is observed, not assumed
    outputs that are not contiguous get a step that makes them so
    slots get lifetimes, releases and offsets (codegen.liveness)
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from atomc.artifact.buffers import of_bucket
from atomc.artifact.expr import ExpressionError, evaluate, names_in, parse
from atomc.artifact.plan import (
    CARRIED,
    PROBES,
    Arg,
    Bucket,
    DType,
    Launch,
    LibraryCall,
    RegionInput,
    RegionPlan,
    Role,
    Scalar,
    Size,
    Slot,
    Step,
)  # fmt: skip
from atomc.codegen.device import Variant
from atomc.codegen.hosts import Host, host_of
from atomc.codegen.launches import Call, Place, SizeOf, argument, differs, kernel_key, place, record
from atomc.codegen.liveness import Value, finish
from atomc.errors import AtomcError
from atomc.parallel.kinds import WAIT
from atomc.parallel.sizes import AGREED, COUNTED, HALVES, of_half
from atomc.targets import Target

# Sizes of the trial run: distinct primes, so that no two dims agree by accident.
EXAMPLE: Final = PROBES[0]
PLACEMENT: Final = ("device", "layout", "pin_memory")  # of a factory call: the runtime's business


class LoweringError(AtomcError):
    """A graph that has no plan; the message names the node and its source line."""


@dataclass
class Lowering:
    """Lowers one region.

    Attributes:
        inputs: placeholder -> role and name of what is bound to it. outputs: names of the results.
        symbols: graph symbol -> plan symbol. bounds: plan symbol -> largest value.
        where: the model's source line of a node.
        target: what it is lowered for; on a GPU, calls become launches. tokens: upper bounds of its buckets.
        variants: kernels that the launches name, by key; filled by `run`.
    """

    region: str
    gm: GraphModule
    inputs: Mapping[str, tuple[Role, str]]
    outputs: list[str]
    symbols: Mapping[str, str]
    bounds: Mapping[str, int]
    where: Callable[[Node], str]
    target: Target
    tokens: Sequence[int] = ()
    variants: dict[str, Variant] = field(default_factory=dict)
    ids: dict[Node, int] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    prepare: list[Step] = field(default_factory=list)
    _trial: list[Tensor] = field(default_factory=list)  # by slot
    _counted: dict[str, str] = field(default_factory=dict)  # graph symbol -> plan symbol
    _owners: dict[int, int] = field(default_factory=dict)  # storage -> slot

    def run(self) -> RegionPlan:
        """The region's plan."""
        bound: list[RegionInput] = []
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                read = node.users or self.inputs.get(node.name, ("", ""))[1].startswith(CARRIED)
                if read and isinstance(node.meta.get("val"), Tensor):
                    bound.append(self._input(node))
            elif node.op == "call_function":
                self._call(node)
            elif node.op != "output":
                raise self._error(node, f"{node.op} has no place in a plan")
        result = next(n for n in self.gm.graph.nodes if n.op == "output")
        leaves = pytree.tree_leaves(result.args)
        if any(not isinstance(leaf, Node) or leaf not in self.ids for leaf in leaves):
            raise self._error(result, "an output is not a tensor")
        outputs = {name: self._output(leaf) for name, leaf in zip(self.outputs, leaves, strict=True)}
        return finish(self.region, bound, outputs, self.values, self.prepare, self.steps)

    def _error(self, node: Node, what: str) -> LoweringError:
        return LoweringError(f"{self.region}: {node.name} ({self.where(node)}): {what}.")

    def _input(self, node: Node) -> RegionInput:
        role, name = self.inputs[node.name]
        value = node.meta["val"]
        shape = [evaluate(s, EXAMPLE) for s in self._shape(value, node)]
        slot = self._slot(node.name, role, value, torch.empty(shape, dtype=value.dtype, device="meta"), node)
        self.ids[node] = slot
        return RegionInput(slot, role, name)

    def _call(self, node: Node) -> None:
        if isinstance(node.meta.get("val"), (torch.SymInt, int)) or node.target is operator.getitem:
            return  # a size, or a result that the node before has named
        if isinstance(node.meta.get("val"), list) and all(isinstance(v, torch.SymInt) for v in node.meta["val"]):
            self._count(node)
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            raise self._error(node, f"{node.target} is not a torch operator")
        args = [self._argument(a, node) for a in node.args]
        kwargs = {k: self._argument(v, node) for k, v in node.kwargs.items() if k not in PLACEMENT}
        trial = self._try(node, args, kwargs)
        role: Role = "prepared" if self._is_prepared(node) else "temporary"
        results = self._results(node, trial, role)
        steps = self.prepare if role == "prepared" else self.steps
        op, launched = _qualified(node.target), role != "prepared" and not self._are_views(results)
        buckets = self._buckets(node, op, node.args, dict(node.kwargs), results) if launched else []
        steps.append(Step(op, args, kwargs, results, [], self.where(node), buckets))

    def _count(self, node: Node) -> None:
        """Numbers that only running tells become sizes of the plan."""
        assert isinstance(node.target, torch._ops.OpOverload)
        made = [f"{COUNTED}{len(self._counted) + i}" for i in range(len(node.meta["val"]))]
        self._counted |= {str(value): name for value, name in zip(node.meta["val"], made, strict=True)}
        args = [self._argument(a, node) for a in node.args]
        self.steps.append(Step(_qualified(node.target), args, {}, [], [], self.where(node), sizes=made))

    def _are_views(self, results: list[int | None]) -> bool:
        """Whether a call makes no data: each result has the storage of an older slot."""
        owned = [self.values[slot].owner != slot for slot in results if slot is not None]
        return bool(owned) and all(owned)

    def _buckets(
        self, node: Node, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[int | None]
    ) -> list[Bucket]:
        """The launches that compute a call, for each bucket; none where torch's own kernel does."""
        host = host_of(op, self.target)
        if host is None:
            return []
        for trial in (self._trial[slot] for slot in results if slot is not None):
            if not trial.is_contiguous():
                raise self._error(node, f"{op} gives strides {trial.stride()}; a kernel gives contiguous results")
        return [self._bucket(node, host, args, kwargs, tokens, results) for tokens in self.tokens]

    def _bucket(
        self, node: Node, host: Host, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int,
        results: list[int | None],
    ) -> Bucket:  # fmt: skip
        read: list[Node] = []
        map_arg((args, kwargs), read.append)
        tensors = [n for n in read if isinstance(n.meta["val"], FakeTensor)]
        values, kwargs = map_arg((list(args), kwargs), lambda n: n.meta["val"])
        most = of_bucket(self.bounds, tokens)
        rows = max(tokens, *(self._rows(n, most) for n in tensors))
        try:
            made = record(host, values, kwargs, self.target, rows, tensors[0].meta["val"].fake_mode)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise self._error(node, f"its kernel for {self.target.name} takes no such call: {error}") from error
        slots = {place(n.meta["val"]): self.ids[n] for n in tensors}
        slots |= {place(v): slot for v, slot in zip(made.results, results, strict=True) if slot is not None}
        scratch: list[int] = []
        for value in made.allocated:
            if place(value) not in slots:
                slots[place(value)] = self._scratch(f"{node.name}_scratch", value, node, most)
                scratch.append(slots[place(value)])
        size_of = partial(self._size, node=node)
        launches = self._launches(made.launches, slots, size_of)
        library = None
        if (offer := made.library) is not None:
            given = [argument(a, slots, size_of) for a in offer.arguments]
            library = LibraryCall(offer.name, given, self._launches(offer.launches, slots, size_of))
        bucket = Bucket(tokens, launches, scratch, library)
        # Not of size 1: a dim of it that is known would be one that is broadcast.
        for symbols in ({name: max(size, 2) for name, size in most.items()}, dict.fromkeys(most, 2)):
            if found := differs(bucket, rows, host, values, kwargs, self.target, size_of, symbols):
                raise self._error(node, f"its launches do not follow the sizes: {found}")
        return bucket

    def _rows(self, node: Node, most: Mapping[str, int]) -> int:
        """The most rows of all ranks' tokens that an argument has; 0 where it has those of the rank, or none."""
        shape = self._shape(node.meta["val"], node)
        found = names_in(shape[0]) if shape else set()
        agreed = {AGREED, *(of_half(AGREED, half) for half in HALVES)}
        gathered = bool(agreed & found) or any(name.startswith(COUNTED) for name in found)
        return evaluate(shape[0], most) if gathered else 0

    def _launches(self, calls: Sequence[Call], slots: Mapping[Place, int], size_of: SizeOf) -> list[Launch]:
        launches = []
        for variant, grid, arguments, origin in calls:
            name = kernel_key(variant, self.target)
            self.variants[name] = variant
            sizes: list[Any] = [s.expr if isinstance(s, Size) else s for s in map(size_of, grid)]
            launches.append(Launch(name, sizes, [argument(a, slots, size_of) for a in arguments], origin))
        return launches

    def _scratch(self, name: str, value: Tensor, node: Node, bounds: Mapping[str, int]) -> int:
        """A slot for memory that a step needs while it runs."""
        shape = self._shape(value, node)
        slot = len(self.values)
        size = math.prod(evaluate(s, bounds) for s in shape) * value.dtype.itemsize
        self.values.append(Value(name, "temporary", shape, str(value.dtype).removeprefix("torch."), slot, size))
        self._trial.append(torch.empty(0, device="meta"))
        return slot

    def _is_prepared(self, node: Node) -> bool:
        """Whether a call reads weights only, so that it runs once; what a region returns is made anew each time."""
        read = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        constant = bool(read) and len(read) == len(node.all_input_nodes) and not node.is_impure()
        return (
            constant
            and not _is_returned(node)
            and all(self.values[self.ids[n]].role in ("weight", "prepared") for n in read)
        )

    def _try(self, node: Node, args: list[Arg], kwargs: dict[str, Arg]) -> Any:
        """The call on meta tensors of the example sizes."""
        target = node.target
        assert isinstance(target, torch._ops.OpOverload)
        if _qualified(target) == WAIT and isinstance(args[0], Slot):
            return self._trial[args[0].id]  # what a collective brings is where its result was to be
        given = {k: self._concrete(v) for k, v in kwargs.items()}
        if any(a.name == "device" and a.kwarg_only for a in target._schema.arguments):
            given["device"] = "meta"
        try:
            return target(*(self._concrete(a) for a in args), **given)
        except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
            raise self._error(node, f"{target} does not run on {EXAMPLE}: {error}") from error

    def _concrete(self, arg: Arg) -> Any:
        match arg:
            case Slot(id=slot):
                return self._trial[slot]
            case Size(expr=text):
                return evaluate(text, EXAMPLE)
            case DType(name=name):
                return getattr(torch, name)
            case list():
                return [self._concrete(a) for a in arg]
        return arg

    def _results(self, node: Node, trial: Any, role: Role) -> list[int | None]:
        """A slot for each result, also for one that nobody reads: it takes memory while the step runs."""
        value = node.meta.get("val")
        if isinstance(trial, Tensor):
            self.ids[node] = self._slot(node.name, role, value, trial, node)
            return [self.ids[node]]
        if trial is None:
            return []
        readers: dict[int, list[Node]] = {}
        if not isinstance(value, (tuple, list)):
            raise self._error(node, f"the graph says {value!r}, but several results come")
        for user in node.users:
            if user.target is not operator.getitem or not isinstance(user.args[1], int):
                raise self._error(user, "a tuple of results is read other than by getitem")
            readers.setdefault(user.args[1], []).append(user)
        results: list[int | None] = []
        for index, (part, tensor) in enumerate(zip(value, trial, strict=True)):
            named = readers.get(index, [])
            name = named[0].name if named else f"{node.name}_{index}"
            slot = self._slot(name, role, part, tensor, node)
            self.ids.update(dict.fromkeys(named, slot))
            results.append(slot)
        return results

    def _slot(self, name: str, role: Role, value: Any, trial: Tensor, node: Node) -> int:
        """A new slot; `value` has the symbolic shape, `trial` is an instance of it."""
        shape = self._shape(value, node)
        expected = [evaluate(s, EXAMPLE) for s in shape]
        if expected != list(trial.shape) or value.dtype != trial.dtype:
            found = f"{list(trial.shape)} {trial.dtype}"
            raise self._error(node, f"the graph says {shape} {value.dtype}, but on {EXAMPLE} it is {found}")
        slot = len(self.values)
        owner = self._owners.setdefault(trial.untyped_storage()._cdata, slot)
        size = math.prod(evaluate(s, self.bounds) for s in shape) * trial.dtype.itemsize
        self.values.append(Value(name, role, shape, str(trial.dtype).removeprefix("torch."), owner, size))
        self._trial.append(trial)
        return slot

    def _output(self, node: Node) -> int:
        """The slot of an output: contiguous, and no view of a weight, a state or a batch field."""
        slot = self.ids[node]
        trial, owner = self._trial[slot], self.values[self.values[slot].owner]
        if owner.role not in ("value", "temporary"):
            raise self._error(node, f"an output is a view of {owner.role} {owner.name}")
        if trial.is_contiguous():
            return slot
        whole = self._slot(f"{node.name}_contiguous", "temporary", node.meta["val"], trial.contiguous(), node)
        op = "aten.contiguous.default"
        buckets = self._buckets(node, op, (node,), {}, [whole])
        self.steps.append(Step(op, [Slot(slot)], {}, [whole], [], self.where(node), buckets))
        return whole

    def _argument(self, value: Any, node: Node) -> Arg:
        if isinstance(value, Node) and isinstance(value.meta.get("val"), list):
            return [self._size(size, node) for size in value.meta["val"]]
        if isinstance(value, (list, tuple)):
            return [self._scalar(v, node) for v in value]
        return self._scalar(value, node)

    def _scalar(self, value: Any, node: Node) -> Scalar:
        if isinstance(value, Node):
            known = value.meta.get("val")
            return Slot(self.ids[value]) if isinstance(known, Tensor) else self._size(known, node)
        if isinstance(value, torch.SymInt):
            return self._size(value, node)
        if isinstance(value, torch.dtype):
            return DType(str(value).removeprefix("torch."))
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(node, f"the non-finite constant {value} has no place in a plan")
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise self._error(node, f"an argument {value!r} of no plan type")

    def _size(self, size: Any, node: Node) -> Size | int:
        if not isinstance(size, (int, torch.SymInt)):
            raise self._error(node, f"an argument {size!r} is no size")
        return Size(self._expression(size, node)) if isinstance(size, torch.SymInt) else size

    def _shape(self, value: Tensor, node: Node) -> list[int | str]:
        sizes: tuple[Any, ...] = value.shape  # torch calls them int; the symbolic ones are SymInt
        return [self._expression(s, node) if isinstance(s, torch.SymInt) else s for s in sizes]

    def _expression(self, size: torch.SymInt, node: Node) -> str:
        """A size in the plan's symbols."""

        def symbol(match: re.Match[str]) -> str:
            known = {**self.symbols, **self._counted}
            if match.group() not in known:
                raise self._error(node, f"the size {match.group()} in {size} belongs to no input")
            return known[match.group()]

        text = re.sub(r"\b[su]\d+\b", symbol, str(size))
        try:
            parse(text, set(self.bounds))
        except ExpressionError as error:
            raise self._error(node, str(error)) from error
        return text


def _is_returned(node: Node) -> bool:
    """Whether a region returns a value, or what is made of it alone, which may be an item or a view of it."""
    return any(user.op == "output" or (len(user.all_input_nodes) == 1 and _is_returned(user)) for user in node.users)


def _qualified(target: torch._ops.OpOverload) -> str:
    namespace, name = target._schema.name.split("::")
    return f"{namespace}.{name}.{target._overloadname}"
