"""Layer stacks of transformers' DeepSeek-V4 in bf16 with random weights: a decode step, a prefill chunk; eager.

The cache that a decode step finds is that of one real prompt, repeated for each request; before each step it is put
back as it was. A prompt longer than `CHUNK` is fed in chunks of half of it: eager attention holds all scores of a
chunk, several times, and four layers of V4-Flash leave it some 25 of 78 GiB.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from stack_timing import Row, attempt
from torch import Tensor, nn

from atomc.models.deepseek_v4.config import DeepseekV4Config

CHUNK = 4096  # tokens of a prompt that is fed at once


def build(config: DeepseekV4Config, device: str) -> Any:
    """The model with random weights, in the dtypes that a checkpoint loaded in bf16 has."""
    from transformers import DeepseekV4ForCausalLM
    from transformers.models.deepseek_v4 import DeepseekV4Config as TheirConfig

    given = config.to_transformers_dict()
    given.pop("quantization_config", None)
    theirs = TheirConfig(**given)
    theirs._attn_implementation = "eager"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = DeepseekV4ForCausalLM(theirs)
    finally:
        torch.set_default_dtype(before)
    _keep_wide(model)
    randomise(model, config.n_routed_experts)
    return model.eval()


def _keep_wide(model: Any) -> None:
    """What `from_pretrained` keeps in fp32, but norms: their fp32 results transformers 5.17 feeds to bf16 linears."""
    names = [name for name in model._keep_in_fp32_modules_strict or () if "norm" not in name]
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if any(kept in parts for kept in names):
            parameter.data = parameter.data.float()


@torch.no_grad()
def randomise(model: nn.Module, experts: int) -> None:
    """Weights that keep activations of order one; norms near 1; experts of the hash table uniform."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("tid2eid"):
            value.copy_(torch.rand(value.shape[0], experts, device=value.device).topk(value.shape[1]).indices)
        elif "norm" in name or name.endswith("scale"):
            value.fill_(1.0)
        elif value.dim() > 1:
            value.normal_(std=value.shape[-1] ** -0.5)
        elif "inv_freq" not in name and "rope_" not in name:
            value.normal_(std=0.1)


class Cache:
    """A cache of transformers that can be repeated for a batch, and put back."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def repeated(self, batch: int) -> None:
        """Each request's state is that of the one prompt."""
        for layer in self.cache.layers:
            for name, value in vars(layer).items():
                setattr(layer, name, _repeated(value, batch))

    def kept(self) -> Callable[[], None]:
        """What puts the cache back as it is now: steps replace its tensors, and write into none."""
        layers = [{name: dict(v) if isinstance(v, dict) else v for name, v in vars(layer).items()}
                  for layer in self.cache.layers]  # fmt: skip

        def restore() -> None:
            for layer, saved in zip(self.cache.layers, layers, strict=True):
                vars(layer).update({n: dict(v) if isinstance(v, dict) else v for n, v in saved.items()})

        return restore


def _repeated(value: Any, batch: int) -> Any:
    if isinstance(value, dict):
        return {name: _repeated(part, batch) for name, part in value.items()}
    if isinstance(value, Tensor) and value.dim() > 1:
        return value.repeat(batch, *[1] * (value.dim() - 1))
    return value


class Stack:
    """The model, fed as a server feeds it."""

    def __init__(self, model: Any, config: DeepseekV4Config, device: str) -> None:
        self.model, self.config, self.device = model, config, device
        # Renamed by a later version of transformers.
        parameters = inspect.signature(inspect.unwrap(type(model).forward)).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    def new_cache(self) -> Any:
        """An empty one."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def ids(self, batch: int, length: int) -> Tensor:
        """Random tokens."""
        return torch.randint(0, self.config.vocab_size, (batch, length), device=self.device)

    @torch.inference_mode()
    def feed(self, ids: Tensor, start: int, cache: Any) -> Tensor:
        """Logits of the last token of each request; `ids` stand at positions from `start`."""
        positions = torch.arange(start, start + ids.shape[1], device=self.device).expand(ids.shape[0], -1)
        given = {self._cache_name: cache, "position_ids": positions, "use_cache": True, "logits_to_keep": 1}
        logits: Tensor = self.model(input_ids=ids, **given).logits
        return logits

    def prompt(self, tokens: int, cache: Any) -> None:
        """One request's tokens from position 0, in chunks."""
        size = chunk_of(tokens)
        for start in range(0, tokens, size):
            self.feed(self.ids(1, min(size, tokens - start)), start, cache)


def chunk_of(tokens: int) -> int:
    """Tokens fed at once of a prompt of that many."""
    return CHUNK if tokens <= CHUNK else CHUNK // 2


def rows(config: DeepseekV4Config, options: Any) -> Iterator[Row]:
    """Measure; experts one after the other in Python (`eager`), and by grouped products."""
    device = options.device
    stack = Stack(build(config, device), config, device)
    kinds = ("eager", "grouped_mm") if device == "cuda" else ("eager",)
    for requests in options.requests:
        holder = Cache(stack.new_cache())
        stack.model.set_experts_implementation(kinds[-1])
        with torch.inference_mode():
            stack.prompt(options.context - 1, holder.cache)
            holder.repeated(requests)
        restore, ids = holder.kept(), stack.ids(requests, 1)
        for kind in kinds:
            stack.model.set_experts_implementation(kind)
            row = Row(f"transformers, experts {kind}", "decode", requests=requests, context=options.context)
            step = partial(stack.feed, ids, options.context - 1, holder.cache)
            yield attempt(row, step, options.repeat, device, restore)
        del holder, restore, step
    for tokens in options.tokens:
        for kind in kinds:
            stack.model.set_experts_implementation(kind)
            chunks = -(-tokens // chunk_of(tokens))
            row = Row(f"transformers, experts {kind}", "prefill", tokens=tokens, chunks=chunks)
            step = lambda tokens=tokens: stack.prompt(tokens, stack.new_cache())  # noqa: E731
            yield attempt(row, step, max(options.repeat // 4, 3), device)
