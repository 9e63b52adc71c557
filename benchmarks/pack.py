"""Memory, speed and interruption of packing one full-width layer of DeepSeek-V4-Flash (CSA, top-k MoE).

    OMP_NUM_THREADS=1 python benchmarks/pack.py [--folder FOLDER] [--repeat 2] [--out benchmarks/results/pack.json]

A synthetic checkpoint of the layer's official tensors is made in a temporary folder and packed by the recipes that the
compiler makes for it: a release (3.6 GB of random bytes) under `native`, every tensor as it is stored, the experts
stacked; then the same layer in bf16 (13 GB of normal values) under `w4a8`, quantised on the way to FP8 tiles and MXFP4,
with scales from amax and of the least squared error. Each packing runs in a process of its own. Peak memory is its
largest resident set above that after its imports; mapped pages of the checkpoint count. "cold" reads from the disk,
"warm" from the page cache. Packing of the release is also interrupted midway, by SIGINT and by SIGKILL; what is left is
compared with its journal, and packing goes on. Needs 21 GB of disk for the while. Ends with 1, and the stored figures
stay, if a peak is above the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does, before torch is imported

from machine import machine

LAYER = "layers.4."
LIMIT_BYTES = 3 << 29  # 1.5 GiB
SOURCE_SHARD = 1 << 30


# -- in a process of its own -------------------------------------------------------------------------------------------


def model_config(stored: str) -> Any:
    """Flash's configuration, as it is released or in bf16."""
    from atomc.models.bundled import bundled_path
    from atomc.models.deepseek_v4.config import load_config

    config = load_config(bundled_path("deepseek-v4-flash"))
    return config if stored == "release" else replace(config, quantized=False)


def make_checkpoint(folder: Path, stored: str) -> int:
    """The layer's tensors under their official names; returns their bytes."""
    import torch

    from atomc.artifact.shards import ShardWriter
    from atomc.models.deepseek_v4.schema import expected_tensors
    from atomc.pack import Weight, plan_shards
    from atomc.recipes import Load

    specs = expected_tensors(model_config(stored))
    layer = [Weight(name, Load(name), spec) for name, spec in specs.items() if name.startswith(LAYER)]
    generator = torch.Generator().manual_seed(0)
    block = torch.randint(0, 256, (160 << 20,), dtype=torch.uint8, generator=generator)
    if stored == "bf16":  # values, of the size that a trained weight's have
        block = torch.randn(80 << 20, generator=generator).mul_(0.02).bfloat16().view(torch.uint8)
    for file, shard in plan_shards(layer, SOURCE_SHARD).items():
        at = int(file[:5]) * 8
        with ShardWriter(folder / file, {w.name: w.spec for w in shard}) as writer:
            for name in writer.names:
                at = (at + 8 * 1009) % (64 << 20)  # other bytes for every tensor
                spec = specs[name]
                writer.write(name, block[at : at + spec.nbytes].view(spec.dtype))
            writer.finish()
    return sum(w.spec.nbytes for w in layer)


