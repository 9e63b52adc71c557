"""`atomc generate`: prompts in, text out as it is made."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atomc.cli.compile import JsonOption
from atomc.cli.engine import MemoryOption, open_engine
from atomc.cli.inspect import ArtifactArgument

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from atomc.runtime.engine import Engine
    from atomc.runtime.executor import Executor
    from atomc.runtime.intake import Prompt
    from atomc.runtime.llm import LLM
    from atomc.runtime.request import Output, SamplingParams

DEFAULT_MAX_TOKENS = 256
# A model may emit any character; on a terminal these could do more than be read.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def generate_command(
    artifact: ArtifactArgument,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Texts to continue; - is standard input.")],
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens to generate.", show_default=f"{DEFAULT_MAX_TOKENS}, or what the context leaves"),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy.", show_default="the model's generation_config.json")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens that reach this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.", show_default="random")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not end at the end-of-sentence token.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Each prompt is a user's message in DeepSeek's format.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Tokens, speed and time to the first token, on stderr.")
    ] = False,
    memory: MemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue texts. Several are computed together and printed one after the other."""
    from atomc.runtime.request import SamplingParams

    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "max_tokens": max_tokens}
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    asked |= {"stop": tuple(stop or ()), "ignore_eos": ignore_eos}
    SamplingParams(**asked)  # what is wrong is said before anything is loaded
    texts = _texts(prompts)
    executor, _ = open_engine(artifact, max_requests=None, memory=memory)
    from atomc.cli.model_files import GenerationConfig, read_model_file
    from atomc.runtime.llm import LLM

    llm = LLM(executor)
    defaults = read_model_file(artifact, "generation_config.json", GenerationConfig).sampling()
    params = SamplingParams(**{**defaults, **asked})
    answers = _Answers(llm, [_prompt(executor, text, chat) for text in texts], params)
    if as_json:
        from atomc.cli.console import emit_json

        for index in range(len(texts)):
            for _ in answers.stream(index):
                pass
        emit_json({"completions": answers.report(), **answers.stats()})
        return
    _print(answers, len(texts))
    if stats:
        _print_stats(answers)


def _texts(prompts: Sequence[str]) -> list[str]:
    """The prompts, with standard input in the place of `-`, exactly as it is."""
    from atomc.cli.failure import OptionError

    if prompts.count("-") > 1:
        raise OptionError("PROMPT - is given twice; standard input can be read once.")
    if "-" not in prompts:
        return list(prompts)
    try:
        read = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise OptionError(f"standard input is not UTF-8 at byte {error.start}.") from error
    return [read if prompt == "-" else prompt for prompt in prompts]


def _prompt(executor: Executor, text: str, chat: bool) -> Prompt:
    """The text, or the ids of a conversation whose only message it is."""
    if not chat:
        return text
    from atomc.runtime.errors import RequestError
    from atomc.runtime.server.problems import ApiError
    from atomc.runtime.server.recipe import ChatFormat
    from atomc.runtime.server.schema import ChatBody

    try:
        body = ChatBody(model=executor.serving.model_name, messages=[{"role": "user", "content": text}])
        return ChatFormat(executor.tokenizer_path).open(body).prompt
    except ApiError as error:
        raise RequestError(error.message, param=error.param) from error


class _Answers:
    """All prompts in one engine; each is streamed in its turn, what the others get meanwhile is kept for theirs."""

    def __init__(self, llm: LLM, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        self._llm = llm
        each = [_bounded(llm.engine, prompt, params) for prompt in prompts]
        self._start = time.perf_counter()
        self._streams = [llm.stream(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
        self._first: float | None = None
        self._texts = [""] * len(prompts)
        self._last: dict[int, Output] = {}
        self._end = self._start

    def stream(self, index: int) -> Iterator[str]:
        """The text of one answer in pieces. Raises `EngineError`."""
        for output in self._streams[index]:
            self._end = time.perf_counter()
            self._first = self._end if self._first is None else self._first
            self._last[index] = output
            self._texts[index] += output.text
            yield output.text

    def report(self) -> list[dict[str, Any]]:
        """What `--json` writes of each prompt."""
        return [
            {"text": self._texts[i], "finish_reason": last.finish_reason, "prompt_tokens": last.prompt_tokens,
             "completion_tokens": last.completion_tokens}
            for i, last in sorted(self._last.items())
        ]  # fmt: skip

    def stats(self) -> dict[str, Any]:
        """Of all prompts together, seconds from when they were handed in."""
        seconds, tokens = self._end - self._start, sum(o.completion_tokens for o in self._last.values())
        return {
            "prompt_tokens": sum(o.prompt_tokens for o in self._last.values()),
            "completion_tokens": tokens,
            "seconds": round(seconds, 4),
            "seconds_to_first_token": round((self._first or self._end) - self._start, 4),
            "tokens_per_second": round(tokens / seconds, 2) if seconds else 0.0,
        }


def _bounded(engine: Engine, prompt: Prompt, params: SamplingParams) -> SamplingParams:
    """Without --max-tokens: the default, or less where the context leaves less. Raises `RequestError`."""
    from dataclasses import replace

    request = engine.prepare(prompt, params)
    if params.max_tokens is not None:
        return params
    return replace(params, max_tokens=min(DEFAULT_MAX_TOKENS, request.limit - request.prompt_tokens))


def _print(answers: _Answers, count: int) -> None:
    """Text on stdout as it comes; a heading before each of several answers."""
    terminal = sys.stdout.isatty()
    for index in range(count):
        if count > 1:
            sys.stdout.write(f"==> prompt {index + 1} of {count} <==\n")
        for piece in answers.stream(index):
            sys.stdout.write(piece.translate(_CONTROLS) if terminal else piece)
            sys.stdout.flush()
        sys.stdout.write("\n" if index == count - 1 else "\n\n")
    sys.stdout.flush()


def _print_stats(answers: _Answers) -> None:
    stats = answers.stats()
    tokens = f"{stats['prompt_tokens']:,} prompt tokens, {stats['completion_tokens']:,} generated"
    speed = f"{stats['seconds']:.2f} s ({stats['tokens_per_second']:.1f} tokens/s)"
    sys.stderr.write(f"{tokens} in {speed}, first token after {stats['seconds_to_first_token']:.2f} s\n")
