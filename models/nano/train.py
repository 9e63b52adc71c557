"""Train deepseek-v4-nano: `python -m atomc.models.nano.train --text data/text --run runs/nano --minutes 16`.

One clock rules the run: progress = training time used / `--minutes` (or step / `--steps`). Learning rates, the switch
from dense compressed rows to the indexer's top-k, and simulated quantisation all follow it. `--stop-after` or SIGTERM
ends a process early; the next one resumes from `--run` and continues the same schedule.
"""

import importlib
import json
import math
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor

from atomc.models.nano.config import NanoConfig
from atomc.models.nano.data import Validation, load_corpus, load_validation
from atomc.models.nano.trainer import QUANTIZED_FROM, Settings, Trainer

CHECKPOINT = "checkpoint.pt"


class Loop:
    """Drives a trainer against the clock, reports, evaluates and saves."""

    def __init__(self, trainer: Trainer, validation: Validation, run: Path, stop_after: float, eval_every: int) -> None:
        self.trainer, self.validation, self.run = trainer, validation, run
        self.deadline, self.eval_every, self.stopped = time.monotonic() + stop_after, eval_every, False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopped", True))

    def train(self, log_every: int) -> bool:
        """True once the schedule has ended, False if the process has to stop before."""
        state = self.trainer.state
        losses: list[Tensor] = []
        self.trainer.step().tolist()  # compiles; its time is not training time
        clock = time.monotonic()
        while self.trainer.progress < 1 and not self.stopped and time.monotonic() < self.deadline:
            losses.append(self.trainer.step())
            if state.step % log_every == 0:
                mean = torch.stack(losses).mean(0).tolist()
                now = time.monotonic()
                # Progress must not jump: whatever else took time (an evaluation, a compilation) is left out.
                state.seconds += now - clock
                self._log(mean, len(losses), now - clock)
                losses, clock = [], now
                if state.step % self.eval_every == 0:
                    self._validate()
                    self.trainer.save(self.run / CHECKPOINT)
                    clock = time.monotonic()
        state.seconds += time.monotonic() - clock
        return self.trainer.progress >= 1

    def _bits(self, nats: float) -> float:
        return nats / math.log(2) / self.trainer.corpus.bytes_per_token

    def _log(self, mean: list[float], steps: int, seconds: float) -> None:
        t = self.trainer
        tokens = steps * t.settings.batch * t.settings.context
        left = t.seconds_left(seconds / steps)
        row = {"step": t.state.step, "progress": round(t.progress, 4), "train": round(self._bits(mean[0]), 4),
               "mtp": round(self._bits(mean[1]), 4), "index_kl": round(mean[2], 4)}  # fmt: skip
        t.state.history.append(row)
        typer.echo(
            f"step {t.state.step:6d} {t.progress:6.1%} | train {row['train']:.4f} mtp {row['mtp']:.4f} bits/byte | "
            f"index KL {row['index_kl']:.3f} | {tokens / seconds / 1e3:.0f}k tokens/s | {left:.0f} s left"
        )

    def _validate(self) -> None:
        t = self.trainer
        report = t.evaluate(self.validation, t.progress >= QUANTIZED_FROM)
        t.state.history[-1]["val"] = round(report.bits_per_byte, 4)
        domains = " ".join(f"{name} {bits:.4f}" for name, bits in report.by_domain.items())
        typer.echo(f"step {t.state.step:6d} val {report.bits_per_byte:.4f} bits/byte | {domains}")


def write_results(trainer: Trainer, validation: Validation, path: Path) -> None:
    """`loss.json`: settings, history, and the final validation in bf16 and as shipped."""
    modes = {"bf16": False, "shipped": True}
    reports = {name: asdict(trainer.evaluate(validation, quantized)) for name, quantized in modes.items()}
    context = trainer.settings.context
    count = len(validation.windows)
    method = f"All {count} half-overlapping windows of {context} tokens of single documents, each token scored once."
    tokens = trainer.state.step * trainer.settings.batch * trainer.settings.context
    facts = {"settings": asdict(trainer.settings), "steps": trainer.state.step, "tokens": tokens,
             "seconds": round(trainer.state.seconds, 1), "corpus_tokens": len(trainer.corpus.tokens),
             "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
             "validation": {"method": method, **reports}, "history": trainer.state.history}  # fmt: skip
    path.write_text(json.dumps(facts) + "\n")
    for name, report in reports.items():
        typer.echo(f"val {report['bits_per_byte']:.4f} bits/byte ({name}) {report['by_domain']}")


def main(
    text: Annotated[Path, typer.Option(help="Folder with train.jsonl.xz, val.jsonl.xz and bpe8192.json.")],
    run: Annotated[Path, typer.Option(help="Folder of this run; resumed if it holds a checkpoint.")],
    minutes: Annotated[float | None, typer.Option(help="Training time of the whole schedule.")] = None,
    steps: Annotated[int | None, typer.Option(help="Length of the schedule in steps.")] = None,
    stop_after: Annotated[float, typer.Option(help="Seconds after which this process saves and ends.")] = math.inf,
    batch: int = 32,
    context: int = 2048,
    lr_scale: float = 1.0,
    weight_decay: float = 0.1,
    seed: int = 0,
    log_every: int = 50,
    eval_every: int = 1000,
    resume: Annotated[bool, typer.Option("--resume", help="Fail if there is no checkpoint to resume.")] = False,
    compiled: Annotated[bool, typer.Option("--compile/--eager")] = True,
) -> None:
    """Train until the schedule ends, then write `loss.json` and the checkpoint to `--run`."""
    if minutes is None and steps is None:
        raise typer.BadParameter("give --minutes or --steps")
    checkpoint = run / CHECKPOINT
    if resume and not checkpoint.exists():
        raise typer.BadParameter(f"nothing to resume: {checkpoint} does not exist")
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        importlib.import_module("atomc.models.nano.sinkhorn_cuda")  # registers the operator
    torch.set_float32_matmul_precision("high")
    run.mkdir(parents=True, exist_ok=True)
    config, tokenizer = NanoConfig(), Tokenizer.from_file(str(text / "bpe8192.json"))
    corpus = load_corpus(text / "train.jsonl.xz", tokenizer, config, device)
    validation = load_validation(text / "val.jsonl.xz", tokenizer, config, context)
    settings = Settings(batch, context, minutes, steps, lr_scale, weight_decay, seed)
    trainer = Trainer(settings, config, corpus, device, compiled)
    if checkpoint.exists():
        trainer.load(checkpoint)
    typer.echo(f"{len(corpus.tokens) / 1e6:.1f} M tokens ready after {time.monotonic() - started:.0f} s")
    loop = Loop(trainer, validation, run, stop_after - (time.monotonic() - started), eval_every)
    finished = loop.train(log_every)
    trainer.save(checkpoint)
    write_results(trainer, validation, run / "loss.json")
    sys.exit(0 if finished else 75)


if __name__ == "__main__":
    typer.run(main)
