"""What each quantisation scheme costs nano: bits/byte, KL, best token, index picks, greedy text, bytes.

    OMP_NUM_THREADS=1 python benchmarks/quantization.py --text val.jsonl.xz [--every 3] [--only native fp8]

Compiles every case for the cpu target into a temporary folder, has it predict the first `--tokens` tokens of every
`--every`-th document, and compares each row of logits with the baseline's: the same weights dequantised, with rows in
bf16 and nothing quantised in between. All compute in float32. Ends with 1, and what is stored stays, if `native` loses
more than 0.01 bits/byte.
Writes the JSON, the table in docs/quantization.md and the picture beside it; with --only it prints and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does, before torch is imported

import torch
from machine import machine
from quantization_copies import Rescaling, differing_weights, plain_copy
from quantization_metrics import Reading, agreement, bits_per_byte, figures, read
from quantization_report import show, write_document, write_picture
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from atomc.artifact import facts
from atomc.artifact.store import read_manifest
from atomc.cli.texts import read_documents
from atomc.compiler import Options, compile_model
from atomc.errors import AtomcError
from atomc.models.source import open_model
from atomc.report import weight_bytes
from atomc.runtime.capacity import open_executor
from atomc.runtime.detokenize import Vocabulary
from atomc.runtime.executor import Executor
from atomc.runtime.llm import LLM
from atomc.runtime.request import SamplingParams

MODEL, LIMIT = "deepseek-v4-nano", 0.01
REQUESTS = 20  # documents read, and prompts continued, at once
PROMPT_TOKENS = 64
HERE = Path(__file__).parent
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Case:
    """One artifact. `model`: `shipped`, or `rescaled`: the bf16 copy on no grid; each has its own baseline."""

    name: str
    model: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def is_baseline(self) -> bool:
        return self.options == {"scheme": "bf16"}


def cases() -> Iterator[Case]:
    """A model's baseline comes before what is compared with it."""
    plain = {"rows": "bf16", "index_rows": "bf16"}
    for name in ("bf16", "none", "native", "w4a8", "fp8", "mxfp4", "ptpc-fp8"):
        yield Case(name, "shipped", {"scheme": name})
    yield Case("ptpc-fp8 --scales mse", "shipped", {"scheme": "ptpc-fp8", "scales": "mse"})
    yield Case("native --index-rows fp8", "shipped", {"scheme": "native", "index_rows": "fp8"})
    yield Case("native --index-rows compute", "shipped", {"scheme": "native", "index_rows": "compute"})
    yield Case("native --cache-rows bf16", "shipped", {"scheme": "native", "rows": "bf16"})
    yield Case("native --cache-rows bf16 --index-rows bf16", "shipped", {"scheme": "native"} | plain)
    yield Case("bf16", "rescaled", {"scheme": "bf16"})
    for name in ("w4a8", "fp8", "mxfp4", "ptpc-fp8"):
        yield Case(name, "rescaled", {"scheme": name})
        yield Case(f"{name} --scales mse", "rescaled", {"scheme": name, "scales": "mse"})


@dataclass
class Text:
    """Documents as tokens, BOS first, with the UTF-8 bytes of what is predicted; and prompts to continue."""

    documents: list[list[int]]
    bytes: list[int]
    prompts: list[list[int]]


