"""`torch.compile(module, backend="atom")`: find the fused operators in any module's graph and run it with them.

Contract: the compiled module computes what the module computes. A graph whose meaning the passes do not keep
(gradients, autocast, operators of higher order) or in which nothing is found runs as it was; `reports()` says which,
and why.

Pseudo-code:
    if a gradient may flow, or autocast is on: run the graph as it was
    trace the graph again, to ATen before decomposition, on the fake values that Dynamo gave its inputs
    run the pipeline that finds the operators that are plain mathematics
    if Dynamo made numbers of the module (an eps) into inputs: have it start again with them as constants
    run the result: each operator by its reference, everything else by PyTorch
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node, traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts

from atomc.errors import AtomcError
from atomc.passes import pipelines
from atomc.passes.graph import location
from atomc.passes.runner import Context, Row, run_pipeline

__all__ = ["GraphReport", "UnknownOption", "atom", "clear_reports", "reports"]

LOG = logging.getLogger(__name__)
KEPT = 1024  # reports; the oldest go first
OPTIONS = ("dump_ir",)
GRAD_SWITCHES = (torch._C._set_grad_enabled, torch.autograd.grad_mode._exit_inference_mode)
SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)

Compiled = Callable[..., Any]


class UnknownOption(AtomcError):
    """`torch.compile` was given an option or a mode that this backend has not."""

    exit_code = 2


@dataclass(frozen=True)
class GraphReport:
    """What became of one graph.

    Attributes:
        name: `graph_0`, `graph_1`, … in the order in which Dynamo handed them over.
        where: the first source line of the graph.
        reason: why it runs as it was; None if it runs with fused operators.
        rows: what each pass matched and refused; empty if none ran.
    """

    name: str
    where: str
    reason: str | None
    rows: tuple[Row, ...] = field(default=(), repr=False)

    @property
    def matches(self) -> dict[str, int]:
        """Label of each fusion that found something -> how many."""
        return {r.label: n for r in self.rows if r.label.startswith("fuse_") and (n := len(r.report.matches))}


_REPORTS: deque[GraphReport] = deque(maxlen=KEPT)
_LOCK = threading.Lock()
_COUNT = 0


def reports() -> list[GraphReport]:
    """The reports of the graphs compiled by this process since `clear_reports`, oldest first."""
    with _LOCK:
        return list(_REPORTS)


def clear_reports() -> None:
    """Forget the reports so far."""
    with _LOCK:
        _REPORTS.clear()


def atom(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """The Dynamo backend: a callable that computes what gm computes.

    Args:
        example_inputs: what Dynamo will call it with, or fake values of that.
        options: `dump_ir`: folder for the graph after each pass.
        mode: there is one mode; "default" names it.
    Raises:
        UnknownOption: another option or mode.
    """
    folder = _dump_folder(options, mode)
    name = _next_name()
    compiled, reason, rows = _compile(gm, example_inputs, name, None if folder is None else folder / name)
    nodes = (n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
    where = next((at for n in nodes if (at := location(n)) != "?"), "?")
    with _LOCK:
        _REPORTS.append(GraphReport(name, where, reason, tuple(rows)))
    LOG.info("%s (%s): %s", name, where, reason or "fused")
    return compiled


def _next_name() -> str:
    global _COUNT
    with _LOCK:
        _COUNT += 1
        return f"graph_{_COUNT - 1}"


def _dump_folder(options: Mapping[str, Any] | None, mode: str | None) -> Path | None:
    unknown = [key for key in options or {} if key not in OPTIONS]
    if unknown:
        raise UnknownOption(f'torch.compile(backend="atom") has no option {unknown[0]!r}; it has {", ".join(OPTIONS)}.')
    if mode not in (None, "default"):
        raise UnknownOption(f'torch.compile(backend="atom") has no mode {mode!r}; leave it out.')
    folder = (options or {}).get("dump_ir")
    return None if folder is None else Path(folder)


def _compile(
    gm: GraphModule, example_inputs: Sequence[Any], name: str, dump: Path | None
) -> tuple[Compiled, str | None, list[Row]]:
    """What to run, why it is the graph as it was (if it is), and the pass table."""
    if (reason := _obstacle(gm, example_inputs)) is not None:
        return gm.forward, reason, []
    floats = _dynamic_floats(gm)
    rows: list[Row] = []
    try:
        traced = retrace(_with_constants(gm, floats) if floats else gm, example_inputs)
        rows = run_pipeline(pipelines.mathematics(), traced, Context(name), dump)
    except Exception as error:  # noqa: BLE001 - whatever it is, the graph itself is right, and the report says it
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        LOG.warning("%s runs as it was: %s", name, reason)
        return gm.forward, reason, rows
    if not any(r.report.matches for r in rows if r.label.startswith("fuse_")):
        return gm.forward, "no operator of atomc's was found in it", rows
    if floats:
        for symbol in floats.values():
            TensorifyState.specialize(symbol)
        raise TensorifyScalarRestartAnalysis
    return traced.forward, None, rows


def _dynamic_floats(gm: GraphModule) -> dict[str, str]:
    """Placeholder -> symbol of each Python float that Dynamo, asked for dynamic shapes, made into a 0-d tensor."""
    memos = {
        n.name: getattr(n.meta["example_value"], "item_memo", None) for n in gm.graph.nodes if n.op == "placeholder"
    }
    return {name: str(memo.node._expr) for name, memo in memos.items() if isinstance(memo, torch.SymFloat)}


def _with_constants(gm: GraphModule, floats: Mapping[str, str]) -> GraphModule:
    """The graph with those floats at the values they have now."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in list(graph.nodes):
        source = node.args[0] if node.op == "call_method" and node.target == "item" else None
        if isinstance(source, Node) and source.name in floats:
            node.replace_all_uses_with(source.meta["example_value"].item_memo.node.hint)
            graph.erase_node(node)
    return GraphModule(gm, graph)


