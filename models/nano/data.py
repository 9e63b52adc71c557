"""Text: documents by source, drawn as crops in the training mix; validation windows with exact byte counts.

A document becomes `BOS tokens EOS`; a source is the concatenation of its documents, and crops run across documents.
"""

import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from atomc.models.nano.config import NanoConfig

PROSE = ("sotu", "shakespeare", "web-bible", "jargon", "moby-dick", "wordnet", "factbook")
DOMAIN_SHARE = {"technical": 0.40, "python": 0.35, "prose": 0.25}
# Large but monotonous sources count for less within their domain.
SOURCE_FACTOR = {"py-stdlib-test": 0.5, "py-sympy": 0.5, "factbook": 0.5, "wordnet": 1 / 3}

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Document:
    """`source` is the first component of the document's id."""

    source: str
    text: str


def read_documents(path: Path) -> list[Document]:
    """`{"id": "source/...", "text": ...}` lines, xz-compressed."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Document(row["id"].split("/")[0], row["text"]) for row in rows]


def domain(source: str) -> str:
    """A key of `DOMAIN_SHARE`."""
    return "prose" if source in PROSE else "python" if source.startswith("py-") else "technical"


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer, config: NanoConfig) -> list[np.ndarray]:
    """`uint16` ids per document, with BOS and EOS."""
    encodings = tokenizer.encode_batch_fast([document.text for document in documents], add_special_tokens=False)
    return [np.array([config.bos_token_id, *e.ids, config.eos_token_id], dtype=np.uint16) for e in encodings]


@dataclass(frozen=True)
class Corpus:
    """All training tokens, sources one after the other. `share_S` is the probability of each source."""

    tokens: Tensor
    start_S: np.ndarray
    length_S: np.ndarray
    share_S: np.ndarray
    bytes_per_token: float

    def crops(self, first: int, count: int, length: int) -> Tensor:
        """Crops number `first` to `first + count` of the training order, `[count, length]` int64.

        A golden-ratio sequence over the mix visits every source and every place of it evenly, at every time scale,
        without any state to keep: each batch is a stratified sample, and an epoch repeats no crop of the last.
        """
        u = (np.arange(first, first + count, dtype=np.float64) * _GOLDEN) % 1.0
        edge = np.concatenate([[0.0], np.cumsum(self.share_S)])
        source = np.clip(np.searchsorted(edge, u, side="right") - 1, 0, len(self.share_S) - 1)
        within = (u - edge[source]) / self.share_S[source]
        start = self.start_S[source] + (within * (self.length_S[source] - length)).astype(np.int64)
        device = self.tokens.device  # only the starts travel: a small copy does not make the host wait
        index = torch.from_numpy(start).to(device)[:, None] + torch.arange(length, device=device)
        return self.tokens[index].long()

    def token_counts(self, vocab_size: int) -> Tensor:
        """Expected frequency of each token in the mix, scaled to the corpus size."""
        counts = torch.zeros(vocab_size, dtype=torch.float64)
        for start, length, share in zip(self.start_S, self.length_S, self.share_S, strict=True):
            source = self.tokens[start : start + length].long()
            counts += torch.bincount(source, minlength=vocab_size).cpu() * (share * len(self.tokens) / length)
        return counts


def source_shares(bytes_of_source: dict[str, int]) -> dict[str, float]:
    """Within a domain, sources share by bytes times their factor."""
    weight = {source: size * SOURCE_FACTOR.get(source, 1.0) for source, size in bytes_of_source.items()}
    total = {name: sum(w for source, w in weight.items() if domain(source) == name) for name in DOMAIN_SHARE}
    return {source: DOMAIN_SHARE[domain(source)] * w / total[domain(source)] for source, w in weight.items()}


def load_corpus(path: Path, tokenizer: Tokenizer, config: NanoConfig, device: torch.device) -> Corpus:
    """Tokenise all documents of a file, with the shares of the training mix."""
    documents = sorted(read_documents(path), key=lambda document: document.source)
    ids = tokenize(documents, tokenizer, config)
    size: dict[str, int] = {}
    length: dict[str, int] = {}
    for document, tokens in zip(documents, ids, strict=True):
        size[document.source] = size.get(document.source, 0) + len(document.text.encode())
        length[document.source] = length.get(document.source, 0) + len(tokens)
    shares = source_shares(size)
    length_S = np.array(list(length.values()), dtype=np.int64)
    bytes_per_token = 1 / sum(shares[source] * length[source] / size[source] for source in size)
    return Corpus(
        tokens=torch.from_numpy(np.concatenate(ids).astype(np.int32)).to(device),
        start_S=np.cumsum(length_S) - length_S,
        length_S=length_S,
        share_S=np.array([shares[source] for source in length]),
        bytes_per_token=bytes_per_token,
    )


@dataclass(frozen=True)
class Validation:
    """Half-overlapping windows `[n, context + 2]` of documents; `scored` `[n, context]` marks each target once."""

    windows: Tensor
    scored: Tensor
    domain_of_window: list[str]
    bytes_of_domain: dict[str, int]


def load_validation(path: Path, tokenizer: Tokenizer, config: NanoConfig, context: int) -> Validation:
    """Every token but BOS is scored once, with at least `context / 2` tokens before it where the document has them."""
    documents = read_documents(path)
    windows, scored, domains, size = [], [], [], dict.fromkeys(DOMAIN_SHARE, 0)
    for document, ids in zip(documents, tokenize(documents, tokenizer, config), strict=True):
        size[domain(document.source)] += len(document.text.encode())
        targets = len(ids) - 1
        for begin in range(0, max(targets - context // 2, 1), context // 2):
            window = np.full(context + 2, config.eos_token_id, dtype=np.int64)
            piece = ids[begin : begin + context + 2]
            window[: len(piece)] = piece
            position = np.arange(context)
            mask = (position < targets - begin) & ((position >= context // 2) | (begin == 0))
            windows.append(window)
            scored.append(mask)
            domains.append(domain(document.source))
    return Validation(torch.from_numpy(np.stack(windows)), torch.from_numpy(np.stack(scored)), domains, size)
