"""Layer stacks of atomc's own model in plain torch, bf16, random weights: eager, and by inductor with CUDA graphs.

Eager runs the operators' references, which ask the device for sizes. For inductor, those of a decode step are spelled
so that none does (`unwaiting`), each layer kind is compiled once, whole (`fullgraph`), and the step is captured as one
graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.decomposition  # before `unwaiting`: it looks through every namespace of operators
from grouped import grouped_linear
from stack_timing import Row, attempt, why
from stack_transformers import randomise
from timing import captured
from torch import Tensor

from atomc.models.deepseek_v4.attention import AttentionState
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.model import DeepseekV4
from atomc.models.deepseek_v4.state import Paging, layer_state
from atomc.ops import OPS, Batch
from atomc.ops import attention as attention_ops
from atomc.ops.cache import gather_rows, page_rows, physical_rows
from atomc.ops.indexer import select


def build(config: DeepseekV4Config, device: str) -> DeepseekV4:
    """The model with random weights."""
    with torch.device(device):
        model = DeepseekV4(config, torch.bfloat16)
    randomise(model, config.n_routed_experts)
    return model.eval()


class Step:
    """The caches of some requests, and steps over them."""

    def __init__(self, config: DeepseekV4Config, requests: int, context: int, length: int, device: str) -> None:
        self.config, self.requests, self.device = config, requests, device
        paging = Paging.of(config)
        columns = -(-(config.sliding_window + length) // paging.window_page) + 1
        blocks = -(-context // paging.block_tokens)
        self.sizes = {"window_pages": requests * columns + 1, "blocks": requests * blocks + 1, "slots": requests}
        self.tables = [self._table(columns), self._table(blocks)]
        self.states = [self._state(ratio, paging) for ratio in config.compress_ratios[: config.num_hidden_layers]]

    def _table(self, columns: int) -> Tensor:
        order = torch.randperm(self.requests * columns, device=self.device) + 1
        return order.view(self.requests, columns).int()

    def _state(self, ratio: int, paging: Paging) -> AttentionState:
        made: dict[str, Any] = dict.fromkeys(AttentionState._fields)
        for spec in layer_state(self.config, ratio, paging, "bfloat16"):
            shape = (self.sizes[spec.pool], *spec.shape)
            made[spec.name] = torch.randn(shape, dtype=getattr(torch, spec.dtype), device=self.device)
        return AttentionState(**made)

    def batch(self, start: int, length: int) -> Batch:
        """`length` tokens of each request from position `start`; logits of the last of each."""
        b, at = self.requests, self.device
        positions = torch.arange(start, start + length, device=at).repeat(b)
        query = torch.arange(b + 1, device=at) * length
        fields = (
            torch.randint(0, self.config.vocab_size, positions.shape, device=at), positions,
            torch.arange(b, device=at).repeat_interleave(length), query, torch.arange(b, device=at), *self.tables,
            self._ends(positions, self.config.csa_ratio), self._ends(positions, self.config.hca_ratio), query[1:] - 1,
        )  # fmt: skip
        return Batch(*(field.int() for field in fields))

    def _ends(self, positions: Tensor, ratio: int) -> Tensor:
        found = torch.nonzero((positions + 1) % ratio == 0).flatten() if ratio else positions[:0]
        return found if len(found) else torch.full((1,), -1, device=self.device)


# -- a decode step that never waits for the device ---------------------------------------------------------------------


def sparse_attention_of(context: int) -> Callable[..., Tensor]:
    """`atom.sparse_attention` where every query stands at `context` - 1."""

    def sparse_attention(
        q: Tensor, window: Tensor, window_table: Tensor, cache: Tensor | None, block_table: Tensor,
        topk: Tensor | None, sink: Tensor, requests: Tensor, positions: Tensor, scale: float, window_size: int,
        ratio: int,
    ) -> Tensor:  # fmt: skip
        kv, valid = attention_ops._window_rows(window, window_table, requests, positions, window_size, "")
        if cache is not None:
            every = torch.arange(context // ratio, device=q.device).expand(q.shape[0], -1)
            chosen = every if topk is None else topk
            more, seen = attention_ops._compressed_rows(cache, block_table, chosen, requests, positions, ratio, "")
            kv, valid = torch.cat((kv, more), dim=1), torch.cat((valid, seen), dim=1)
        return attention_ops._attend(q, kv, valid, sink, scale)

    return sparse_attention


def index_topk_of(context: int) -> Callable[..., Tensor]:
    """`atom.index_topk` where every query stands at `context` - 1, one of each request."""

    def index_topk(
        q: Tensor, weights: Tensor, cache: Tensor, table: Tensor, requests: Tensor, positions: Tensor,
        query_start: Tensor, ratio: int, topk: int,
    ) -> Tensor:  # fmt: skip
        numbers = torch.arange(context // ratio, device=q.device).expand(q.shape[0], -1)
        keys = gather_rows(cache, physical_rows(table, requests.long()[:, None], numbers, page_rows(cache, "")), "")
        scores = torch.einsum("thn,th->tn", torch.relu(q.float() @ keys.transpose(1, 2)), weights.float())
        return select(scores, (positions.long() + 1) // ratio, topk).int()

    return index_topk


def compressor_update(
    state: Tensor, kv: Tensor, gate: Tensor, positions: Tensor, requests: Tensor, query_start: Tensor, slots: Tensor
) -> None:
    """`atom.compressor_update` of one token a request: each is kept."""
    place = positions.long() % state.shape[1]
    state.index_put_((slots[requests.long()].long(), place), torch.stack((kv, gate), dim=1))


@contextmanager
def unwaiting(context: int) -> Iterator[None]:
    """In it, the model's stateful operators are functions that a compiler sees through, for decode steps."""
    known = {"grouped_linear": grouped_linear, "sparse_attention": sparse_attention_of(context),
             "index_topk": index_topk_of(context), "compressor_update": compressor_update}  # fmt: skip
    known |= {n: OPS[n].reference for n in ("cache_insert", "compressor_pool", "compressed_insert")}
    with patch.multiple(torch.ops.atom, **known):
        yield


