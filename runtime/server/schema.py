"""The bodies of OpenAI's requests, decoded and checked by msgspec; what is not supported is refused, never ignored."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from atomc.runtime.request import SamplingParams
from atomc.runtime.server.problems import ApiError

MAX_CHOICES = 128

_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")


class StreamOptions(msgspec.Struct):
    """`include_usage`: one more chunk at the end that holds the token counts."""

    include_usage: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """What both endpoints have in common. `null` means the default, as at OpenAI."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Raises `ApiError` for what this server cannot do and for an `n` out of range."""
        refuse("presence_penalty", self.presence_penalty)
        refuse("frequency_penalty", self.frequency_penalty)
        refuse("logit_bias", self.logit_bias)
        if not 1 <= self.choices <= MAX_CHOICES:
            raise ApiError(400, f"n is {self.n}; it must be in [1, {MAX_CHOICES}].", param="n", code="invalid_value")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true.", param="stream_options", code="invalid_value")

    def params(self, choice: int, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Parameters of one of the n choices: each has a seed of its own. Raises `RequestError`."""
        seed = self.seed
        if seed is not None and choice:
            seed = (seed + choice) % 2**63
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=seed,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=bool(self.ignore_eos),
            max_tokens=max_tokens,
            logprobs=logprobs,
        )


class CompletionBody(SamplingFields, kw_only=True):
    """POST /v1/completions. `prompt`: a text, a list of texts, a list of ids, or a list of lists of ids."""

    prompt: Any
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class ChatBody(SamplingFields, kw_only=True):
    """POST /v1/chat/completions. Messages, tools and thinking are `deepseek-recipe`'s to check."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    thinking: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


Body = TypeVar("Body", bound=SamplingFields)


def refuse(name: str, value: object) -> None:
    """Raises `ApiError` when a field that is not supported asks for something."""
    if value:
        raise ApiError(400, f"{name} is not supported by this server.", param=name, code="unsupported_parameter")


def parse(raw: bytes, kind: type[Body]) -> Body:
    """Decodes and checks a body; raises `ApiError` 400 that names the field and what was expected."""
    try:
        body = msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        message = str(error)
        found = _PATH.search(message)
        missing = re.search(r"required field `(\w+)`", message)
        param = found["path"] if found and found["path"] else missing[1] if missing else None
        raise ApiError(400, f"Invalid request: {message}", param=param, code="invalid_type") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}", code="invalid_json") from None
    body.check()
    return body