def make_recipes(folder: Path, stored: str, scheme: str, scales: str) -> None:
    """Compile the whole model without weights; `folder`/SCHEME-SCALES.json has the layer's recipes."""
    import msgspec

    from atomc.artifact.store import encode, read_manifest
    from atomc.compiler import Options, compile_model

    config = folder / f"{stored}.json"
    config.write_bytes(encode(model_config(stored).to_dict()))
    output = folder / f"{scheme}-{scales}.atom"
    result = compile_model(str(config), "cpu", output, Options(scheme=scheme, scales=scales, with_weights=False))
    assert result.program is not None
    (region,) = {call.region for call in result.program.calls if call.prefix == LAYER}
    recipes = read_manifest(output).recipes[region]
    (folder / f"{scheme}-{scales}.json").write_bytes(msgspec.json.encode(recipes))


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def pack_once(checkpoint: Path, recipes: Path, output: Path) -> dict[str, Any]:
    """Pack in this process: what came out, how long it took, how much memory it needed."""
    import msgspec

    from atomc.artifact.store import MANIFEST, encode, writing
    from atomc.models.deepseek_v4.reader import CheckpointReader
    from atomc.pack import Packing, weights_of
    from atomc.recipes import Recipe

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.perf_counter()
    reader = CheckpointReader(checkpoint)
    layer = msgspec.json.decode(recipes.read_bytes(), type=dict[str, Recipe])
    weights = weights_of([("layer", LAYER)], {"layer": layer}, reader.spec)
    planned = time.perf_counter() - start
    last, pause = time.perf_counter(), 0.0

    def progress(*_: object) -> None:
        nonlocal last, pause
        now = time.perf_counter()
        last, pause = now, max(pause, now - last)

    with Packing(output) as packing, writing(output) as folder:
        packed = packing.pack(reader, weights, folder / "weights", progress)
        (folder / MANIFEST).write_bytes(encode(packed.files))
    return {
        "bytes": packed.bytes, "seconds": packed.seconds, "mb_per_second": packed.mb_per_second,
        "shards": packed.shards, "resumed": packed.resumed, "plan_seconds": planned,
        "all_seconds": time.perf_counter() - start, "longest_pause_seconds": pause,
        "import_bytes": before, "peak_bytes": resident("VmHWM") - before,
    }  # fmt: skip


# -- from outside ------------------------------------------------------------------------------------------------------


def command(*args: str | Path) -> list[str]:
    """This script in another process."""
    return [sys.executable, __file__, *map(str, args)]


@dataclass(frozen=True)
class Case:
    """A checkpoint and how it is packed."""

    folder: Path
    stored: str
    scheme: str
    scales: str

    @property
    def checkpoint(self) -> Path:
        return self.folder / self.stored

    @property
    def arguments(self) -> tuple[str | Path, ...]:
        """What `--one` is given."""
        return "--one", self.checkpoint, self.folder / f"{self.scheme}-{self.scales}.json", self.output

    @property
    def output(self) -> Path:
        return self.folder / "layer.atom"

    def make(self) -> None:
        """Checkpoint and recipes, in processes of their own; a checkpoint that is there stays."""
        if not self.checkpoint.exists():
            self.checkpoint.mkdir()
            run_self("--make", self.checkpoint, self.stored)
        run_self("--recipes", self.folder, self.stored, self.scheme, self.scales)

    def row(self, run: str) -> dict[str, Any]:
        """One packing in a process of its own."""
        size = sum(file.stat().st_size for file in self.checkpoint.iterdir())
        named = {"run": run, "stored": self.stored, "scheme": self.scheme, "scales": self.scales}
        row = {**named, "source_bytes": size, **json.loads(run_self(*self.arguments))}
        print(f"{run:15} {self.stored}, {self.scheme}, {self.scales}: {row['seconds']:.1f} s", file=sys.stderr)
        return row


