"""The model card: what was trained on what, for how long, how good it got, and what it writes.

`python -m atomc.models.nano.card --folder models/nano/deepseek-v4-nano --text data/text`; the folder holds `loss.json`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor

from atomc.models.nano.config import CSA_RATIO, NanoConfig
from atomc.models.nano.data import DOMAIN_SHARE, Validation, load_validation
from atomc.models.nano.dense import forward
from atomc.models.nano.evaluate import Model, index_recall
from atomc.models.nano.export import read_checkpoint
from atomc.models.nano.generate import greedy
from atomc.models.nano.plot import line_chart
from atomc.models.nano.trainer import COOLDOWN_FROM, DENSE_UNTIL, QUANTIZED_FROM

PROMPTS = (
    "def fibonacci(n):\n",
    "The CREATE INDEX command",
    'class Matrix:\n    """',
    "To install the module, ",
    "Fellow citizens of the Senate",
)
SAMPLE_TOKENS = 80
PROBE_WINDOWS = 4


def _full_windows(validation: Validation, count: int) -> Tensor:
    """Windows spread over the validation set that lie inside one document to their end."""
    full = validation.windows[validation.scored[:, -1]]
    return full[torch.linspace(0, len(full) - 1, count).long()]


def draft_acceptance(weights: Mapping[str, Tensor], rows: Tensor, config: NanoConfig) -> float:
    """How often the MTP block's first choice is the main model's, given the same text: one drafted token, greedy."""
    ids_BT, next_BT = rows[:, :-2], rows[:, 1:-1]
    out = forward(weights, ids_BT, next_BT, config, torch.tensor(False))
    main, draft = ((x_BTD @ weights["head"].T).argmax(-1) for x_BTD in (out.x_BTD, out.x_mtp_BTD))
    return (draft[:, :-1] == main[:, 1:]).double().mean().item()


def _schedule_note(progress: float) -> str:
    if progress >= 1:
        return f"Quantisation was simulated from {QUANTIZED_FROM:.0%} of the schedule on."
    rate = min(1.0, (1 - progress) / (1 - COOLDOWN_FROM))
    note = f"The run ended at {progress:.0%} of its schedule, the learning rate at {rate:.0%} of its peak."
    if progress >= QUANTIZED_FROM:
        return note
    return f"{note} Quantisation was to be simulated\nfrom {QUANTIZED_FROM:.0%} on; these were rounded afterwards."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _quality(validation: dict[str, Any]) -> str:
    rows = []
    for label, key in (("bf16 weights", "bf16"), ("as shipped (FP8 and FP4 weights)", "shipped")):
        report = validation[key]
        by_domain = (f"{report['by_domain'][name]:.4f}" for name in DOMAIN_SHARE)
        rows.append((label, f"**{report['bits_per_byte']:.4f}**", *by_domain))
    return _table(("validation, bits/byte", "all", *DOMAIN_SHARE), rows)


def _balance(config: NanoConfig, expert_share: list[list[float]]) -> str:
    rows = [
        (f"`{prefix}`", f"{min(share):.1%}", f"{max(share):.1%}")
        for (prefix, _), share in zip(config.blocks, expert_share, strict=False)
    ]
    return _table(("tokens per expert", "least used", "most used"), rows)


def _samples(weights: Mapping[str, Tensor], config: NanoConfig, tokenizer: Tokenizer) -> str:
    prompts = [[config.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False).ids] for prompt in PROMPTS]
    answers = greedy(weights, config, prompts, SAMPLE_TOKENS)
    texts = [prompt + tokenizer.decode(ids) for prompt, ids in zip(PROMPTS, answers, strict=True)]
    return "\n\n".join(f"```\n{text.rstrip()}\n```" for text in texts)


def write_chart(facts: dict[str, Any], path: Path) -> None:
    """Training and validation bits/byte over tokens."""
    per_step = facts["settings"]["batch"] * facts["settings"]["context"] / 1e6
    history = facts["history"]
    series = {
        "training batches": [(row["step"] * per_step, row["train"]) for row in history],
        "validation": [(row["step"] * per_step, row["val"]) for row in history if "val" in row],
        "training, MTP block": [(row["step"] * per_step, row["mtp"]) for row in history],
    }
    path.write_text(line_chart(series, "deepseek-v4-nano: bits per byte", "M tokens", 100, (0.8, 1.6), 0.1))


def card_fields(folder: Path, text: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The values of `card_template.md`: from loss.json, and measured on the weights as shipped."""
    config, weights = read_checkpoint(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model, validation = Model.create(config, compiled=False), facts["validation"]
    rows = _full_windows(load_validation(text / "val.jsonl.xz", tokenizer, config, 2048), PROBE_WINDOWS)
    with torch.no_grad():
        recall, accepted = index_recall(model, weights, rows), draft_acceptance(weights, rows, config)
    return {
        "c": config,
        "parameters": sum(value.numel() for value in weights.values() if value.is_floating_point()) / 1e6,
        "megabytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6,
        "kinds": ", ".join(config.kind(layer).upper() for layer in range(config.num_hidden_layers)),
        "selects_from": CSA_RATIO * (config.index_topk + 1),
        "quality": _quality(validation),
        "method": validation["method"],
        "recall": ", ".join(f"{value:.1%} in `{prefix}`" for prefix, value in recall.items()),
        "accepted": accepted,
        "balance": _balance(config, validation["shipped"]["expert_share"]),
        "settings": facts["settings"],
        "steps": facts["steps"],
        "tokens": facts["tokens"] / 1e6,
        "epochs": facts["tokens"] / facts["corpus_tokens"],
        "minutes": facts["seconds"] / 60,
        "device": facts["device"],
        "speed": facts["tokens"] / facts["seconds"] / 1e3,
        "dense_until": DENSE_UNTIL,
        "schedule": _schedule_note(facts["history"][-1]["progress"]),
        "corpus": facts["corpus_tokens"] / 1e6,
        "sample_tokens": SAMPLE_TOKENS,
        "samples": _samples(weights, config, tokenizer),
    }


def main(
    folder: Annotated[Path, typer.Option(help="Exported checkpoint folder with loss.json.")],
    text: Annotated[Path, typer.Option(help="Folder with val.jsonl.xz.")],
) -> None:
    """Write README.md and loss.svg."""
    facts: dict[str, Any] = json.loads((folder / "loss.json").read_text())
    write_chart(facts, folder / "loss.svg")
    template = Path(__file__).with_name("card_template.md").read_text()
    (folder / "README.md").write_text(template.format(**card_fields(folder, text, facts)))


if __name__ == "__main__":
    typer.run(main)
