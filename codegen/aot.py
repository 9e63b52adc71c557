"""Compiling kernels ahead of time: a variant and a target to a binary, with what its assembly says of it. No GPU.

Contract:
    Each distinct variant is compiled once: binaries are kept by the hash of everything that decides them (the kernel's
    source and all it calls, types, constants, options, target, Triton's version). Compiling many runs in processes.
    Registers, spills and shared memory are read from the code object, never assumed. A kernel that could not run, or
    that came out empty, is refused here, by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

import msgspec

from atomc.artifact.kernels import KernelFacts
from atomc.codegen import dependent
from atomc.codegen.device import Variant
from atomc.codegen.source import kernel_of, source_of
from atomc.errors import AtomcError
from atomc.targets import Target, get_target

FACTS = 3  # the version of what is read from a code object; part of the key
MATRIX = r"\b((?:wgmma\.mma_async|tcgen05\.mma|mma(?=\.m\d))[\w.:]*)"  # in PTX, without .sync.aligned
TENSOR_MEMORY = 512  # columns of it, on sm_100


class KernelError(AtomcError):
    """A kernel that the target's compiler refuses; the message names kernel, target and constants."""

    exit_code = 6


@dataclass(frozen=True)
class Binary:
    """A code object (`.cubin`, `.hsaco`) and what is known of it."""

    data: bytes
    facts: KernelFacts


def key(variant: Variant, target: Target) -> str:
    """The hash of everything that decides the binary."""
    import triton

    known = [
        FACTS, variant.name, variant.kernel.cache_key, variant.signature, [(k, repr(v)) for k, v in variant.constants],
        variant.warps, variant.stages, sorted(variant.aligned), target.name, target.arch, triton.__version__,
    ]  # fmt: skip
    known += [dependent.source()] if target.dependent_launch else []
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:20]


