"""Runs the eager DeepSeek-V4 modules on sequences cut in any way, with a paging of its own (not the runtime's)."""

from __future__ import annotations

import torch

from atomc.models.deepseek_v4.attention import AttentionState
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.model import DeepseekV4
from atomc.models.deepseek_v4.state import Paging, layer_state
from atomc.ops import Batch

Piece = tuple[int, int, torch.Tensor]  # request, first position, token ids


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Random, non-trivial values for every parameter: norms, sinks, biases and tables too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.startswith("prologue.rope"):
            continue
        if name.endswith("tid2eid"):
            experts = model.config.n_routed_experts
            rows = [torch.randperm(experts, generator=generator)[: parameter.shape[1]] for _ in parameter]
            parameter.copy_(torch.stack(rows))
            continue
        value = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.2 * value
        elif parameter.dim() >= 2 and not name.endswith("ape"):
            value = value * parameter.shape[-1] ** -0.5
        elif name.endswith("scale"):
            value = 1 + 0.2 * value
        parameter.copy_(value)


def new_states(
    config: DeepseekV4Config, requests: int, context: int, dtype: torch.dtype = torch.float32
) -> tuple[list[AttentionState], torch.Tensor, torch.Tensor]:
    """Caches filled with NaN (nothing may depend on what was not written), the window table and the block table."""
    paging = Paging.of(config)
    pages = -(-context // paging.window_page) + 1
    blocks = -(-context // paging.block_tokens) + 1
    sizes = {"window_pages": requests * pages + 1, "blocks": requests * blocks + 1, "slots": requests}
    states = []
    for layer in range(config.num_hidden_layers):
        specs = layer_state(config, config.compress_ratios[layer], paging, str(dtype).removeprefix("torch."))
        tensors = {
            s.name: torch.full((sizes[s.pool], *s.shape), torch.nan, dtype=getattr(torch, s.dtype)) for s in specs
        }
        states.append(AttentionState(**{f: tensors.get(f) for f in AttentionState._fields}))

    def table(columns: int) -> torch.Tensor:
        return 1 + torch.randperm(requests * columns).int().view(requests, columns)

    return states, table(pages), table(blocks)


def make_batch(
    config: DeepseekV4Config, pieces: list[Piece], window_table: torch.Tensor, block_table: torch.Tensor
) -> Batch:
    """The metadata of one step over consecutive pieces of some requests; logits of every token are wanted."""
    ids, positions, rows, starts = [], [], [], [0]
    for row, (_, first, tokens) in enumerate(pieces):
        ids.append(tokens)
        positions.append(torch.arange(first, first + len(tokens)))
        rows.append(torch.full((len(tokens),), row))
        starts.append(starts[-1] + len(tokens))
    position = torch.cat(positions)

    def ends(ratio: int) -> torch.Tensor:
        found = ((position + 1) % ratio == 0).nonzero()[:, 0] if ratio else torch.empty(0)
        return torch.cat((found, torch.tensor([-1])))

    requests = torch.tensor([r for r, _, _ in pieces])
    fields = (
        torch.cat(ids), position, torch.cat(rows), torch.tensor(starts), requests, window_table[requests],
        block_table[requests], ends(config.csa_ratio), ends(config.hca_ratio), torch.arange(len(position)),
    )  # fmt: skip
    return Batch(*(f.int() for f in fields))


def run_chunks(
    model: DeepseekV4, sequences: list[torch.Tensor], steps: list[list[tuple[int, int]]]
) -> list[torch.Tensor]:
    """Logits [len, V] of each sequence; each step takes (sequence, number of its next tokens) pairs."""
    context = max(len(s) for s in sequences)
    states, window_table, block_table = new_states(model.config, len(sequences), context)
    done = [0] * len(sequences)
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    for step in steps:
        pieces = [(i, done[i], sequences[i][done[i] : done[i] + n]) for i, n in step]
        out = model(make_batch(model.config, pieces, window_table, block_table), states)
        at = 0
        for i, n in step:
            logits[i].append(out[at : at + n])
            done[i] += n
            at += n
    return [torch.cat(parts) for parts in logits]