def run_self(*args: str | Path) -> str:
    """What this script prints in another process."""
    done = subprocess.run(command(*args), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def drop_cache(folder: Path) -> None:
    """Take the files out of the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def interrupt(case: Case, number: signal.Signals) -> list[str]:
    """Send a signal to a packing that has finished two shards and is in the middle of one; what it left."""
    from atomc.pack import shelf_of

    shelf = shelf_of(case.output)
    process = subprocess.Popen(command(*case.arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None:
        half = [file for file in shelf.glob("*.tmp") if _size(file) > 200 << 20]
        if half and len(list(shelf.glob("*.safetensors"))) >= 2:
            process.send_signal(number)
            break
        time.sleep(0.01)
    process.communicate()
    return check_left(case.output)


def check_left(output: Path) -> list[str]:
    """Nothing under the output's name, and every shard on the shelf is what the journal says; the shelf's files."""
    import msgspec

    from atomc.artifact.store import hash_file
    from atomc.pack import JOURNAL, Journal, shelf_of

    shelf = shelf_of(output)
    journal = msgspec.json.decode((shelf / JOURNAL).read_bytes(), type=Journal)
    shards = {file.name: hash_file(file) for file in shelf.glob("*.safetensors")}
    if output.exists() or not shards or shards != journal.shards:
        raise SystemExit(f"half written: {output.exists()=}, {shards} on the shelf, {journal.shards} in the journal")
    return sorted(file.name for file in shelf.iterdir())


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # it has just got its name
        return 0


def interrupted_row(case: Case, number: signal.Signals, expected: str) -> dict[str, Any]:
    """An interruption, and the packing that goes on."""
    left, output = interrupt(case, number), case.output
    row = {**case.row(f"after {number.name}"), "left": left}
    if row["resumed"] < 2 or digest(output) != expected:
        raise SystemExit(f"resumed {row['resumed']} shards; the artifact is another one: {row}")
    others = [file.name for file in output.parent.iterdir() if file.name.startswith(f".{output.name}")]
    if others:
        raise SystemExit(f"left beside the output: {others}")
    shutil.rmtree(output)
    return row


def digest(output: Path) -> str:
    """The artifact's hash."""
    from atomc.artifact.store import artifact_hash

    return artifact_hash(output)


def measure(folder: Path, repeat: int) -> list[dict[str, Any]]:
    """Every run, in one temporary folder: of the release, then of the same layer in bf16."""
    release = Case(folder, "release", "native", "amax")
    release.make()
    rows, expected = repeated(release, ("cold", "warm") * repeat)
    rows += [interrupted_row(release, number, expected) for number in (signal.SIGINT, signal.SIGKILL)]
    shutil.rmtree(release.checkpoint)
    for scales in ("amax", "mse"):
        online = Case(folder, "bf16", "w4a8", scales)
        online.make()
        rows += repeated(online, ("cold",))[0]
    return rows


def repeated(case: Case, runs: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """A row for each run, and the hash that all of them came to."""
    rows, hashes = [], set()
    for run in runs:
        if run == "cold":
            drop_cache(case.checkpoint)
        rows.append(case.row(run))
        hashes.add(digest(case.output))
        shutil.rmtree(case.output)
    (expected,) = hashes
    return rows, expected


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"{'run':15} {'from':8} {'scheme':12} {'GB':>5} {'seconds':>8} {'MB/s':>6} {'peak GiB':>9} {'pause s':>8}")
    for row in rows:
        head = f"{row['run']:15} {row['stored']:8} {row['scheme'] + ' ' + row['scales']:12}"
        speed = f"{row['bytes'] / 1e9:5.2f} {row['seconds']:8.1f} {row['mb_per_second']:6.0f}"
        print(f"{head} {speed} {row['peak_bytes'] / 2**30:9.2f} {row['longest_pause_seconds']:8.1f}")


def main() -> int:
    """Measure, print the table and the verdict, write the JSON; 1 if the limit is missed, and nothing is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Where the temporary folder is made.")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pack.json")
    parser.add_argument("--one", nargs=3, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--recipes", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(pack_once(*options.one)))
        return 0
    if options.make:
        print(make_checkpoint(Path(options.make[0]), options.make[1]))
        return 0
    if options.recipes:
        make_recipes(Path(options.recipes[0]), *options.recipes[1:])
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = measure(Path(folder), options.repeat)
    show(rows)
    met = max(row["peak_bytes"] for row in rows) < LIMIT_BYTES
    print(f"{'met' if met else 'MISSED'}  under {LIMIT_BYTES / 2**30} GiB above the interpreter")
    if not met:
        return 1
    threads = os.environ.get("OMP_NUM_THREADS")
    said = " ".join([f"OMP_NUM_THREADS={threads}"] * bool(threads) + ["python benchmarks/pack.py", *sys.argv[1:]])
    document = {"command": said, "machine": machine(), "limit_bytes": LIMIT_BYTES, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
