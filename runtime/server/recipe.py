"""DeepSeek's own prompt encoder and output parser (`deepseek-recipe`, MIT), used for V4 chats.

Terms:
    conversation  the checked messages, tools and thinking mode of a chat request
    parser        cuts the text of an answer into content, reasoning_content and tool_calls
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import deepseek_recipe as recipe
import msgspec

from atomc.runtime.request import Output
from atomc.runtime.server.problems import ApiError
from atomc.runtime.server.schema import ChatBody, refuse

# The recipe knows its models by name; ours may be called anything.
_ALIAS = "atomc"


class Chat(NamedTuple):
    """A conversation that is ready: the prompt's ids, and what the parser must know of the request."""

    prompt: list[int]
    converted: Any


class ChatFormat:
    """Messages to prompt ids with the artifact's tokenizer, and answers back to messages."""

    def __init__(self, tokenizer_path: Path) -> None:
        tokenizer = recipe.Tokenizer.from_file(str(tokenizer_path))
        self._encoding = recipe.DeepseekV4Encoding().with_tokenizer(tokenizer)
        self._options = recipe.ConversionOptions(default_thinking_mode=False).with_model_alias(
            _ALIAS, recipe.ModelVersion.DeepseekV4Pro
        )

    def open(self, body: ChatBody) -> Chat:
        """Checks and encodes a conversation; text that spells a special token stays text. Raises `ApiError` 400.

        Thinking is off unless `thinking`, `reasoning_effort` or `chat_template_kwargs.thinking` asks for it.
        """
        _refuse_what_is_lost(body)
        fields = {
            "messages": body.messages,
            "tools": body.tools,
            "tool_choice": body.tool_choice,
            "thinking": body.thinking or _thinking(body.chat_template_kwargs),
            "reasoning_effort": body.reasoning_effort,
        }
        asked = {"model": _ALIAS} | {name: value for name, value in fields.items() if value is not None}
        try:
            converted = recipe.ChatCompletionRequest(msgspec.json.encode(asked)).convert(self._options)
            prompt: list[int] = self._encoding.encode(converted.conversation)
        except recipe.ConversionError as error:
            problem = json.loads(error.body)["error"]
            raise ApiError(error.status_code, problem["message"], param="messages", code="invalid_value") from None
        except ValueError as error:
            raise ApiError(400, f"Invalid request: {error}", param="messages", code="invalid_type") from None
        return Chat(prompt, converted)

    def default_max_tokens(self, chat: Chat, context: int) -> int | None:
        """DeepSeek's default length, lowered to what the context leaves; None when it leaves nothing."""
        if len(chat.prompt) >= context:
            return None
        most: int = chat.converted.resolve_max_tokens(len(chat.prompt), context)
        return most

    def parser(self, chat: Chat, name: str) -> AnswerParser:
        return AnswerParser(chat, name)


class AnswerParser:
    """Turns the text of one choice into deltas, and collects the whole message."""

    def __init__(self, chat: Chat, name: str) -> None:
        generator = recipe.ChatCompletionRequest.chunk_generator(chat.converted, name, _ALIAS)
        self._processor = recipe.StreamProcessor(generator, chat.converted.parsing_options)
        self._whole = recipe.ChatCompletionResponse(name, _ALIAS, 0, len(chat.prompt), 0)
        self.finish_reason: str | None = None

    def open(self) -> list[dict[str, Any]]:
        """The first delta: the role."""
        return self._deltas(self._processor.push(recipe.InferenceChunk.ready()))

    def take(self, output: Output) -> list[dict[str, Any]]:
        """The deltas that are certain after an output; `finish_reason` is set with the last one.

        It may be set before the engine ends: after a complete block of tool calls nothing else can follow.
        """
        if self.finish_reason is not None:
            return []
        deltas = []
        if output.text:
            deltas += self._deltas(self._processor.push(recipe.InferenceChunk.text(output.text, len(output.token_ids))))
        if output.finish_reason is not None and not self._processor.finished:
            length = output.finish_reason == "length"
            reason = recipe.InferenceFinishReason.Length if length else recipe.InferenceFinishReason.Stop
            deltas += self._deltas(self._processor.push(recipe.InferenceChunk.finish(reason)))
            deltas += self._deltas(self._processor.finish())
        return deltas

    def message(self) -> dict[str, Any]:
        """The whole message so far."""
        message: dict[str, Any] = json.loads(self._whole.to_json())["choices"][0]["message"]
        return message

    def _deltas(self, chunks: list[Any]) -> list[dict[str, Any]]:
        deltas = []
        for chunk in chunks:
            choice = json.loads(chunk.to_json())["choices"][0]
            self._whole.accumulate(chunk)
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            deltas.append(choice["delta"])
        return deltas


def _thinking(options: dict[str, Any] | None) -> dict[str, str] | None:
    """`chat_template_kwargs` as other servers have it: only `thinking` means anything to V4."""
    if not options:
        return None
    if set(options) != {"thinking"} or not isinstance(options["thinking"], bool):
        raise ApiError(
            400,
            'chat_template_kwargs may only hold {"thinking": true or false}.',
            param="chat_template_kwargs",
            code="unsupported_parameter",
        )
    return {"type": "enabled" if options["thinking"] else "disabled"}


def _refuse_what_is_lost(body: ChatBody) -> None:
    """The recipe replaces images by a remark, and a response format needs constrained decoding: say so instead."""
    if body.response_format is not None and body.response_format.get("type") != "text":
        refuse("response_format", body.response_format)
    for number, message in enumerate(body.messages):
        content = message.get("content")
        if isinstance(content, list) and any(not isinstance(p, dict) or p.get("type") != "text" for p in content):
            raise ApiError(
                400,
                f"messages[{number}] holds content that is not text; this model reads text only.",
                param=f"messages[{number}].content",
                code="unsupported_content",
            )
