"""The target table: complete, consistent with itself, and helpful about names it does not have."""

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from atomc.errors import AtomcError
from atomc.targets import TARGETS, Target, TritonBackend, UnknownTargetError, get_target

GPUS = [target for target in TARGETS.values() if target.is_gpu]
each_gpu = pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)


def test_the_table_holds_the_six_targets() -> None:
    assert list(TARGETS) == ["cpu", "mi355x", "h100", "h200", "b200", "mi300x"]
    assert all(name == target.name for name, target in TARGETS.items())


def test_a_target_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_target("cpu").wavefront = 2  # type: ignore[misc]


def test_cpu_generates_no_kernels() -> None:
    cpu = get_target("cpu")
    assert not cpu.is_gpu
    assert cpu.vendor == "none"
    assert cpu.peak("fp4") == cpu.peak("bf16")


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("mi355x", TritonBackend("hip", "gfx950", 64)),
        ("mi300x", TritonBackend("hip", "gfx942", 64)),
        ("h100", TritonBackend("cuda", 90, 32)),
        ("h200", TritonBackend("cuda", 90, 32)),
        ("b200", TritonBackend("cuda", 100, 32)),
    ],
)
def test_triton_backend(name: str, backend: TritonBackend) -> None:
    assert get_target(name).triton == backend


@each_gpu
def test_backend_agrees_with_vendor_and_wavefront(target: Target) -> None:
    assert target.triton is not None
    assert target.triton.backend == {"amd": "hip", "nvidia": "cuda"}[target.vendor]
    assert target.triton.warp_size == target.wavefront
    assert str(target.triton.arch) in target.arch


@each_gpu
def test_figures_are_of_the_right_size(target: Target) -> None:
    """Catches a GB for a GiB of a power wrong, a sparse peak for a dense one, both directions for one."""
    assert 1e14 < target.peaks.bf16 < 1e16
    assert target.peak("fp8") == pytest.approx(2 * target.peaks.bf16, rel=0.01)
    assert 5e10 < target.memory_bytes < 5e11
    assert 1e12 < target.memory_rate < 1e13
    assert 64 * 1024 <= target.shared_bytes <= 228 * 1024
    assert target.register_file_bytes == {"amd": 512, "nvidia": 256}[target.vendor] * 1024
    assert target.link.devices == 8
    assert 4e11 < target.link.rate < 1e12


@each_gpu
def test_a_format_without_instruction_counts_as_the_next_wider(target: Target) -> None:
    expected = target.peaks.fp4 if target.peaks.fp4 is not None else target.peaks.fp8
    assert target.peak("fp4") == expected
    assert target.peak("bf16") == target.peaks.bf16
    assert (target.mx == "native") == (target.peaks.fp4 is not None)


def test_a_pair_has_one_link_of_a_mesh_and_all_of_a_switch() -> None:
    assert get_target("mi300x").link.pair_rate == pytest.approx(64e9)
    assert get_target("mi355x").link.pair_rate == pytest.approx(76.8e9)
    assert get_target("h100").link.pair_rate == get_target("h100").link.rate


def test_only_gfx942_speaks_fnuz() -> None:
    assert [target.name for target in TARGETS.values() if target.fp8 == "fnuz"] == ["mi300x"]


@pytest.mark.parametrize(
    ("wrong", "meant"), [("mi355", "mi355x"), ("MI355X", "mi355x"), ("gfx950", "mi355x"), ("sm_90", "h100 or h200")]
)
def test_an_unknown_target_says_what_was_meant(wrong: str, meant: str) -> None:
    with pytest.raises(UnknownTargetError) as error:
        get_target(wrong)
    assert f"unknown target {wrong!r}. Did you mean {meant}?" in str(error.value)
    assert all(name in str(error.value) for name in TARGETS)
    assert isinstance(error.value, AtomcError)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(UnknownTargetError, match=r"^unknown target 'tpu-v7'\. Known targets: cpu, ") as error:
        get_target("tpu-v7")
    assert "Did you mean" not in str(error.value)


def test_targets_load_without_torch(repo_root: Path) -> None:
    """Facts must be cheap: `atomc --help` and shell completion list them."""
    code = "import sys, atomc.targets; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=repo_root, check=True, timeout=60)
