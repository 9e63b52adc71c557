"""Small FX graphs for the tests of passes: traced as a capture traces, printed as short text, run on real tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.proxy import _register_stack_trace_anchor

from atomc.ops import OPS
from atomc.passes.canonicalize import Canonicalize
from atomc.passes.graph import op_name
from atomc.passes.runner import Context, Pass, Report, Row, run_pipeline

TOKENS = 11  # a dim of this size is the number of tokens, and symbolic


def traced(fn: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """The graph of fn in ATen before decomposition; dims of size `TOKENS` are one symbol."""
    _register_stack_trace_anchor(fn)  # else only frames of functions named forward are recorded
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [_fake(mode, x) for x in inputs]
    with mode, torch.no_grad():
        return make_fx(fn, pre_dispatch=True, record_module_stack=False, record_stack_traces=True)(*fakes)


def _fake(mode: FakeTensorMode, x: Tensor) -> Tensor:
    sizes: list[DimDynamic] = [DimDynamic.DUCK if n == TOKENS else DimDynamic.STATIC for n in x.shape]
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(sizes)
    fake: Tensor = mode.from_tensor(x, symbolic_context=context)
    return fake


def apply(gm: GraphModule, *passes: Pass, expected: dict[str, int] | None = None) -> list[Row]:
    """Canonicalize, then the passes, under the runner."""
    return run_pipeline((Canonicalize(), *passes), gm, Context("test", expected or {}))


def report(gm: GraphModule, step: Pass) -> Report:
    """What one pass reports on the graph, canonicalized first."""
    return apply(gm, step)[-1].report


def text(gm: GraphModule) -> str:
    """One line per call: `name = operator(arguments)`."""
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    return "\n".join(f"{n.name} = {op_name(n.target)}({', '.join(_words(n))})" for n in calls)


def _words(node: Node) -> list[str]:
    named = [f"{key}={value}" for key, value in node.kwargs.items()]
    return [str(a).replace(str(torch.iinfo(torch.int64).max), "END") for a in node.args] + named


class _References(Interpreter):
    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op = OPS.get(op_name(target).removeprefix("atom."))
        return super().call_function(target if op is None else op.reference, args, kwargs)


def by_references(gm: GraphModule, *inputs: Tensor) -> Any:
    """Run the graph with every fused operator's reference: its meaning, not its implementation for a device."""
    return _References(gm).run(*inputs)


def operators(gm: GraphModule) -> list[str]:
    """The names of the operators called, in order."""
    return [op_name(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def assert_same(got: Any, want: Any) -> None:
    """Equal bit for bit, NaNs too, through tuples."""
    if isinstance(want, (tuple, list)):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
    elif isinstance(want, Tensor):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    else:
        assert got == want
