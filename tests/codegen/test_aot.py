"""Kernels ahead of time: every target, facts from the code object, kept by content, refused if they do not compile."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")

from atomc.codegen.aot import KernelError, Store, _nvidia_tool, build, build_all, key
from atomc.codegen.dependent import LETS, WAITS, waiting
from atomc.codegen.device import Recorder, Variant, type_of
from atomc.targets import TARGETS, get_target
from tests.support.toy_kernels import add, broken, crowded, divide, empty, rowwise_dot

GPUS = [name for name, target in TARGETS.items() if target.is_gpu]


def variant(block: int = 256) -> Variant:
    recorder = Recorder(get_target("h100"), 16)
    x = torch.empty(1000, dtype=torch.float32, device="meta")
    args: dict[str, Any] = {"x": x, "y": x, "out": x, "n": 1000}
    recorder.launch(add, (4,), args, {"BLOCK": block})
    return recorder.variants[0]


def dot_variant(target: str) -> Variant:
    recorder = Recorder(get_target(target), 64)
    a = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    recorder.launch(rowwise_dot, (1,), {"a": a, "b": a, "out": a.float()}, {"N": 64})
    return recorder.variants[0]


@pytest.mark.parametrize("target", GPUS)
def test_a_kernel_for_every_target(target: str) -> None:
    binary = build(dot_variant(target), get_target(target))
    facts = binary.facts
    assert binary.data[:4] == b"\x7fELF"
    assert facts.name == "rowwise_dot" and facts.target == target
    assert facts.signature == ["*bf16", "*bf16", "*fp32"]
    assert facts.registers > 0 and facts.spills == 0 and facts.shared <= get_target(target).shared_bytes
    assert any(word in name for name in facts.matrix for word in ("mfma", "mma"))
    assert facts.wide_loads > 0


@pytest.mark.parametrize("target", GPUS)
def test_a_kernel_waits_for_the_one_before_it_where_launches_may_be_dependent(target: str) -> None:
    assert build(dot_variant(target), get_target(target)).facts.dependent == get_target(target).dependent_launch


@pytest.mark.parametrize("target", [name for name in GPUS if TARGETS[name].dependent_launch])
def test_the_assembler_moves_no_access_to_memory_before_the_wait(target: str, tmp_path: Path) -> None:
    (tmp_path / "k.cubin").write_bytes(build(dot_variant(target), get_target(target)).data)
    code = [line for line in _nvidia_tool("-sass", str(tmp_path / "k.cubin")).splitlines() if ";" in line]
    waits = [at for at, line in enumerate(code) if "ACQBULK" in line]
    accesses = [
        at for at, line in enumerate(code) if re.search(r"\b(?:LDG|STG|LDGSTS|ATOMG?|REDG?|UTMALDG|UBLKCP)\b", line)
    ]
    assert len(waits) == 1 and accesses and waits[0] < min(accesses)


def test_the_wait_is_the_first_instruction() -> None:
    ptx = ".visible .entry k(\n)\n{\n\t.reg .b32 %r<2>;\n\n// %bb.0:\n\tld.param.b64 %rd1, [k_param_0];\n\tret;\n}\n"
    lines = waiting(ptx).splitlines()
    at = lines.index("// %bb.0:")
    assert lines[at + 1 : at + 4] == [f"\t{WAITS}", f"\t{LETS}", "\tld.param.b64 %rd1, [k_param_0];"]
    assert [line for line in lines if line not in (f"\t{WAITS}", f"\t{LETS}")] == ptx.splitlines()
    for wrong in ("", ptx + ptx):
        with pytest.raises(ValueError, match="and one is expected"):
            waiting(wrong)
    with pytest.raises(ValueError, match="sees no write of the grid before it"):
        waiting(ptx.replace("ret;", "ld.global.nc.b32 %r1, [%rd1];\n\tret;"))


def test_the_key_knows_everything_that_decides_the_binary() -> None:
    h100, base = get_target("h100"), variant()
    keys = {key(base, h100), key(base, get_target("mi355x")), key(variant(128), h100)}
    keys.add(key(Variant(base.kernel, base.signature, base.constants, 8, base.stages, base.aligned), h100))
    keys.add(key(base, get_target("h200")))  # the same binary, but the facts beside it name the target
    assert len(keys) == 5
    assert key(variant(), h100) == key(base, h100)


def test_what_is_kept_is_not_compiled_again_and_damage_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, h100 = Store(tmp_path), get_target("h100")
    first = build_all([variant()], h100, store, jobs=1)
    (name,) = first

    def never(*_: object) -> None:
        raise AssertionError("compiled again")

    with monkeypatch.context() as patch:
        patch.setattr("atomc.codegen.aot.build", never)
        assert build_all([variant()], h100, store, jobs=1) == first
    (tmp_path / f"{name}.bin").write_bytes(b"damaged")
    assert store.get(name) is None
    assert build_all([variant()], h100, store, jobs=1)[name].data == first[name].data


def test_a_compile_leaves_nothing_in_tritons_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    build(variant(), get_target("h100"))
    assert not (tmp_path / "triton").exists()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")


@pytest.mark.slow
def test_many_are_compiled_in_processes(tmp_path: Path) -> None:
    variants = [variant(64), variant(128), variant(256)]
    found = build_all(variants, get_target("mi355x"), Store(tmp_path), jobs=2)
    assert len(found) == 3 and len(list(tmp_path.glob("*.bin"))) == 3


def test_a_kernel_that_does_not_compile_is_an_error_that_names_it() -> None:
    recorder = Recorder(get_target("h100"), 16)
    recorder.launch(broken, (1,), {"x": torch.empty(4, device="meta")}, {"BLOCK": 3})
    with pytest.raises(KernelError, match="broken for h100"):
        build(recorder.variants[0], get_target("h100"))
    with pytest.raises(KernelError, match="runs the references"):
        build(variant(), get_target("cpu"))


def launch(kernel: Any, target: str, constants: dict[str, Any], warps: int = 4, **args: Any) -> Variant:
    recorder = Recorder(get_target(target), 16)
    recorder.launch(kernel, (1,), args, constants, warps=warps)
    return recorder.variants[0]


def floats(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize("target", ["h100", "b200", "mi355x"])
def test_a_kernel_that_came_out_empty_is_refused(target: str) -> None:
    with pytest.raises(KernelError, match=rf"empty for {target} with \{{'BLOCK': 64\}}.*stores nothing"):
        build(launch(empty, target, {"BLOCK": 64}, x=floats(64), n=64), get_target(target))


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"shared": 228 * 1024}, "233472 bytes of shared memory, and a workgroup may have 232448"),
        ({"tmem_size": 1024}, "1024 columns of tensor memory"),
        ({"global_scratch_size": 128}, "128 bytes of scratch memory"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(
    needs: dict[str, int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"shared": 0, "tmem_size": 0, "global_scratch_size": 0, "profile_scratch_size": 0} | needs
    made = SimpleNamespace(metadata=SimpleNamespace(**known), asm={"ptx": "st.global.b32 [%rd1], %r1;"})
    monkeypatch.setattr("triton.compile", lambda *_, **__: made)
    with pytest.raises(KernelError, match=f"add for b200 with .*{words}"):
        build(variant(), get_target("b200"))


@pytest.mark.parametrize(("target", "fits", "spills"), [("h100", 64, 128), ("mi355x", 128, 256)])
def test_registers_and_spills(target: str, fits: int, spills: int) -> None:
    """What a lane may have at most, with spills where they are, and none where a frame is only reserved."""
    known = get_target(target)
    few, many = (
        build(launch(crowded, target, {"N": n}, 1, x=floats(n, n), out=floats(n, n)), known).facts
        for n in (fits, spills)
    )
    values = fits * fits // known.wavefront
    assert few.spills == 0 and values <= few.registers <= 2 * values  # AMD: AGPRs are counted once
    assert many.spills > 0 and many.registers <= known.registers_per_lane + 1
    args = {"x": floats(64), "y": floats(64), "out": floats(64), "n": 64}
    facts = build(launch(divide, target, {"BLOCK": 64}, **args), known).facts
    assert facts.spills == 0 and facts.registers < 64


def test_types_of_arguments() -> None:
    assert type_of(torch.empty(1, dtype=torch.float8_e8m0fnu)) == "*u8"
    assert [type_of(3), type_of(0.5), type_of(None)] == ["i32", "fp32", "*i8"]
    with pytest.raises(TypeError, match="a flag is a constant"):
        type_of(True)
