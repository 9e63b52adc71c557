"""A byte-level BPE tokenizer like V4's, built on the spot: 256 bytes, a few merges, V4's chat tokens."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
CHAT_TOKENS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>")
TEXT = ("the theory of the thing is that there is the other thing", "hello world, hello there", "def f(x): return x")


def byte_tokenizer() -> Tokenizer:
    """Ids 0, 1, 2 are BOS, EOS and padding (special, as in V4); the chat tokens are added but not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in CHAT_TOKENS])
    return tokenizer


def write_tokenizer(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    byte_tokenizer().save(str(path))
    return path
