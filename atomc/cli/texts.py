"""The documents that `atomc eval` and `atomc calibrate` read from a file."""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from atomc.cli.failure import OptionError


class _Line(msgspec.Struct):
    text: str


def read_documents(path: Path) -> Iterator[str]:
    """.txt is one document; .jsonl and .jsonl.xz are one a line. Raises `OptionError` that names file and place."""
    if not path.name.endswith((".txt", ".jsonl", ".jsonl.xz")):
        raise OptionError(f"FILE {path}: give a .txt, .jsonl or .jsonl.xz file.")
    try:
        data = path.read_bytes()
        data = lzma.decompress(data) if path.suffix == ".xz" else data
        text = data.decode()
    except OSError as error:
        raise OptionError(f"FILE {path} cannot be read: {error.strerror}.") from error
    except lzma.LZMAError as error:
        raise OptionError(f"FILE {path} is no whole xz file: {error}.") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"FILE {path} is not UTF-8 at byte {error.start}.") from error
    if path.suffix == ".txt":
        yield text
        return
    decoder = msgspec.json.Decoder(_Line)
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            try:
                document = decoder.decode(line)
            except msgspec.MsgspecError as error:
                raise OptionError(f'FILE {path}, line {number} is not {{"text": ...}}: {error}.') from error
            yield document.text


def limited(documents: Iterable[str], limit: int | None) -> Iterator[str]:
    """Documents up to `limit` bytes in all; the last is cut where a character begins."""
    for text in documents:
        if limit is None:
            yield text
            continue
        data = text.encode()
        if kept := text if len(data) <= limit else data[:limit].decode(errors="ignore"):
            yield kept
        limit -= len(data)
        if limit <= 0:
            return


def pieces(documents: Iterable[str], length: int) -> Iterator[str]:
    """Documents cut into pieces of `length` characters; what is left at an end is a piece if it is half as long."""
    for text in documents:
        for at in range(0, len(text), length):
            piece = text[at : at + length]
            if at == 0 or 2 * len(piece) >= length:
                yield piece
