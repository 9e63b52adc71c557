"""Capture: DeepSeek-V4 as FX graphs, one for each distinct region, with named dynamic sizes and no weights in memory.

Terms:
    region  what is traced once: the prologue, one layer of each kind, the head.
    call    one use of a region in the program: which layer's weights and caches, which values.
Compile time depends on the number of kinds, not of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from atomc.models.deepseek_v4.attention import AttentionState, Rope
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.hyper_connection import Residual
from atomc.models.deepseek_v4.layers import Angles
from atomc.models.deepseek_v4.model import Block, Head, Prologue, StepAngles
from atomc.models.deepseek_v4.state import Paging, StateSpec, layer_state
from atomc.ops import Batch

Role = Literal["weight", "state", "batch", "value"]

# Symbols: T tokens, B requests, N4 / NH completed CSA / HCA windows, L wanted logits; sizes of the pools of state.
SYMBOLS = ("T", "B", "N4", "NH", "L", "window_pages", "blocks", "slots")
EXAMPLE = {"T": 11, "B": 3, "N4": 5, "NH": 7, "L": 2, "window_pages": 13, "blocks": 17, "slots": 19}


@dataclass(frozen=True)
class Input:
    """A placeholder of a region and what is bound to it: a parameter, a state tensor, a batch field, or a value."""

    placeholder: str
    role: Role
    name: str


@dataclass
class Region:
    """A captured graph. `outputs` name its results; `symbols` maps the graph's size symbols to ours."""

    name: str
    gm: GraphModule
    inputs: list[Input]
    outputs: list[str]
    symbols: dict[str, str]


@dataclass(frozen=True)
class Call:
    """One step of the program: run `region` with the weights and state under `prefix`; rename values by `binds`."""

    region: str
    prefix: str
    binds: dict[str, str]


@dataclass
class Program:
    """The whole model: regions, the calls in order, and the state of every layer by prefix."""

    regions: list[Region]
    calls: list[Call]
    states: dict[str, list[StateSpec]]
    paging: Paging


def region_name(config: DeepseekV4Config, layer: int) -> str:
    """`layer_csa_topk` and the like: equal names, equal graphs."""
    kind = config.layer_kind(layer)
    return f"layer_{kind.attention}_{kind.moe}"