def build(variant: Variant, target: Target) -> Binary:
    """Compile one variant.

    Raises:
        KernelError: the target's compiler refuses it, it needs more than the target has, or it came out empty.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    if target.triton is None:
        raise KernelError(f"{target.name} runs the references; no kernel is compiled for it.")
    names = list(variant.kernel.arg_names)
    constants = dict(variant.constants)
    signature = {n: dict(variant.signature).get(n, "constexpr") for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in variant.aligned}
    kind = _source_type(variant.kernel)
    source = kind(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attrs)
    where = GPUTarget(target.triton.backend, target.triton.arch, target.triton.warp_size)
    try:
        # `Store` is the cache; Triton's own would keep each stage of each kernel as well, and only ever grow.
        with (
            triton.knobs.cache.scope(),
            TemporaryDirectory(prefix="atomc-triton-") as scratch,
            dependent.waiting_kernels() if target.dependent_launch else nullcontext(),
        ):
            triton.knobs.cache.dir = scratch
            made = triton.compile(source, where, options={"num_warps": variant.warps, "num_stages": variant.stages})
    except Exception as error:
        raise KernelError(f"a kernel does not compile: {_told(variant, target)}: {error}") from error
    if problem := _unfit(made, target):
        raise KernelError(f"a kernel cannot run: {_told(variant, target)}: {problem}")
    return _binary(made, variant, target)


def _source_type(kernel: Any) -> Any:
    """What Triton compiles a kernel from: its own language, or Gluon, where layouts and barriers are written out."""
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def _told(variant: Variant, target: Target) -> str:
    return f"{variant.name} for {target.name} with {dict(variant.constants)}, {variant.warps} warps"


# What writes to memory, in PTX and in AMD's assembly.
STORES = re.compile(
    r"\b(?:st\.(?:[\w:]+\.)*global|st\.[bfsuv]|red\.|atom\.|cp\.(?:async\.bulk|reduce)[\w.:]*\.global\.shared)"
    r"|\b(?:global|buffer|flat)_(?:store|atomic)_"
)


def _unfit(made: Any, target: Target) -> str:
    """Why a compiled kernel would not run on the target, or would do nothing; empty: it is fit."""
    known, text = made.metadata, made.asm["amdgcn" if target.vendor == "amd" else "ptx"]
    if known.shared > target.shared_bytes:
        return f"it needs {known.shared} bytes of shared memory, and a workgroup may have {target.shared_bytes}"
    # What a backend has no such thing of, its metadata does not name.
    names = ("tmem_size", "global_scratch_size", "profile_scratch_size")
    columns, *scratches = (getattr(known, name, None) or 0 for name in names)
    if columns > TENSOR_MEMORY:
        return f"it needs {columns} columns of tensor memory, and there are {TENSOR_MEMORY}"
    if scratch := sum(scratches):
        return f"it needs {scratch} bytes of scratch memory, which no launch gives it"
    return "" if STORES.search(text) else "it came out empty: it stores nothing"


def _binary(made: Any, variant: Variant, target: Target) -> Binary:
    read, kind = (_amd, "hsaco") if target.vendor == "amd" else (_nvidia, "cubin")
    known = {
        "name": made.metadata.name, "target": target.name, "signature": [kind for _, kind in variant.signature],
        "warps": made.metadata.num_warps, "wavefront": target.wavefront, "stages": variant.stages,
        "shared": made.metadata.shared,
        "constants": {name: str(value) for name, value in variant.constants},
    }  # fmt: skip
    return Binary(made.asm[kind], KernelFacts(**known, **read(made)))


def _count(pattern: str, text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in re.findall(pattern, text):
        found[name] = found.get(name, 0) + 1
    return found


def _amd(made: Any) -> dict[str, Any]:
    text: str = made.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    loads = _count(r"\b((?:global|buffer)_load_\w+)", text)
    return {
        # One file of both kinds: vgpr_count has the AGPRs in it, from a multiple of 8 on (.amdhsa_accum_offset).
        "registers": number("vgpr_count"), "spills": 4 * number("vgpr_spill_count"),
        "scalar_spills": number("sgpr_spill_count"), "matrix": _count(r"\b(v_mfma_\w+)", text),
        "loads": sum(loads.values()),
        "wide_loads": sum(n for op, n in loads.items() if op.endswith(("dwordx4", "b128"))),
    }  # fmt: skip


def _nvidia(made: Any) -> dict[str, Any]:
    text: str = made.asm["ptx"]
    usage = _resources(made.asm["cubin"])
    loads = _count(r"\b(ld\.global[\w.:]*|cp\.async\.c[ag]\.shared\.global[\w.:]*|cp\.async\.bulk\.tensor)", text)
    wide = len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64|cp\.async\.cg[^;]*, 0x10", text))
    return {
        "registers": usage.get("REG", 0), "spills": usage.get("STACK", 0), "scalar_spills": 0,
        "matrix": _count(MATRIX, text.replace(".sync.aligned", "")), "loads": sum(loads.values()),
        "wide_loads": wide + loads.get("cp.async.bulk.tensor", 0), "dependent": dependent.WAITS in text,
    }  # fmt: skip


def _resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump (it comes with Triton) says of a cubin: REG, STACK; STACK is 0 where no instruction uses it."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = {n: int(v) for n, v in re.findall(r"\b(REG|STACK):(\d+)", _nvidia_tool("-res-usage", file.name))}
        # A stack may be only the frame of a division's slow path, which leaves it alone.
        if usage.get("STACK") and not re.search(r"\b(?:STL|LDL)\b", _nvidia_tool("-sass", file.name)):
            usage["STACK"] = 0
    return usage


def _nvidia_tool(option: str, path: str) -> str:
    """What cuobjdump prints of a code object.

    Raises:
        KernelError: it fails.
    """
    import triton.backends.nvidia

    folder = Path(triton.backends.nvidia.__path__[0]) / "bin"
    path_with_tools = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"  # it runs nvdisasm
    ran = subprocess.run([folder / "cuobjdump", option, path], capture_output=True, text=True, check=False,
                         env={**os.environ, "PATH": path_with_tools})  # fmt: skip
    if ran.returncode != 0:
        raise KernelError(f"cuobjdump {option} fails on a code object: {ran.stderr.strip()[:200]}")
    return ran.stdout


# -- many at once, kept by content -------------------------------------------------------------------------------------


class _Kept(msgspec.Struct, frozen=True):
    """What stands beside a code object."""

    sha256: str
    facts: KernelFacts


class Store:
    """Binaries in a folder, by their key; written beside and renamed, so that any number of processes may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str) -> Binary | None:
        """The binary of a key, if it is there whole."""
        try:
            kept = msgspec.json.decode((self.folder / f"{name}.json").read_bytes(), type=_Kept)
            data = (self.folder / f"{name}.bin").read_bytes()
        except (OSError, msgspec.MsgspecError):
            return None
        return Binary(data, kept.facts) if hashlib.sha256(data).hexdigest() == kept.sha256 else None

    def put(self, name: str, binary: Binary) -> None:
        """Keep a binary."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = msgspec.json.encode(_Kept(hashlib.sha256(binary.data).hexdigest(), binary.facts))
        for suffix, data in ((".bin", binary.data), (".json", kept)):
            beside = self.folder / f".{name}{suffix}.{os.getpid()}"
            beside.write_bytes(data)
            beside.replace(self.folder / f"{name}{suffix}")


def default_store() -> Store:
    """Where binaries are kept between compiles: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Store(Path(base) / "atomc" / "kernels")


def build_all(
    variants: Iterable[Variant], target: Target, store: Store, jobs: int | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Binary]:  # fmt: skip
    """Key -> binary of every variant, in parallel; what the store has is not compiled.

    Raises:
        KernelError: the first kernel that does not compile; what was compiled is kept.
    """
    wanted = {key(variant, target): variant for variant in variants}
    found = {name: binary for name in wanted if (binary := store.get(name)) is not None}
    missing = {name: variant for name, variant in wanted.items() if name not in found}
    workers = min(jobs or os.cpu_count() or 1, len(missing))
    if workers <= 1:
        for done, (name, variant) in enumerate(missing.items(), start=1):
            progress(f"kernels {variant.name}", done, len(missing))
            found[name] = build(variant, target)
            store.put(name, found[name])
        return found
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_worker, _portable(v), target.name): (n, v.name) for n, v in missing.items()}
        for done, future in enumerate(as_completed(running), start=1):
            name, label = running[future]
            progress(f"kernels {label}", done, len(missing))
            found[name] = future.result()
            store.put(name, found[name])
    return found


def _portable(variant: Variant) -> tuple[Any, ...]:
    """A variant by names: another process finds a Triton function by its module, or makes it again from its text."""
    fn = variant.kernel.fn
    return (source_of(variant.kernel), fn.__module__, fn.__name__, variant.signature, variant.constants, variant.warps,
            variant.stages, variant.aligned)  # fmt: skip


def _worker(portable: tuple[Any, ...], target: str) -> Binary:
    source, module, name, *rest = portable
    kernel = kernel_of(source, name) if source else getattr(import_module(module), name)
    return build(Variant(kernel, *rest), get_target(target))