def load_text(path: Path, every: int, tokens: int) -> Text:
    """Documents shorter than two tokens are left out; prompts come from the others, spread over the file."""
    source = open_model(MODEL, with_weights=False)
    assert source.folder is not None, "nano is bundled with its tokenizer"
    vocabulary, bos = Vocabulary.from_file(source.folder / "tokenizer.json"), source.config.bos_token_id
    assert bos is not None, "nano's documents begin with BOS"
    everything = [vocabulary.encode(text) for text in read_documents(path)]
    chosen = [ids[:tokens] for ids in everything[::every] if len(ids) > 1]
    long = [ids for ids in everything if len(ids) >= PROMPT_TOKENS]
    spread = [long[i * len(long) // REQUESTS] for i in range(REQUESTS)]
    sizes = [sum(len(vocabulary.spelling(token)) for token in ids) for ids in chosen]
    return Text([[bos, *ids] for ids in chosen], sizes, [[bos, *ids[:PROMPT_TOKENS]] for ids in spread])


class Bench:
    """Measures cases one after the other; holds each model's baseline while its cases run."""

    def __init__(self, text: Text, folder: Path, answer_tokens: int) -> None:
        self.text, self.folder, self.answer_tokens = text, folder, answer_tokens
        self.sizes = torch.tensor(text.bytes, dtype=torch.float64)
        self.baseline: Reading | None = None
        self.answers: list[tuple[int, ...]] = []
        self.checkpoints: dict[str, str] = {"shipped": MODEL}
        self.identical: dict[str, Any] = {}

    def checkpoint(self, model: str) -> str:
        """The folder of a model, made when it is first asked for."""
        if model not in self.checkpoints:
            config = open_model(MODEL, with_weights=False).config
            change = Rescaling(config) if model == "rescaled" else None
            self.checkpoints[model] = str(plain_copy(MODEL, self.folder / model, change))
        return self.checkpoints[model]

    def compile(self, case: Case) -> tuple[Path, dict[str, Any]]:
        """The artifact, and its sizes."""
        path = self.folder / f"{case.model}-{case.name.replace(' ', '')}.atom"
        result = compile_model(self.checkpoint(case.model), "cpu", path, Options(dtype="float32", **case.options))
        assert result.program is not None
        state = facts.state_bytes(result.program, read_manifest(path).serving)
        return path, {
            "weight_bytes": facts.weights(result.program, result.regions).bytes,
            "weight_bytes_by_layout": weight_bytes(result.layouts),
            "state_bytes_per_request": state.request,
            "state_bytes_per_1024_tokens": state.per_1024_tokens,
        }

    def measure(self, case: Case, progress: Advance) -> dict[str, Any]:
        """A row of the table. A baseline's row has the figures that need no other."""
        path, row = self.compile(case)
        executor, _ = open_executor(path, max_requests=REQUESTS)
        if case.is_baseline:
            self.baseline = None  # of the model before: it holds gigabytes
        reading, distance = read(executor, self.text.documents, self.baseline, progress)
        answers = self.generate(executor)
        head = {"name": case.name, "model": case.model, "options": case.options, **row}
        if self.baseline is None:
            self.baseline, self.answers = reading, answers
            speed = reading.tokens / reading.seconds
            return head | {"bits_per_byte": bits_per_byte(reading, self.sizes), "tokens_per_cpu_second": speed}
        lengths = [agreement(a, b) for a, b in zip(self.answers, answers, strict=True)]
        greedy = {
            "greedy_mean": statistics.mean(lengths),
            "greedy_median": statistics.median(lengths),
            "greedy_whole": sum(length == self.answer_tokens for length in lengths),
        }
        return head | figures(reading, distance, self.baseline, self.sizes) | greedy

    def generate(self, executor: Executor) -> list[tuple[int, ...]]:
        """Greedy continuations of all prompts, end of sequence ignored."""
        params = SamplingParams(temperature=0.0, max_tokens=self.answer_tokens, ignore_eos=True)
        return [a.token_ids for a in LLM(executor).generate(self.text.prompts, params)]

    def check_copy(self) -> dict[str, Any]:
        """Whether dequantised weights, quantised anew, are what was shipped: `w4a8` of the copy against `native`."""
        native, _ = self.compile(Case("check", "shipped", {"scheme": "native"}))
        found: dict[str, Any] = {}
        for scales in ("amax", "mse"):
            copy, _ = self.compile(Case(f"check-{scales}", "same", {"scheme": "w4a8", "scales": scales}))
            found["weights"], found[f"different_{scales}"] = differing_weights(native, copy)
        return found


def run(bench: Bench, chosen: Sequence[Case]) -> list[dict[str, Any]]:
    """All rows, with a bar for the cases and one for the tokens of a case; Ctrl-C shows what there is and ends."""
    rows: list[dict[str, Any]] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as bars:
        all_cases, one = bars.add_task("cases", total=len(chosen)), bars.add_task("", total=None)
        try:
            for case in chosen:
                bars.reset(one, description=f"{case.model}: {case.name}", total=None)
                rows.append(bench.measure(case, lambda done, all_: bars.update(one, completed=done, total=all_)))
                bars.advance(all_cases)
        except KeyboardInterrupt:
            bars.stop()
            show(rows)
            raise SystemExit(130) from None
    return rows


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Empty, or why the run has failed."""
    native = next((r for r in rows if r["name"] == "native" and "loss" in r), None)
    if native is None or native["loss"] <= LIMIT:
        return ""
    return (
        f"native loses {native['loss']:.4f} ± {native['loss_error']:.4f} bits/byte to its own dequantised weights, "
        f"more than {LIMIT}"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="held-out text: .txt, .jsonl or .jsonl.xz")
    parser.add_argument("--every", type=int, default=3, help="take every so many documents")
    parser.add_argument("--tokens", type=int, default=2047, help="most tokens of a document")
    parser.add_argument("--answer-tokens", type=int, default=200, help="length of the greedy continuations")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these cases (and the baselines); writes nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quantization.json")
    parser.add_argument("--redraw", action="store_true", help="only write tables and picture again, from the JSON")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="folder of quantization.md")
    options = parser.parse_args()
    if not options.redraw and options.text is None:
        parser.error("give the text: --text FILE")
    return options


def described(options: argparse.Namespace, text: Text) -> dict[str, Any]:
    """What the rows belong to."""
    flags = f"--every {options.every} --tokens {options.tokens} --answer-tokens {options.answer_tokens}"
    config = open_model(MODEL, with_weights=False).config
    return {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/quantization.py --text {options.text.name} {flags}",
        "machine": machine(),
        "text": {
            "documents": len(text.documents), "tokens": sum(len(ids) - 1 for ids in text.documents),
            "bytes": sum(text.bytes), "prompts": len(text.prompts), "prompt_tokens": PROMPT_TOKENS,
            "answer_tokens": options.answer_tokens,
        },
        "layers": [config.layer_kind(layer).attention for layer in range(config.num_hidden_layers)],
    }  # fmt: skip


def write(folder: Path, result: dict[str, Any]) -> None:
    """The picture and the tables of the document."""
    write_picture(folder / "quantization_error.svg", result["rows"], result["layers"])
    write_document(folder / "quantization.md", result)


def main() -> int:
    """Measure, print, write; 1 if `native` loses too much."""
    options = parse()
    if options.redraw:
        result = json.loads(options.out.read_text(encoding="utf-8"))
        show(result["rows"])
        write(options.docs, result)
        return 0
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    chosen = [c for c in cases() if not options.only or c.name in options.only or c.is_baseline]
    try:
        text = load_text(options.text, options.every, options.tokens)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(text, Path(folder), options.answer_tokens)
            rows = run(bench, chosen)
            show(rows)
            failed = verdict(rows)
            if not options.only and not failed:
                result = described(options, text) | {"plain_copy": bench.check_copy(), "rows": rows}
                options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
                write(options.docs, result)
    except AtomcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if failed:
        print(f"error: {failed}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