def capture(
    config: DeepseekV4Config,
    dtype: torch.dtype,
    tables: tuple[int, int],
    on_region: Callable[[str], None] = lambda _: None,
) -> Program:
    """Trace every distinct region of the main model.

    Args:
        dtype: compute dtype of activations, caches and quantised or bf16 weights.
        tables: widths (columns) of the window table and the block table, static per artifact.
        on_region: called with each region's name before it is traced, for progress.
    """
    paging = Paging.of(config)
    program = Program([], [Call("prologue", "", {})], {}, paging)
    tracer = _Tracer(config, dtype, tables, paging)
    on_region("prologue")
    program.regions.append(tracer.prologue())
    seen: set[str] = set()
    for layer in range(config.num_hidden_layers):
        name, ratio, prefix = region_name(config, layer), config.compress_ratios[layer], config.layer_prefix(layer)
        if name not in seen:
            seen.add(name)
            on_region(name)
            program.regions.append(tracer.layer(name, layer))
        tokens, rows = ("plain", "plain") if ratio == 0 else ("yarn", "csa_rows" if ratio == 4 else "hca_rows")
        binds = {
            f"rope.{part}.{f}": f"angles.{source}.{f}"
            for part, source in (("tokens", tokens), ("rows", rows))
            for f in Angles._fields
        }
        program.calls.append(Call(name, prefix, binds))
        program.states[prefix] = layer_state(config, ratio, paging, _name(dtype))
    on_region("head")
    program.regions.append(tracer.head())
    program.calls.append(Call("head", "", {}))
    return program


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Tracer:
    """Builds each region's module under fake tensors, its example inputs, and exports it."""

    def __init__(self, config: DeepseekV4Config, dtype: torch.dtype, tables: tuple[int, int], paging: Paging) -> None:
        self.config, self.dtype, self.tables, self.paging = config, dtype, tables, paging

    def prologue(self) -> Region:
        with FakeTensorMode(allow_non_fake_inputs=True):
            module = Prologue(self.config, self.dtype)
            return self._export("prologue", module, {"batch": self._batch()}, ("", "angles"))

    def layer(self, name: str, layer: int) -> Region:
        config, ratio = self.config, self.config.compress_ratios[layer]
        rows = {0: "T", 4: "N4"}.get(ratio, "NH")
        with FakeTensorMode(allow_non_fake_inputs=True):
            module = Block(config, ratio, config.layer_kind(layer).moe == "hash", self.dtype)
            arguments = {
                "residual": self._residual(),
                "batch": self._batch(),
                "rope": Rope(self._angles("T"), self._angles(rows)),
                "state": self._state(ratio),
            }
            return self._export(name, module, arguments, ("",))

    def head(self) -> Region:
        with FakeTensorMode(allow_non_fake_inputs=True):
            arguments = {"residual": self._residual(), "batch": self._batch()}
            return self._export("head", Head(self.config), arguments, ("logits",))

    def _batch(self) -> Batch:
        window, block = self.tables

        def ints(*shape: int | str) -> Any:
            return _sized(shape, torch.int32)

        return Batch(
            ids=ints("T"), positions=ints("T"), requests=ints("T"), query_start=ints("B+1"), slots=ints("B"),
            window_table=ints("B", window), block_table=ints("B", block), csa_ends=ints("N4"), hca_ends=ints("NH"),
            logit_rows=ints("L"),
        )  # fmt: skip

    def _residual(self) -> Residual:
        n, d = self.config.hc_mult, self.config.hidden_size
        f32 = torch.float32
        return Residual(
            _sized(("T", n, d), self.dtype), _sized(("T", d), self.dtype), _sized(("T", n), f32),
            _sized(("T", n, n), f32),
        )  # fmt: skip

    def _angles(self, rows: str) -> Angles:
        half = self.config.qk_rope_head_dim // 2
        return Angles(_sized((rows, half), torch.float32), _sized((rows, half), torch.float32))

    def _state(self, ratio: int) -> AttentionState:
        specs = layer_state(self.config, ratio, self.paging, _name(self.dtype))
        tensors: dict[str, Any] = {s.name: _sized((s.pool, *s.shape), getattr(torch, s.dtype)) for s in specs}
        fields: Any = {name: tensors.get(name) for name in AttentionState._fields}
        return AttentionState(**fields)

    def _export(self, name: str, module: nn.Module, arguments: dict[str, Any], results: tuple[str, ...]) -> Region:
        """Export `module(**arguments)`; `results` are the name prefixes of the parts of its output."""
        tensors = pytree.tree_map_only(_Sized, lambda s: s.tensor, arguments)
        dims = {symbol: Dim(symbol, min=1) for symbol in SYMBOLS}
        shapes = pytree.tree_map_only(_Sized, lambda s: s.dynamic(dims), arguments)
        program = export(module, (), tensors, dynamic_shapes=shapes, strict=False)
        sized = [(_path(p), s) for p, s in pytree.tree_flatten_with_path(arguments)[0] if s is not None]
        roles: dict[str, Role] = {"batch": "batch", "state": "state"}
        inputs: list[Input] = []
        user = iter(sized)
        symbols: dict[str, str] = {}
        nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
        for spec in program.graph_signature.input_specs:
            placeholder = spec.arg.name
            if spec.target is not None:
                inputs.append(Input(placeholder, "weight", spec.target))
                continue
            value = nodes[placeholder].meta.get("val")
            if value is None:  # a None argument: state that this kind of layer has not
                continue
            path, size = next(user)
            symbols.update(size.symbols(value))
            head, _, rest = path.partition(".")
            role = roles.get(head, "value")
            inputs.append(Input(placeholder, role, rest if role != "value" or head == "residual" else path))
        structure = program.call_spec.out_spec
        assert structure is not None
        count = structure.num_leaves
        paths = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), structure))[0]
        return Region(name, program.graph_module, inputs, [_result(_path(p), results) for p, _ in paths], symbols)


@dataclass(frozen=True)
class _Sized:
    """An example input: a fake tensor, and which of its dims are symbols."""

    tensor: torch.Tensor
    shape: tuple[int | str, ...]

    def dynamic(self, dims: dict[str, Any]) -> dict[int, Any]:
        return {
            i: dims[s.removesuffix("+1")] + 1 if s.endswith("+1") else dims[s]
            for i, s in enumerate(self.shape)
            if isinstance(s, str)
        }

    def symbols(self, value: torch.Tensor) -> Iterator[tuple[str, str]]:
        for size, symbol in zip(value.shape, self.shape, strict=True):
            if isinstance(symbol, str) and "+" not in symbol:
                yield str(size), symbol


def _sized(shape: tuple[int | str, ...], dtype: torch.dtype) -> Any:
    sizes = [(EXAMPLE[s.removesuffix("+1")] + s.endswith("+1")) if isinstance(s, str) else s for s in shape]
    return _Sized(torch.empty(sizes, dtype=dtype), shape)


def _path(keys: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def _result(path: str, results: tuple[str, ...]) -> str:
    """The name of an output leaf: the prefix of its part (if the output is a tuple of parts), then its field."""
    if len(results) == 1:
        return f"{results[0]}.{path}".strip(".")
    index, _, rest = path.partition(".")
    return f"{results[int(index)]}.{rest}".strip(".")


__all__ = ["Call", "Input", "Program", "Region", "StepAngles", "capture", "region_name"]