# -- measuring ---------------------------------------------------------------------------------------------------------


def eager_rows(config: DeepseekV4Config, options: Any) -> Iterator[Row]:
    """The references as they are."""
    device, model = options.device, build(config, options.device)
    attention_ops.GATHER_ELEMENTS = 1 << 28  # a GPU's memory bounds what is gathered at once, not a core's cache
    with torch.inference_mode():
        for requests in options.requests:
            at = Step(config, requests, options.context, 1, device)
            batch = at.batch(options.context - 1, 1)
            row = Row("own model, torch eager", "decode", requests=requests, context=options.context)
            yield attempt(row, lambda at=at, batch=batch: model(batch, at.states), options.repeat, device)
        for tokens in options.tokens:
            at = Step(config, 1, tokens, tokens, device)
            batch = at.batch(0, tokens)
            row = Row("own model, torch eager", "prefill", tokens=tokens, chunks=1)
            yield attempt(row, lambda at=at, batch=batch: model(batch, at.states), max(options.repeat // 4, 3), device)


def inductor_rows(config: DeepseekV4Config, options: Any) -> Iterator[Row]:
    """Decode steps, compiled for each number of requests."""
    device, model = options.device, build(config, options.device)
    for name in ("cache_size_limit", "recompile_limit"):
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, 64)
    for part in (*model.layers, model.head):
        part.compile(fullgraph=True, dynamic=False, backend=options.backend)
    for requests in options.requests:
        at = Step(config, requests, options.context, 1, device)
        batch = at.batch(options.context - 1, 1)
        row = Row("own model, inductor", "decode", requests=requests, context=options.context)
        with torch.no_grad(), unwaiting(options.context):
            start = time.perf_counter()
            try:
                step = compiled(model, batch, at.states, device)
            except Exception as error:  # noqa: BLE001  what a compiler cannot do is a result
                row.reason = why(error)
                yield row
                continue
            row.compile_s = time.perf_counter() - start
            yield attempt(row, step, options.repeat, device)


def compiled(model: DeepseekV4, batch: Batch, states: list[AttentionState], device: str) -> Callable[[], Any]:
    """A step: on a GPU the replay of a graph."""
    model(batch, states)
    if device != "cuda":
        return lambda: model(batch, states)
    return captured(lambda: model(batch, states)).replay
