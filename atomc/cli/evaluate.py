"""`atomc eval`: bits per byte of a text."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atomc.cli.compile import JsonOption
from atomc.cli.engine import MemoryOption, open_engine
from atomc.cli.inspect import ArtifactArgument

if TYPE_CHECKING:
    from atomc.runtime.executor import Executor


def eval_command(
    artifact: ArtifactArgument,
    file: Annotated[
        Path, typer.Argument(help='.txt is one document; .jsonl and .jsonl.xz one a line, as {"text": ...}.')
    ],
    limit_bytes: Annotated[int | None, typer.Option(min=1, help="Score only this much of the text.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a window.", show_default="the artifact's max_context")
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens that two windows of a document share.", show_default="half a window"),
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="Begin documents with BOS.", show_default="as the tokenizer does"),
    ] = None,
    eos: Annotated[
        bool | None,
        typer.Option(
            "--eos/--no-eos", help="End documents with EOS and score it.", show_default="as the tokenizer does"
        ),
    ] = None,
    memory: MemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure bits per byte of a text. Each document from its start, long ones in overlapping windows."""
    from atomc.cli.texts import limited, read_documents

    documents = list(limited(read_documents(file), limit_bytes))
    executor, _ = open_engine(artifact, memory=memory)
    from atomc.cli.model_files import TokenizerConfig, read_model_file

    habits = read_model_file(artifact, "tokenizer_config.json", TokenizerConfig)
    options = {
        "bos": habits.add_bos_token if bos is None else bos,
        "eos": habits.add_eos_token if eos is None else eos,
        "context": context,
        "overlap": overlap,
    }
    report = _evaluate(executor, documents, options)
    if as_json:
        from atomc.cli.console import emit_json

        emit_json({"file": file, **report})
        return
    from atomc.cli.console import facts, stdout

    ends = f"BOS {'before' if report['bos'] else 'not before'}, EOS {'scored after' if report['eos'] else 'not after'}"
    rows = [
        ("bits per byte", f"{report['bits_per_byte']:.4f}"),
        ("text", f"{report['bytes']:,} bytes in {report['documents']:,} documents"),
        ("tokens", f"{report['tokens']:,} scored, {report['bytes_per_token']:.2f} bytes each; {ends} each document"),
        ("windows", f"{report['context']:,} tokens, overlapping by {report['overlap']:,}"),
        ("speed", f"{report['tokens_per_second']:,.0f} tokens/s, {report['seconds']:.1f} s"),
    ]
    stdout().print(facts(f"{executor.serving.model_name} on {file}", rows))


def _evaluate(executor: Executor, documents: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Everything `--json` writes."""
    from atomc.cli.console import stages
    from atomc.runtime.evaluate import evaluate

    start = time.perf_counter()
    with stages() as progress:
        score = evaluate(executor, documents, progress=partial(progress, "tokens"), **options)
    seconds = time.perf_counter() - start
    most = min(executor.serving.max_context, (executor.num_blocks - 1) * executor.serving.block_tokens)
    context = most if options["context"] is None else options["context"]
    return {
        "model": executor.serving.model_name, "bits_per_byte": score.bits_per_byte, "bytes": score.bytes,
        "documents": score.documents, "tokens": score.tokens, "bytes_per_token": score.bytes_per_token,
        "computed_tokens": score.computed, "bos": options["bos"], "eos": options["eos"], "context": context,
        "overlap": context // 2 if options["overlap"] is None else options["overlap"],
        "seconds": round(seconds, 3), "tokens_per_second": round(score.computed / seconds, 1),
    }  # fmt: skip
