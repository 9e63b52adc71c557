"""Greedy text with the dense forward: no cache, so only for samples and checks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from atomc.models.nano.config import NanoConfig
from atomc.models.nano.dense import forward


def greedy(
    weights: Mapping[str, Tensor], config: NanoConfig, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[list[int]]:
    """Continuations of the prompts (with BOS), each up to EOS or `new_tokens`."""
    # Right padding to whole compression windows: causality keeps it out of every answer.
    multiple = max(config.sliding_window, *config.compress_ratios)
    length = -(-(max(map(len, prompts)) + new_tokens) // multiple) * multiple
    ids_BT = torch.full((len(prompts), length), config.eos_token_id)
    for row, prompt in enumerate(prompts):
        ids_BT[row, : len(prompt)] = torch.tensor(prompt)
    selected_rows, batch = torch.tensor(False), torch.arange(len(prompts))
    end = torch.tensor([len(prompt) for prompt in prompts])
    with torch.no_grad():
        for _ in range(new_tokens):
            used = -(-int(end.max()) // multiple) * multiple
            x_BTD = forward(weights, ids_BT[:, :used], ids_BT[:, :used], config, selected_rows).x_BTD
            ids_BT[batch, end] = (x_BTD[batch, end - 1] @ weights["head"].T).argmax(-1)
            end += 1
    answers = [ids_BT[row, len(prompt) : len(prompt) + new_tokens].tolist() for row, prompt in enumerate(prompts)]
    return [ids[: ids.index(config.eos_token_id)] if config.eos_token_id in ids else ids for ids in answers]
