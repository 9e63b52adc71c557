"""Checking a whole checkpoint against its configuration: everything wrong is found and told in one error."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from atomc.errors import CheckpointError
from atomc.formats.scale import E8M0_NAN
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.reader import CheckpointReader
from atomc.models.deepseek_v4.schema import Entry, Storage, entries, stored_problem, stored_specs

_SUM_LINE = re.compile(r"(?P<hash>[0-9a-fA-F]{64})(?:\s+\*?(?P<file>\S.*))?")


def validate(
    reader: CheckpointReader,
    config: DeepseekV4Config,
    *,
    drafts: bool = True,
    values: bool = True,
    finite: bool = False,
    hashes: Mapping[str, str] | None = None,
) -> None:
    """Raise one `CheckpointError` that lists every fault of the checkpoint, by tensor and file, if there is any.

    Names, shapes and dtypes are always checked, without reading data. `drafts=False` lets `mtp.*` be absent. `values`
    reads scales (NaN E8M0, float scales that are not positive) and tid2eid (expert out of range); `finite` reads every
    float tensor for NaN and inf. Files are hashed (SHA-256) if `hashes` (file name -> hex digest) is given, or if the
    folder has `SHA256SUMS` or `*.sha256` files.
    """
    problems = list(reader.problems)
    present = [entry for entry in entries(config) if drafts or _has(reader, entry) or not entry.name.startswith("mtp.")]
    in_full = not any(entry.quantized and entry.scale_name in reader for entry in present)
    for entry in present:
        problems += _entry_problems(reader, entry, in_full)
    problems += _extra_tensors(reader, config)
    problems += _mixed_experts(reader, present)
    if values or finite:
        for entry in present:
            problems += _value_problems(reader, entry, config, values, finite)
    problems += _hash_problems(reader.folder, hashes)
    if problems:
        raise CheckpointError(str(reader.folder), problems)


def _has(reader: CheckpointReader, entry: Entry) -> bool:
    return entry.name in reader or entry.scale_name in reader


def _is_plain(reader: CheckpointReader, entry: Entry, in_full: bool) -> bool:
    """Whether a weight is meant to be stored in full; `in_full`: no weight of the checkpoint has scales."""
    if entry.scale_name in reader or entry.scale_name in reader.unreadable:
        return False
    if entry.name not in reader:
        return in_full
    return reader.spec(entry.name).dtype not in (torch.float8_e4m3fn, torch.int8)


def _entry_problems(reader: CheckpointReader, entry: Entry, in_full: bool) -> Iterator[str]:
    plain = entry.quantized and _is_plain(reader, entry, in_full)
    for name in [entry.name] if plain else stored_specs(entry):
        if name in reader:
            problem = stored_problem(entry, name, reader.spec(name), plain=plain)
            if problem is not None:
                yield f"{name} ({reader.where(name)}): {problem}"
        elif name not in reader.unreadable:
            yield f"{name}: is missing"


def _extra_tensors(reader: CheckpointReader, config: DeepseekV4Config) -> Iterator[str]:
    known = {name for entry in entries(config) for name in stored_specs(entry)}
    for name in reader:
        if name not in known:
            hint = ""
            if name.startswith("mtp.") and not config.num_draft_stages:
                hint = " (compress_ratios has no draft entry)"
            yield f"{name} ({reader.where(name)}): is not a tensor of this model{hint}"


def _mixed_experts(reader: CheckpointReader, present: list[Entry]) -> Iterator[str]:
    """Experts are stacked, so those of one layer must all be quantised or all be plain."""
    first: dict[str, tuple[str, Storage]] = {}
    for entry in present:
        layer, routed, _ = entry.name.partition("ffn.experts.")
        if not routed or entry.name not in reader:
            continue
        storage = reader.storage(entry.name)
        name, seen = first.setdefault(layer, (entry.name, storage))
        if storage != seen:
            yield f"{entry.name} ({reader.where(entry.name)}): is stored as {storage}, but {name} as {seen}"


def _value_problems(
    reader: CheckpointReader, entry: Entry, config: DeepseekV4Config, values: bool, finite: bool
) -> Iterator[str]:
    for name in stored_specs(entry):
        if name not in reader:
            continue
        is_scale, is_table = name != entry.name, entry.format == "i64"
        if not (values if is_scale or is_table else finite):
            continue
        try:
            tensor = reader.load(name)
        except CheckpointError as error:
            yield from error.problems
            continue
        experts = config.n_routed_experts
        problem = _table_problem(tensor, experts) if is_table else _number_problem(tensor, is_scale)
        if problem is not None:
            yield f"{name} ({reader.where(name)}): {problem}"


def _table_problem(table: Tensor, experts: int) -> str | None:
    bad = int(((table < 0) | (table >= experts)).sum())
    return f"{bad} entries are no expert index, 0 .. {experts - 1}" if bad else None


def _number_problem(tensor: Tensor, is_scale: bool) -> str | None:
    if tensor.dtype == torch.float8_e8m0fnu:
        bad = int((tensor.view(torch.uint8) == E8M0_NAN).sum())
        return f"{bad} of {tensor.numel()} scales are NaN (E8M0 byte 0xFF)" if bad else None
    if not tensor.dtype.is_floating_point:
        return None
    if tensor.dtype == torch.float8_e4m3fn:  # its only special codes are the two NaN
        bad = int((tensor.view(torch.uint8) & 0x7F == 0x7F).sum())
    else:
        bad = int((~tensor.isfinite()).sum())
    if bad:
        return f"{bad} of {tensor.numel()} values are NaN or infinite"
    if is_scale and bool((tensor <= 0).any()):
        return "has scales that are not positive"
    return None


def _hash_problems(folder: Path, given: Mapping[str, str] | None) -> Iterator[str]:
    expected = {name: (digest, "the given hashes") for name, digest in (given or {}).items()}
    for listing in [*sorted(folder.glob("*.sha256")), folder / "SHA256SUMS"]:
        if not listing.is_file():
            continue
        for line in filter(None, map(str.strip, listing.read_text(encoding="utf-8", errors="replace").splitlines())):
            match = _SUM_LINE.fullmatch(line)
            if match is None:
                yield f"{listing.name}: {line[:80]!r} is not a line of SHA-256 sums"
            else:
                expected.setdefault(match["file"] or listing.stem, (match["hash"], listing.name))
    for name, (digest, source) in expected.items():
        file = folder / name
        if not file.is_file():
            yield f"{name}: is listed in {source} but does not exist"
            continue
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != digest.lower():
            yield f"{name}: has SHA-256 {found}, {source} says {digest.lower()}"
