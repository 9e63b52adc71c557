"""Patterns: a plain torch function, traced to the same canonical ATen IR as the graphs it is searched in.

Terms:
    spelling    one way of writing the mathematics of a fused operator; the operator's reference is the first.
    parameter   an argument of the spelling: a tensor, or a number that the match reads off the graph.
    sentinel    the value a number has while the pattern is traced, chosen so that it occurs nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from atomc.passes.canonicalize import Canonicalize
from atomc.passes.graph import mutated_args, quiet
from atomc.passes.runner import Context


@dataclass(frozen=True)
class Of:
    """An example tensor of a parameter: its shape, and a dtype; None stands for the model's compute dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


Example = Of | float | int | str | bool | None
Fixed = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Spelling:
    """One way of writing an operator.

    Attributes:
        fn: plain torch (or atom operators); its parameter names are the operator's, unless `adapt` translates.
        examples: per parameter, an example tensor or a sentinel (a number, or a text such as a layout); None passes
            None, an empty text itself.
        fixed: parameters whose value shapes the pattern (flags); they are part of it, not read off.
        fixed_from: finds candidates for further such parameters in a graph (loop counts).
        adapt: turns what the match bound into the operator's arguments, emitting nodes where needed.
        shared: operators whose results may be used elsewhere too: cheap ones that the fused operator may repeat.
        source: who writes it so, for the report.
    """

    fn: Callable[..., Any]
    examples: Mapping[str, Example]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    fixed_from: Callable[[Graph], list[dict[str, Any]]] | None = None
    adapt: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None
    shared: frozenset[Any] = frozenset()
    source: str = "reference"

    def choices(self, graph: Graph) -> list[Fixed]:
        """Every set of fixed parameters worth a search in this graph."""
        found = [{}] if self.fixed_from is None else self.fixed_from(graph)
        return [tuple(sorted({**self.fixed, **more}.items())) for more in found]

    @property
    def constants(self) -> dict[str, Any]:
        """Parameters that are no input and no sentinel."""
        return {k: v for k, v in self.examples.items() if v is None or isinstance(v, bool) or v == ""}

    @property
    def sentinels(self) -> dict[str, float | int | str]:
        """Parameters that a match reads off the graph."""
        return {
            k: v
            for k, v in self.examples.items()
            if isinstance(v, (int, float, str)) and not isinstance(v, bool) and v != ""
        }


@dataclass(frozen=True)
class Pattern:
    """A traced spelling.

    Attributes:
        inputs: placeholder -> parameter name.
        numbers: (parameter, sentinel) pairs to read off the graph; texts too.
        anchors: output nodes and mutating nodes; the first is the one to search for.
        outputs: the output nodes in the order of the operator's results.
    """

    gm: GraphModule
    inputs: dict[Node, str]
    numbers: tuple[tuple[str, float | int | str], ...]
    anchors: tuple[Node, ...]
    outputs: tuple[Node, ...]

    @property
    def size(self) -> int:
        """Number of operations."""
        return sum(n.op == "call_function" for n in self.gm.graph.nodes)


def trace(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[GraphModule, dict[Node, str]]:
    """Canonical graph of fn on fake tensors; other arguments are constants. Also: placeholder -> parameter."""
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
    constants = {k: v for k, v in arguments.items() if k not in tensors}

    def call(*values: Tensor) -> Any:
        return fn(**dict(zip(tensors, values, strict=True)), **constants)

    # An example for two parameters would be one input of the pattern: give each its own.
    values = list({id(v): v for v in tensors.values()}.values())
    if len(values) < len(tensors):
        values = [v.detach() for v in tensors.values()]
    with quiet(values), torch.no_grad():
        gm = make_fx(call, tracing_mode="real", pre_dispatch=True, record_module_stack=False)(*values)
    names = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), tensors, strict=True))
    for node in names:
        node.meta["val"] = tensors[names[node]]
    Canonicalize().run(gm, Context("pattern"))
    return gm, names


def build(fn: Callable[..., Any], arguments: Mapping[str, Any], numbers: Mapping[str, float | int | str]) -> Pattern:
    """Trace fn and find its anchors, the largest subgraph first."""
    gm, inputs = trace(fn, arguments)
    result = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    outputs = tuple(n for n in (result if isinstance(result, (list, tuple)) else (result,)) if isinstance(n, Node))
    effects = tuple(n for n in gm.graph.nodes if n.op == "call_function" and mutated_args(n) and n not in outputs)
    anchors = sorted((*outputs, *effects), key=lambda n: -_ancestors(n))
    return Pattern(gm, inputs, tuple(numbers.items()), tuple(anchors), outputs)


def _ancestors(node: Node) -> int:
    seen, queue = {node}, [node]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return len(seen)


class _Key:
    """A spelling as a cache key: by identity, spellings being module constants."""

    def __init__(self, spelling: Spelling) -> None:
        self.spelling = spelling

    def __hash__(self) -> int:
        return id(self.spelling)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.spelling is self.spelling


def general(spelling: Spelling, fixed: Fixed, dtype: torch.dtype) -> Pattern:
    """The spelling traced on its examples, for the structural search."""
    return _general(_Key(spelling), fixed, dtype)


@lru_cache(maxsize=512)
def _general(key: _Key, fixed: Fixed, dtype: torch.dtype) -> Pattern:
    spelling = key.spelling
    with FakeTensorMode():
        arguments = {
            k: torch.empty(v.shape, dtype=v.dtype or dtype) if isinstance(v, Of) else v
            for k, v in spelling.examples.items()
        }
    return build(spelling.fn, {**arguments, **dict(fixed)}, spelling.sentinels)


def exact(
    spelling: Spelling, fixed: Fixed, tensors: Mapping[str, Tensor], numbers: Mapping[str, float | int | str]
) -> Pattern:
    """The spelling traced on given fake tensors and numbers; kept for the next place with equal ones.

    Symbolic sizes are equal if they are written alike: a symbol stands for a size and nothing is read of its value.
    """
    shapes = tuple((k, v.dtype, v.device, tuple(map(str, v.shape))) for k, v in tensors.items())
    key = (_Key(spelling), fixed, shapes, tuple(numbers.items()))
    if key not in _EXACT:
        if len(_EXACT) >= EXACT_KEPT:
            _EXACT.pop(next(iter(_EXACT)))
        _EXACT[key] = build(spelling.fn, {**tensors, **numbers, **spelling.constants, **dict(fixed)}, {})
    return _EXACT[key]


EXACT_KEPT = 256
_EXACT: dict[Any, Pattern] = {}


def parameters(fn: Callable[..., Any]) -> list[str]:
    """Parameter names of a reference, in order."""
    return list(inspect.signature(fn).parameters)
