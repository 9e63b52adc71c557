"""Packing: the weights of a program, evaluated part by part into safetensors shards, so that neither the model nor one
stacked tensor is ever held whole, and so that a compile that was interrupted goes on where it stopped.

Terms:
    weight   a tensor of the artifact: its name, its recipe (instantiated), its shape and dtype.
    shard    one safetensors file of about `SHARD_BYTES`; a larger weight has a shard of its own.
    shelf    the folder `.NAME.packing` beside the output NAME, with the shards that are finished and the journal.
    journal  what the shelf's shards were made from (a fingerprint), and sha256 and size of each.

Two compiles to one output do not meet: the shelf belongs to who holds a lock on it, and another packs where only it
writes, without a shelf. The lock is the kernel's (flock), not a file with a process id: it ends with its holder however
that ends, and no id of another machine, container or later process can be mistaken for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Protocol

import msgspec
import safetensors
import torch
from torch import Tensor

import atomc
from atomc.artifact.facts import bytes_text
from atomc.artifact.manifest import FileEntry
from atomc.artifact.shards import ShardWriter, header, write_whole
from atomc.artifact.store import ArtifactError, absolute, encode, hash_file, unwritable
from atomc.errors import RecipeError
from atomc.recipes import Concat, Halves, Recipe, Stack, TensorSpec, evaluate, instantiate, output_spec, to_json

SHARD_BYTES: Final = 512 << 20
UNMAP_BYTES: Final = 256 << 20
MIB: Final = 1 << 20
JOURNAL: Final = "journal.json"
LOCK: Final = "lock"
Progress = Callable[[str, int, int], None]  # stage, done, total


class Source(Protocol):
    """Where recipes read from: a checkpoint of memory-mapped safetensors files, by tensor name."""

    files: tuple[Path, ...]

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor, without its data."""

    def load(self, name: str) -> Tensor:
        """The tensor; it may keep its file mapped."""

    def close(self) -> None:
        """Unmap the files; `load` maps them again."""


class Weight(NamedTuple):
    """A tensor of the artifact."""

    name: str
    recipe: Recipe
    spec: TensorSpec


@dataclass(frozen=True)
class Packed:
    """What packing did.

    Attributes:
        bytes, seconds: written by this run, and the time of reading, evaluating and writing that.
        shards: of the artifact. resumed: of these, taken over from an interrupted run.
        files: every shard's name, hash and size.
    """

    bytes: int
    seconds: float
    shards: int
    resumed: int
    files: Mapping[str, FileEntry] = field(repr=False)

    @property
    def mb_per_second(self) -> float:
        """10⁶ bytes a second; 0 if nothing was written."""
        return self.bytes / self.seconds / 1e6 if self.bytes else 0.0


class Journal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`journal.json` of a shelf."""

    fingerprint: str
    shards: dict[str, FileEntry]


# -- what is packed ----------------------------------------------------------------------------------------------------


def weights_of(
    calls: Iterable[tuple[str, str]], recipes: Mapping[str, Mapping[str, Recipe]], spec_of: Callable[[str], TensorSpec]
) -> list[Weight]:
    """The weights of a program, in the order of its calls.

    Args:
        calls: region and prefix of each. recipes: region -> weight name in the region -> recipe with `{prefix}`.
        spec_of: shape and dtype of a checkpoint tensor.
    Raises:
        RecipeError: a source does not fit, or a weight is made twice; names the weight.
    """
    weights: dict[str, Weight] = {}
    for region, prefix in calls:
        for local, template in recipes[region].items():
            name, recipe = prefix + local, instantiate(template, prefix)
            if name in weights:
                raise RecipeError(f"weight {name} is made twice; two calls of the program share the prefix {prefix!r}.")
            weights[name] = Weight(name, recipe, _spec(name, recipe, spec_of))
    return list(weights.values())


def _spec(name: str, recipe: Recipe, spec_of: Callable[[str], TensorSpec]) -> TensorSpec:
    try:
        return output_spec(recipe, spec_of)
    except RecipeError as error:
        raise RecipeError(f"weight {name}: {error.message}") from error


def plan_shards(weights: Iterable[Weight], shard_bytes: int = SHARD_BYTES) -> dict[str, list[Weight]]:
    """File name -> its weights. A shard ends before the weight that would make it larger than `shard_bytes`."""
    shards: list[list[Weight]] = []
    room = 0
    for weight in weights:
        if not shards or weight.spec.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(weight)
        room -= weight.spec.nbytes
    return {f"{number:05d}.safetensors": shard for number, shard in enumerate(shards, start=1)}


def parts(recipe: Recipe) -> Iterator[Recipe]:
    """Recipes whose results, one after the other in row-major order, are the data of `recipe`'s result."""
    if isinstance(recipe, Stack | Concat) and recipe.dim == 0:
        for part in recipe.parts:
            yield from parts(part)
    else:
        yield recipe


