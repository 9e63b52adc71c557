"""Memory, speed and interruption of packing one full-width layer of DeepSeek-V4-Flash (CSA, top-k MoE), as stored.

    python benchmarks/pack.py [--folder FOLDER] [--repeat 2] [--out benchmarks/results/pack.json]

A synthetic checkpoint with the layer's official tensors (3.6 GB of random bytes) is made in a temporary folder and
packed as a target with packed weights packs it: every tensor as it is stored, the experts stacked. Each packing runs in
a process of its own. Peak memory is its largest resident set above that after its imports; mapped pages of the
checkpoint count. "cold" reads from the disk, "warm" from the page cache. Then packing is interrupted midway, by SIGINT
and by SIGKILL; what is left is compared with its journal, and packing goes on. Needs 11 GB of disk for the while.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LAYER = "layers.4."
LIMIT_BYTES = 3 << 29  # 1.5 GiB
SOURCE_SHARD = 1 << 30


# -- in a process of its own -------------------------------------------------------------------------------------------


def make_checkpoint(folder: Path) -> int:
    """The layer's tensors under their official names; returns their bytes."""
    import torch

    from atomc.artifact.shards import ShardWriter
    from atomc.models.bundled import bundled_path
    from atomc.models.deepseek_v4.config import load_config
    from atomc.models.deepseek_v4.schema import expected_tensors
    from atomc.pack import Weight, plan_shards
    from atomc.recipes import Load

    specs = expected_tensors(load_config(bundled_path("deepseek-v4-flash")))
    layer = [Weight(name, Load(name), spec) for name, spec in specs.items() if name.startswith(LAYER)]
    block = torch.randint(0, 256, (160 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for file, shard in plan_shards(layer, SOURCE_SHARD).items():
        at = int(file[:5]) * 8
        with ShardWriter(folder / file, {w.name: w.spec for w in shard}) as writer:
            for name in writer.names:
                at = (at + 8 * 1009) % (64 << 20)  # other bytes for every tensor
                spec = specs[name]
                writer.write(name, block[at : at + spec.nbytes].view(spec.dtype))
            writer.finish()
    return sum(w.spec.nbytes for w in layer)


def layer_recipes(names: list[str]) -> dict[str, Any]:
    """Weight name in the layer -> recipe: stacks of the experts' values and of their scales, the rest alone."""
    from atomc.recipes import PREFIX, Concat, Load, Stack

    found = [re.fullmatch(r"ffn\.experts\.(\d+)\.w1\.weight", name) for name in names]
    experts = range(1 + max(int(match[1]) for match in found if match))
    recipes: dict[str, Any] = {name: Load(PREFIX + name) for name in names if ".experts." not in name}
    for kind in ("weight", "scale"):
        w1, w2, w3 = ([Load(f"{PREFIX}ffn.experts.{e}.{w}.{kind}") for e in experts] for w in ("w1", "w2", "w3"))
        recipes[f"ffn.experts.w13.{kind}"] = Stack(tuple(Concat(pair, 0) for pair in zip(w1, w3, strict=True)))
        recipes[f"ffn.experts.w2.{kind}"] = Stack(tuple(w2))
    return recipes


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def pack_once(checkpoint: Path, output: Path) -> dict[str, Any]:
    """Pack in this process: what came out, how long it took, how much memory it needed."""
    from atomc.artifact.store import MANIFEST, encode, writing
    from atomc.models.deepseek_v4.reader import CheckpointReader
    from atomc.pack import Packing, weights_of

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.perf_counter()
    reader = CheckpointReader(checkpoint)
    recipes = {"layer": layer_recipes([name.removeprefix(LAYER) for name in reader])}
    weights = weights_of([("layer", LAYER)], recipes, reader.spec)
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


def run_one(checkpoint: Path, output: Path) -> dict[str, Any]:
    """`pack_once` in a process of its own."""
    done = subprocess.run(command("--one", checkpoint, output), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def drop_cache(folder: Path) -> None:
    """Take the files out of the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def interrupt(checkpoint: Path, output: Path, number: signal.Signals) -> list[str]:
    """Send a signal to a packing that has finished two shards and is in the middle of one; what it left."""
    from atomc.pack import shelf_of

    shelf = shelf_of(output)
    process = subprocess.Popen(command("--one", checkpoint, output), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None:
        half = [file for file in shelf.glob("*.tmp") if _size(file) > 200 << 20]
        if half and len(list(shelf.glob("*.safetensors"))) >= 2:
            process.send_signal(number)
            break
        time.sleep(0.01)
    process.communicate()
    return check_left(output)


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


def interrupted_row(checkpoint: Path, output: Path, number: signal.Signals, expected: str) -> dict[str, Any]:
    """An interruption, and the packing that goes on."""
    left = interrupt(checkpoint, output, number)
    row = {"run": f"after {number.name}", "left": left, **run_one(checkpoint, output)}
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
    """Every run, in one temporary folder."""
    checkpoint, output, rows = folder / "checkpoint", folder / "layer.atom", []
    checkpoint.mkdir()
    made = subprocess.run(command("--make", checkpoint), check=True, capture_output=True, text=True)
    print(f"a checkpoint of {int(made.stdout):,} bytes in {len(list(checkpoint.iterdir()))} files", file=sys.stderr)
    expected = ""
    for run in ("cold", "warm") * repeat:
        if run == "cold":
            drop_cache(checkpoint)
        rows.append({"run": run, **run_one(checkpoint, output)})
        expected = expected or digest(output)
        assert digest(output) == expected
        shutil.rmtree(output)
    rows += [interrupted_row(checkpoint, output, number, expected) for number in (signal.SIGINT, signal.SIGKILL)]
    return rows


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return {
        "cpu": cpu, "cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version(),
        "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    """Measure, print the table and the verdict, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Where the temporary folder is made.")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pack.json")
    parser.add_argument("--one", nargs=2, type=Path, metavar=("CHECKPOINT", "OUTPUT"), help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, metavar="CHECKPOINT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one or options.make:
        print(json.dumps(pack_once(*options.one)) if options.one else make_checkpoint(options.make))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = measure(Path(folder), options.repeat)
    print(
        f"{'run':15} {'GB':>5} {'seconds':>8} {'MB/s':>6} {'shards':>7} {'resumed':>8} {'peak GiB':>9} {'pause s':>8}"
    )
    for row in rows:
        speed = f"{row['bytes'] / 1e9:5.2f} {row['seconds']:8.1f} {row['mb_per_second']:6.0f}"
        rest = f"{row['shards']:7} {row['resumed']:8} {row['peak_bytes'] / 2**30:9.2f}"
        print(f"{row['run']:15} {speed} {rest} {row['longest_pause_seconds']:8.1f}")
    most = max(row["peak_bytes"] for row in rows)
    print(f"{'met' if most < LIMIT_BYTES else 'MISSED'}  under {LIMIT_BYTES / 2**30} GiB above the interpreter")
    said = "python benchmarks/pack.py " + " ".join(sys.argv[1:])
    document = {"command": said.strip(), "machine": machine(), "limit_bytes": LIMIT_BYTES, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
