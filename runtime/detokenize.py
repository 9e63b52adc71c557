"""From tokens to text, one token at a time: never half a character, never a stop string or a part of one.

Works on bytes: V4's tokenizer is byte-level BPE, so a token is a byte string, characters may straddle tokens, and the
text of an answer is the UTF-8 decoding of the joined bytes. This is exact, costs the same for every token, and holds
back at most three bytes; decoding growing lists of tokens and comparing texts is none of that.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from atomc.errors import AtomcError


class TokenizerError(AtomcError):
    """The artifact's tokenizer is missing, damaged, or not a byte-level one."""


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, other bytes for code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE = _byte_of_character()


class Vocabulary:
    """The artifact's tokenizer: text to ids, and each id's bytes. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise TokenizerError(
                f"The tokenizer's decoder is {tokenizer.decoder!r}; atomc serves byte-level BPE tokenizers (ByteLevel)."
            )
        self.tokenizer = tokenizer
        added: dict[int, Any] = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_file(cls, path: Path) -> Vocabulary:
        """Reads a tokenizer.json; raises `TokenizerError` naming the file."""
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception for every reason
            raise TokenizerError(f"Cannot read the tokenizer {path}: {error}") from error
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; the spelling of a special token becomes that token. No BOS is added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of whole ids; special tokens have none, broken UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; special tokens and ids without an entry stand for none."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = b"" if token in self._special else self.spelling(token)
        return found

    def spelling(self, token: int) -> bytes:
        """The bytes of any token, special ones spelled out; nothing for an id without an entry."""
        piece: str = self.tokenizer.id_to_token(token) or ""
        try:
            return bytes([_BYTE[character] for character in piece])
        except KeyError:  # an added token is stored as plain text
            return piece.encode()


class Detokenizer:
    """The text of one answer. `push` each token, `finish` once at the end; `stopped` after a stop string was found."""

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str] = ()) -> None:
        self._vocabulary = vocabulary
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after this token; nothing once a stop string was found."""
        return self._advance(self._decoder.decode(self._vocabulary.token_bytes(token)))

    def finish(self) -> str:
        """The text still held back: the answer ends here, so nothing can become a stop string any more."""
        text = self._advance(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _advance(self, new: str) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            return new
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = len(text) - max(_overlap(text, stop) for stop in self._stops)
        self._held = text[keep:]
        return text[:keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