def fingerprint(shards: Mapping[str, Sequence[Weight]], files: Iterable[Path]) -> str:
    """sha256 of everything that decides the shards' bytes: recipes, plan, source files, code.

    Raises:
        ArtifactError: a source file cannot be read.
    """
    digest = hashlib.sha256(msgspec.json.encode([_code(), [_identity(file) for file in files]]))
    for name, shard in shards.items():
        digest.update(b"\n" + name.encode() + header({w.name: w.spec for w in shard}))
        for weight in shard:
            digest.update(b"\n" + weight.name.encode() + b"=" + to_json(weight.recipe))
    return digest.hexdigest()


def _identity(file: Path) -> tuple[str, int, int, str]:
    """Name, size, time of change and hash of the header: reading all data would take as long as packing them."""
    try:
        with file.open("rb") as stream:
            facts = os.fstat(stream.fileno())
            length = stream.read(8)
            head = stream.read(min(int.from_bytes(length, "little"), facts.st_size))
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error.strerror}); weights are packed from it.") from error
    return file.name, facts.st_size, facts.st_mtime_ns, hashlib.sha256(length + head).hexdigest()


def code_files(root: Path) -> list[Path]:
    """The modules of the package at `root` that decide a shard's bytes, given recipes and source files."""
    reading = ("reader", "hf_names", "shards", "schema")
    rooms = ("recipes/*.py", "formats/*.py", "artifact/shards.py", "calibration.py", "pack.py")
    return sorted(file for room in (*rooms, *(f"models/*/{name}.py" for name in reading)) for file in root.glob(room))


def _code() -> list[str]:
    """What evaluates recipes: versions, and the modules themselves, which change between versions in a checkout."""
    versions = [atomc.__version__, str(torch.__version__), safetensors.__version__]
    return [*versions, *(hash_file(file).sha256 for file in code_files(Path(atomc.__file__).parent))]


# -- packing -----------------------------------------------------------------------------------------------------------


