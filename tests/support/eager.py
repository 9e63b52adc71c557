"""Runs the eager DeepSeek-V4 modules on sequences cut in any way, with a paging of its own (not the runtime's).

Everything the model must not depend on is hostile: caches start as NaN, page, block and slot numbers are shuffled, the
window ring has the fewest columns the contract allows, and step metadata carries padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch

from atomc.models.deepseek_v4.attention import AttentionState
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.model import DeepseekV4
from atomc.models.deepseek_v4.state import Paging, StateSpec, layer_state
from atomc.ops import Batch

Piece: TypeAlias = tuple[int, int, torch.Tensor]  # request, first position, token ids
Step: TypeAlias = list[tuple[int, int]]  # (sequence, number of its next tokens) in batch order
Choices: TypeAlias = dict[str, torch.Tensor]  # module path of an indexer or a gate -> what it chose, a row per token


class Caches(NamedTuple):
    """The state of all layers, and where each request (a row) lives in it."""

    states: list[AttentionState]
    window_table: torch.Tensor  # [B, NW]
    block_table: torch.Tensor  # [B, MB]
    slots: torch.Tensor  # [B]


class Run(NamedTuple):
    """What the model computed for one sequence: logits [n, V], and every discrete choice on the way."""

    logits: torch.Tensor
    choices: Choices


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Random, non-trivial values for every parameter: norms, sinks, biases and tables too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "rope_" in name:
            continue
        if name.endswith("tid2eid"):
            experts = model.get_parameter(name.removesuffix("tid2eid") + "weight").shape[0]
            rows = [torch.randperm(experts, generator=generator)[: parameter.shape[1]] for _ in parameter]
            parameter.copy_(torch.stack(rows))
            continue
        value = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or name.endswith("scale"):
            value = 1 + 0.2 * value
        elif name.endswith("gate.bias"):
            value = 0.3 * value  # about the spread of the scores it is added to
        elif parameter.dim() >= 2 and not name.endswith("ape"):
            value = value * parameter.shape[-1] ** -0.5
        parameter.copy_(value)


def new_caches(
    config: DeepseekV4Config,
    requests: int,
    context: int,
    *,
    longest_step: int,
    seed: int = 0,
    paging: Paging | None = None,
    dtype: torch.dtype = torch.float32,
    ratios: Sequence[int] | None = None,
) -> Caches:
    """Caches full of NaN for requests of up to `context` tokens, at most `longest_step` of one request in a step.

    `ratios` gives the compress ratio of each layer; default: the main layers of the configuration.
    """
    generator = torch.Generator().manual_seed(seed)
    paging = paging or Paging.of(config)
    columns = -(-(config.sliding_window + longest_step) // paging.window_page) + 1
    blocks = -(-context // paging.block_tokens)
    sizes = {"window_pages": requests * columns + 3, "blocks": requests * blocks + 3, "slots": requests + 2}

    def poisoned(spec: StateSpec) -> torch.Tensor:
        return torch.full((sizes[spec.pool], *spec.shape), torch.nan, dtype=getattr(torch, spec.dtype))

    def table(pages: int, columns: int) -> torch.Tensor:
        numbers = 1 + torch.randperm(pages - 1, generator=generator)  # page 0 is the reserved dummy
        return numbers[: requests * columns].view(requests, columns)

    states = []
    for ratio in config.compress_ratios[: config.num_hidden_layers] if ratios is None else ratios:
        specs = layer_state(config, ratio, paging, str(dtype).removeprefix("torch."))
        tensors = {spec.name: poisoned(spec) for spec in specs}
        window = tensors.pop("window")
        states.append(AttentionState(window, *(tensors.get(name) for name in AttentionState._fields[1:])))
    slots = torch.randperm(sizes["slots"], generator=generator)[:requests]
    return Caches(states, table(sizes["window_pages"], columns), table(sizes["blocks"], blocks), slots)


def make_batch(config: DeepseekV4Config, pieces: list[Piece], caches: Caches) -> Batch:
    """The metadata of one step over consecutive pieces of some requests; logits of every token are wanted."""
    positions = torch.cat([torch.arange(first, first + len(tokens)) for _, first, tokens in pieces])
    lengths = torch.tensor([len(tokens) for _, _, tokens in pieces])
    row = torch.tensor([request for request, _, _ in pieces])

    def ends(ratio: int) -> torch.Tensor:
        found = ((positions + 1) % ratio == 0).nonzero()[:, 0] if ratio else positions[:0]
        return torch.nn.functional.pad(found, (0, 1 + len(found) % 3), value=-1)

    fields = Batch(
        ids=torch.cat([tokens for _, _, tokens in pieces]),
        positions=positions,
        requests=torch.repeat_interleave(lengths),
        query_start=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        slots=caches.slots[row],
        window_table=caches.window_table[row],
        block_table=caches.block_table[row],
        csa_ends=ends(config.csa_ratio),
        hca_ends=ends(config.hca_ratio),
        logit_rows=torch.arange(len(positions)),
    )
    return Batch(*(field.int() for field in fields))


def run(
    model: DeepseekV4, sequences: list[torch.Tensor], steps: list[Step], *, seed: int = 0, paging: Paging | None = None
) -> list[Run]:
    """Feed the sequences to the model step by step; of each, the logits and choices of the tokens fed."""
    config = model.config
    caches = new_caches(
        config,
        len(sequences),
        max(len(s) for s in sequences),
        longest_step=max(n for step in steps for _, n in step),
        seed=seed,
        paging=paging,
        dtype=model.prologue.embed.weight.dtype,
    )
    done = [0] * len(sequences)
    parts: list[list[dict[str, torch.Tensor]]] = [[] for _ in sequences]
    for step in steps:
        pieces = [(i, done[i], sequences[i][done[i] : done[i] + n]) for i, n in step]
        found = _forward(model, make_batch(config, pieces, caches), caches.states)
        rows = dict(zip(found, (value.split([n for _, n in step]) for value in found.values()), strict=True))
        for at, (i, n) in enumerate(step):
            parts[i].append({name: value[at] for name, value in rows.items()})
            done[i] += n
    joined = [{name: torch.cat([part[name] for part in mine]) for name in mine[0]} for mine in parts]
    return [Run(mine.pop("logits"), mine) for mine in joined]


def _forward(model: DeepseekV4, batch: Batch, states: list[AttentionState]) -> dict[str, torch.Tensor]:
    """`logits`, and by module path the rows each indexer chose [T, K] and the experts each gate chose [T, k]."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, output: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
        found[name] = output[1] if isinstance(output, tuple) else output

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name, module in model.named_modules()
        if name.endswith((".indexer", ".gate"))
    ]
    try:
        found["logits"] = model(batch, states)
    finally:
        for handle in handles:
            handle.remove()
    return found


def chunks(length: int, size: int) -> list[Step]:
    """Steps that feed sequence 0 alone, `size` tokens at a time."""
    return [[(0, min(size, length - at))] for at in range(0, length, size)]