def _obstacle(gm: GraphModule, example_inputs: Sequence[Any]) -> str | None:
    """Why the passes would not keep the meaning of this graph, if so."""
    values = (n.meta.get("example_value") for n in gm.graph.nodes)
    wanting = any(isinstance(v, torch.Tensor) and v.requires_grad for v in (*example_inputs, *values))
    if wanting and torch.is_grad_enabled():
        return "gradients are enabled and a tensor requires one: the fused operators have no backward"
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        return "autocast is on: it chooses dtypes inside the operators"
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if wanting and node.target in GRAD_SWITCHES and node.args != (False,):
            return f"gradients are turned on at {location(node)} and a tensor requires one"
        if node.target in (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast):
            return f"autocast is turned on at {location(node)}"
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"{node.target} ({location(node)}) holds a graph of its own"
        if node.op == "placeholder" and not isinstance(value, (torch.Tensor, *SIZES)):
            return f"input {node.name} is {type(value).__name__}, neither a tensor nor a number"
    return None


def retrace(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """The graph in ATen operators before decomposition, as torch.export's training IR, with fake values in `meta`.

    Source lines and module paths are those of gm's nodes. Sizes stay symbolic where Dynamo's are.
    """
    fakes = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
    # The mode of these values, not the one Dynamo has ready for backends: the two must not be mixed.
    mode = next((v.fake_mode for v in fakes if isinstance(v, FakeTensor)), None) or detect_fake_mode(example_inputs)
    mode = mode or FakeTensorMode()

    def run(*inputs: Any) -> Any:
        with traceback.preserve_node_meta():
            return PropagateUnbackedSymInts(gm).run(*inputs)

    with _real_tensors_allowed(mode), mode, torch.no_grad():
        # record_module_stack would look for modules; the nodes of gm bring theirs along.
        traced = make_fx(run, tracing_mode="real", pre_dispatch=True, record_module_stack=False)(*fakes)
        for node in traced.graph.nodes:
            if node.op == "get_attr" and "val" not in node.meta:
                node.meta["val"] = _fake(mode, _attribute(traced, node))
    return traced


@contextmanager
def _real_tensors_allowed(mode: FakeTensorMode) -> Iterator[None]:
    """A constant of the module is a real tensor among fake ones; it is traced as an attribute."""
    before = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = before


def _attribute(gm: GraphModule, node: Node) -> Any:
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    is_real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
    return mode.from_tensor(value, static_shapes=True) if is_real else value
