"""Sizes as a user types them."""

from __future__ import annotations

import re

from atomc.cli.failure import OptionError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: str | None, option: str) -> int | None:
    """`8G`, `512MiB`, `1.5g`, or a number of bytes. Raises `OptionError`."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if found is None or not (size := int(float(found[1]) * _UNITS[found[2].upper()])):
        raise OptionError(f"{option} {text}: give a size such as 8G, 512M or 1.5GiB.")
    return size