class Packing:
    """The packing of one compile: `pack` fills the artifact's folder; the shelf is kept if the block fails, else gone.

    The block ends when the artifact is in its place, so that an error after `pack` costs no shard either. A note on the
    error says what is kept, and where.
    """

    def __init__(self, output: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._output, self._shard_bytes = absolute(output), shard_bytes
        self._shelf: Shelf | None = None

    def __enter__(self) -> Packing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._shelf is None and error is None and shelf_of(self._output).exists():
            self._shelf = Shelf.claim(shelf_of(self._output))  # of an earlier compile: this one, without weights, won
        if self._shelf is None:
            return
        found = self._shelf.found() if self._shelf.lock is not None else []
        if error is not None and found:
            size = bytes_text(sum(file.stat().st_size for file in found))
            kept = f"{shards_text(len(found))} of finished weights ({size}) in {self._shelf.folder}"
            error.add_note(f"kept: {kept}; the same compile goes on from there.")
        self._shelf.release(keep=error is not None)

    def pack(
        self, source: Source, weights: Sequence[Weight], folder: Path, progress: Progress = lambda *_: None
    ) -> Packed:
        """Write `weights` into shards in the new folder `folder`, or take over those that are there from before.

        Args:
            folder: below the folder that becomes the artifact, on the same disk as the output.
            progress: called with MiB done and in all, at least once for every part of a weight.
        Raises:
            ArtifactError: the disk is full or cannot be written. CheckpointError: a source cannot be read.
            RecipeError: a source does not fit. Shards that are whole stay for the next run.
        """
        shards = plan_shards(weights, self._shard_bytes)
        folder.mkdir()
        shelf = self._shelf = Shelf.claim(shelf_of(self._output)) or Shelf(folder.with_name(".packing"), None)
        shelf.open(fingerprint(shards, source.files))
        packed = _Packer(source, shelf, progress, shards).run()
        for name in shards:
            shelf.hand_over(name, folder / name)
        if shelf.lock is None:
            shelf.release(keep=False)  # it lies in the artifact
        return packed


class _Packer:
    """One run over all shards."""

    def __init__(self, source: Source, shelf: Shelf, progress: Progress, shards: Mapping[str, list[Weight]]) -> None:
        self._source, self._shelf, self._progress, self._shards = source, shelf, progress, shards
        self._total = sum(w.spec.nbytes for shard in shards.values() for w in shard)
        self._done = 0  # of `_total`
        self._unread = UNMAP_BYTES  # until the files are unmapped
        self._name = ""
        self._halves = Halves(())

    def run(self) -> Packed:
        files = {name: entry for name in self._shards if (entry := self._finished(name))}
        resumed = len(files)
        if resumed:
            self._say(f"{shards_text(resumed)} taken over")
        missing = {name: shard for name, shard in self._shards.items() if name not in files}
        self._shelf.check_room(sum(w.spec.nbytes for shard in missing.values() for w in shard))
        self._halves = Halves(weight.recipe for shard in missing.values() for weight in shard)
        start = time.perf_counter()
        made = {name: self._make(name, shard) for name, shard in missing.items()}
        self._source.close()
        seconds, size = time.perf_counter() - start, sum(entry.bytes for entry in made.values())
        files |= made
        return Packed(size, seconds, len(files), resumed, {name: files[name] for name in self._shards})

    def _finished(self, name: str) -> FileEntry | None:
        """A shard of an earlier run that is what the journal says."""
        if name in self._shelf.journal.shards:
            self._say(f"checking {name} of an earlier run")
        entry = self._shelf.finished(name)
        if entry is not None:
            self._done += sum(w.spec.nbytes for w in self._shards[name])
        return entry

    def _make(self, name: str, shard: list[Weight]) -> FileEntry:
        recipes = {w.name: w.recipe for w in shard}
        with ShardWriter(self._shelf.folder / name, {w.name: w.spec for w in shard}, self._wrote) as writer:
            for weight in writer.names:
                self._name = weight
                for part in parts(recipes[weight]):
                    writer.write(weight, self._evaluate(part))
            entry = writer.finish()
        self._shelf.record(name, entry)
        return entry

    def _evaluate(self, part: Recipe) -> Tensor:
        try:
            return evaluate(part, self._load, self._halves)
        except RecipeError as error:
            raise RecipeError(f"weight {self._name}: {error.message}") from error

    def _load(self, name: str) -> Tensor:
        """The pages that were read of a mapped file count as this process's memory until it is unmapped."""
        if self._unread <= 0:
            self._source.close()
            self._unread = UNMAP_BYTES
        tensor = self._source.load(name)
        self._unread -= tensor.nbytes
        return tensor

    def _wrote(self, size: int) -> None:
        self._done += size
        self._say(self._name)

    def _say(self, what: str) -> None:
        self._progress(f"pack (MiB) {what}", -(-self._done // MIB), -(-self._total // MIB))


# -- shelves -----------------------------------------------------------------------------------------------------------


def shelf_of(output: Path) -> Path:
    """The folder of finished shards beside an output."""
    output = absolute(output)
    return output.with_name(f".{output.name}.packing")


def shards_text(count: int) -> str:
    """`1 shard`, `2 shards`."""
    return f"{count} shard{'' if count == 1 else 's'}"


class Shelf:
    """A folder that holds whole shards, the journal of them, and for a moment the shard that is being written."""

    def __init__(self, folder: Path, lock: int | None) -> None:
        self.folder, self.lock = folder, lock
        self.journal = Journal("", {})

    @classmethod
    def claim(cls, folder: Path) -> Shelf | None:
        """The shelf at `folder`, locked; None if another compile holds it, or it cannot be locked there."""
        for _ in range(100):  # each time another compile has ended meanwhile and removed it
            try:
                folder.mkdir(exist_ok=True)
                lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue
            except OSError:
                return None
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), (folder / LOCK).stat()):
                    return cls(folder, lock)
            except FileNotFoundError:
                pass
            except OSError:
                os.close(lock)
                return None
            os.close(lock)
        return None

    def open(self, mark: str) -> None:
        """Keep what an earlier run with the fingerprint `mark` has finished; remove everything else."""
        self.journal = Journal(mark, {})
        try:
            self.folder.mkdir(exist_ok=True)
            with suppress(FileNotFoundError, msgspec.MsgspecError):
                found = msgspec.json.decode((self.folder / JOURNAL).read_bytes(), type=Journal)
                if found.fingerprint == mark:
                    self.journal = found
            for file in self.folder.iterdir():
                if file.name not in (LOCK, *self.journal.shards):
                    file.unlink()
        except OSError as error:
            raise unwritable(self.folder, error) from error
        self._write_journal()

    def finished(self, name: str) -> FileEntry | None:
        """A shard that an earlier run has finished, if its bytes are still those; else it is removed."""
        entry, file = self.journal.shards.get(name), self.folder / name
        with suppress(OSError):
            if entry is not None and file.stat().st_size == entry.bytes and hash_file(file) == entry:
                return entry
        self.journal.shards.pop(name, None)
        file.unlink(missing_ok=True)
        return None

    def check_room(self, size: int) -> None:
        """Whether the disk holds `size` more bytes: better said before hours of packing."""
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise ArtifactError(
                f"cannot write {self.folder.parent}: {size:,} bytes of weights do not fit into the {free:,} that are "
                "free. Free disk space or choose another output path."
            )

    def record(self, name: str, entry: FileEntry) -> None:
        """Note a shard that is finished."""
        self.journal.shards[name] = entry
        self._write_journal()

    def _write_journal(self) -> None:
        write_whole(self.folder / JOURNAL, encode(self.journal))

    def hand_over(self, name: str, to: Path) -> None:
        """Put a shard into the artifact without copying it: it stays here too, until the artifact is in its place."""
        try:
            try:
                os.link(self.folder / name, to)
            except OSError:  # a disk without hard links
                (self.folder / name).rename(to)
        except OSError as error:
            raise unwritable(to, error) from error

    def found(self) -> list[Path]:
        """The finished shards that lie here."""
        return list(self.folder.glob("*.safetensors"))

    def release(self, keep: bool) -> None:
        """Leave the shelf to the next compile, or remove it; one without a finished shard is always removed."""
        try:
            if not keep or not self.found():
                self._remove()
        finally:
            if self.lock is not None:
                os.close(self.lock)
                self.lock = None

    def _remove(self) -> None:
        """First out of the way: who claims the place now begins a new shelf, and nothing of it is removed."""
        output = self.folder.name.removesuffix(".packing")
        away = self.folder.with_name(f"{output}.{os.getpid()}.{self.lock}.packing.partial")
        with suppress(OSError):
            shutil.rmtree(self.folder.rename(away), ignore_errors=True)
