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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from atomc.passes.canonicalize import Canonicalize
from atomc.passes.graph import mutated_args
from atomc.passes.runner import Context


@dataclass(frozen=True)
class Of:
    """An example tensor of a parameter: its shape, and a dtype; None stands for the model's compute dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


Example = Of | float | int | bool | None


@dataclass(frozen=True)
class Spelling:
    """One way of writing an operator.

    Attributes:
        fn: plain torch (or atom operators); its parameter names are the operator's, unless `adapt` translates.
        examples: per parameter, an example tensor or a sentinel; None passes None.
        fixed: parameters whose value shapes the pattern (loop counts, flags); they are part of it, not read off.
        adapt: turns what the match bound into the operator's arguments, emitting nodes where needed.
        source: who writes it so, for the report.
    """

    fn: Callable[..., Any]
    examples: Mapping[str, Example]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    adapt: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None
    source: str = "reference"


@dataclass(frozen=True)
class Pattern:
    """A traced spelling.

    Attributes:
        inputs: placeholder -> parameter name.
        numbers: (parameter, sentinel) pairs to read off the graph.
        anchors: output nodes and mutating nodes; the first is the one to search for.
        outputs: the output nodes in the order of the operator's results.
    """

    gm: GraphModule
    inputs: dict[Node, str]
    numbers: tuple[tuple[str, float | int], ...]
    anchors: tuple[Node, ...]
    outputs: tuple[Node, ...]

    @property
    def size(self) -> int:
        """Number of operations."""
        return sum(n.op == "call_function" for n in self.gm.graph.nodes)


def trace(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[GraphModule, dict[Node, str]]:
    """Canonical graph of fn on fake tensors; other arguments are constants. Also: placeholder -> parameter."""
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    constants = {k: v for k, v in arguments.items() if k not in tensors}

    def call(*values: torch.Tensor) -> Any:
        return fn(**dict(zip(tensors, values, strict=True)), **constants)

    with torch.no_grad():
        gm = make_fx(call, tracing_mode="real", pre_dispatch=True, record_module_stack=False)(*tensors.values())
    names = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), tensors, strict=True))
    for node in names:
        node.meta["val"] = tensors[names[node]]
    Canonicalize().run(gm, Context("pattern"))
    return gm, names


def build(fn: Callable[..., Any], arguments: Mapping[str, Any], numbers: Mapping[str, float | int]) -> Pattern:
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


def general(spelling: Spelling, dtype: torch.dtype) -> Pattern:
    """The spelling traced on its examples, for the structural search."""
    return _general(_Key(spelling), dtype)


class _Key:
    """A spelling as a cache key: by identity, spellings being module constants."""

    def __init__(self, spelling: Spelling) -> None:
        self.spelling = spelling

    def __hash__(self) -> int:
        return id(self.spelling)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.spelling is self.spelling


@lru_cache(maxsize=512)
def _general(key: _Key, dtype: torch.dtype) -> Pattern:
    spelling = key.spelling
    numbers = {k: v for k, v in spelling.examples.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    with FakeTensorMode():
        arguments = {
            k: torch.empty(v.shape, dtype=v.dtype or dtype) if isinstance(v, Of) else v
            for k, v in spelling.examples.items()
        }
    return build(spelling.fn, {**arguments, **spelling.fixed}, numbers)


def parameters(fn: Callable[..., Any]) -> list[str]:
    """Parameter names of a reference, in order."""
    return list(inspect.signature(fn).parameters)
