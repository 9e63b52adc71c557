"""Set-up that every test shares: threads, seeds, hypothesis profiles, the gpu switch, the repository root."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# Before the first import of torch: test processes share the cores, and one thread each keeps sums reproducible.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here may reach a hub: a test that tries must fail at once, on every machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell's background job ignores Ctrl-C, and so would every program that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from tests.support.cli import Cli

# Time limits are the suite's business (machines differ); in CI the same examples run every time.
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the tests marked gpu")
    parser.addoption("--every-kernel", action="store_true", help="compile every case of every kernel, not an excerpt")


# Modules whose every test captures or compiles a model, or asks transformers: `make check` leaves them to `make test`.
SLOW_MODULES = frozenset(
    {
        "artifact/test_check.py", "artifact/test_damage.py", "codegen/test_missing.py", "models/test_model.py",
        "models/test_mtp.py", "models/test_mutations.py", "models/test_nano_dense.py", "models/test_nano_training.py",
        "passes/test_chunk.py", "passes/test_fusions.py", "passes/test_promises.py", "passes/test_quant_fusions.py",
        "passes/test_schedule.py", "passes/test_shard.py", "planning/test_nodes.py", "runtime/test_evaluate.py",
        "runtime/test_executor.py", "runtime/test_native.py", "runtime/test_rank_executor.py", "test_bad_input.py",
        "test_capture.py", "test_cli.py", "test_collectives.py", "test_compiler.py", "test_dynamo.py",
        "test_dynamo_transformers.py", "test_inspect_kernels.py", "test_ranks.py", "test_sizes.py",
        "verify/test_clean.py", "verify/test_cli.py", "verify/test_faults.py", "verify/test_gpu.py",
    }
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(tests) and item.path.relative_to(tests).as_posix() in SLOW_MODULES:
            item.add_marker(pytest.mark.slow)
    if config.getoption("--gpu"):
        return
    skip = pytest.mark.skip(reason="needs a GPU: run with --gpu")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers for a test whatever ran before it."""
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test session that all its processes see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled kernels are kept for this session, not in the user's folder: each compiles what a fresh machine does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(_shared(tmp_path_factory) / "cache"))
        yield


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """`cli("inspect", path)` runs a command in this process."""
    return Cli(capfd)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small `checkpoint` and two artifacts of it: `tiny.atom` in full, `native.atom` as it is stored.

    What each compile said is beside it, as `.json`. Made once in a test session, by whichever process needs it first.
    Read-only: copy what a test changes.
    """
    from tests.support.artifact import LAYERS, compile_artifact, write_checkpoint

    shared = _shared(tmp_path_factory) / "model"
    with FileLock(shared.with_suffix(".lock")):
        if not (shared / "native.json").exists():
            shutil.rmtree(shared, ignore_errors=True)
            shared.mkdir()
            checkpoint = write_checkpoint(shared / "checkpoint", **LAYERS)
            compile_artifact(checkpoint, shared / "tiny.atom", "none")
            compile_artifact(checkpoint, shared / "native.atom", "native")
    return shared


@pytest.fixture(scope="session")
def artifact(model_folder: Path) -> Path:
    """A compiled artifact of a small random model, computed in float32. Read-only."""
    return model_folder / "tiny.atom"


@pytest.fixture(scope="session")
def native_artifact(model_folder: Path) -> Path:
    """The same model as its checkpoint stores it: FP8, FP4, packed caches. Read-only."""
    return model_folder / "native.atom"
