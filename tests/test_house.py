"""The house rules that no linter knows: where files are, how long they are, what they may say and what they import."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

from tests.support.imports import loaded_after

ROOMS = ("passes", "codegen", "runtime", "models")
SOURCE_FOLDERS = ("atomc", *ROOMS, "tests", "benchmarks")
TEXT = {".py", ".md", ".toml", ".json", ".yaml", ".yml", ".txt", ".cfg", ".sh", ""}
MAX_FILE, MAX_TEST_FILE, MAX_FUNCTION = 500, 700, 80
MAX_DATA_BYTES = 25_000_000

# In pieces, so that this file does not hold what it looks for.
BANNED = {
    "a path of one machine": re.compile(
        r"(?<![\w.~-])/(?:" + "|".join(("wo" + "rk", "ro" + "ot", "ho" + "me")) + r")/\w"
    ),
    "a package registry's host": re.compile(
        "|".join(("pypi" + r"\.org", "pythonhosted" + r"\.org", "npmjs" + r"\.org"))
    ),
    "an unfinished place": re.compile("|".join((r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", r"\bXX" + r"X\b"))),
}


def python_files(root: Path) -> list[Path]:
    """Every source file once: `Path.rglob` does not follow the four symlinks of atomc/."""
    return sorted(file for folder in SOURCE_FOLDERS for file in (root / folder).rglob("*.py"))


def repository_files(root: Path) -> list[Path]:
    """What git holds or would hold."""
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    return [root / name for name in listing.split("\0") if name and (root / name).exists()]


def report(found: list[str]) -> None:
    assert not found, "\n".join(["", *found])


# -- layout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_a_relative_symlink_to_the_folder_at_the_root(repo_root: Path, room: str) -> None:
    link = repo_root / "atomc" / room
    assert link.is_symlink()
    assert os.readlink(link) == f"../{room}"
    assert (repo_root / room / "__init__.py").is_file()


def test_no_symlink_leaves_the_repository(repo_root: Path) -> None:
    links = [file for file in repository_files(repo_root) if file.is_symlink()]
    report(
        [
            f"{link.relative_to(repo_root)} -> {os.readlink(link)}"
            for link in links
            if os.path.isabs(os.readlink(link)) or not link.resolve().is_relative_to(repo_root)
        ]
    )


def test_every_package_folder_has_an_init(repo_root: Path) -> None:
    """The build finds packages by `__init__.py`: a folder without one would be missing from the wheel, silently."""
    folders = {file.parent for file in python_files(repo_root) if file.relative_to(repo_root).parts[0] != "tests"}
    report(
        [
            str(f.relative_to(repo_root))
            for f in sorted(folders)
            if f.name != "benchmarks" and not (f / "__init__.py").exists()
        ]
    )


def test_the_repository_stays_small(repo_root: Path) -> None:
    sizes = {file: file.lstat().st_size for file in repository_files(repo_root)}
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
    assert sum(sizes.values()) < MAX_DATA_BYTES, [f"{sizes[f]:,} {f.relative_to(repo_root)}" for f in largest]


# -- imports -----------------------------------------------------------------------------------------------------------


def import_rooms(path: Path, cwd: Path) -> list[Path]:
    """Import every room in a new process that sees only `path`; returns where each came from."""
    code = "import " + ", ".join(f"atomc.{room}" for room in ROOMS)
    code += "; print('\\n'.join(m.__file__ for m in (" + ", ".join(f"atomc.{room}" for room in ROOMS) + ")))"
    environment = {**os.environ, "PYTHONPATH": str(path)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return [Path(line) for line in run.stdout.split()]


def test_packages_import_from_a_checkout(repo_root: Path, tmp_path: Path) -> None:
    files = import_rooms(repo_root, tmp_path)
    assert [file.resolve().parent for file in files] == [repo_root / room for room in ROOMS]


@pytest.mark.slow
def test_the_wheel_holds_the_whole_tree_and_imports(repo_root: Path, tmp_path: Path) -> None:
    source, wheels, site = tmp_path / "source", tmp_path / "wheels", tmp_path / "site"
    source.mkdir()
    for name in ("atomc", *ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        origin = repo_root / name
        if origin.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(origin, source / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(origin, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(wheels), "."]
    built = subprocess.run(pip, cwd=source, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
        wheel.extractall(site)
    # README files and the like may stay behind; code and data may not.
    wanted = {
        str(file.relative_to(repo_root) if folder == "atomc" else Path("atomc") / file.relative_to(repo_root))
        for folder in ("atomc", *ROOMS)
        for file in (repo_root / folder).rglob("*")
        if file.suffix in {".py", ".json", ".safetensors", ".txt", ".typed"} and "__pycache__" not in file.parts
    }
    report(sorted(wanted - held))
    assert all(file.is_relative_to(site) for file in import_rooms(site, tmp_path))


def entry_points(root: Path) -> dict[str, dict[str, str]]:
    project: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return {"console_scripts": project["scripts"], **project["entry-points"]}


def test_entry_points_lead_to_functions(repo_root: Path) -> None:
    points = entry_points(repo_root)
    assert points["console_scripts"] == {"atomc": "atomc.cli:main"}
    assert points["torch_dynamo_backends"] == {"atom": "atomc.dynamo:atom"}
    for group in points.values():
        for value in group.values():
            module, _, name = value.partition(":")
            assert callable(getattr(importlib.import_module(module), name)), value


def test_the_installation_declares_the_entry_points(repo_root: Path) -> None:
    try:
        installed = distribution("atomc").entry_points
    except PackageNotFoundError:
        pytest.skip("running from a checkout that is not installed")
    found = {(point.group, point.name): point.value for point in installed}
    expected = {
        (group, name): value for group, names in entry_points(repo_root).items() for name, value in names.items()
    }
    assert found == expected


def test_the_runtime_loads_no_compiler(repo_root: Path) -> None:
    """Serving never compiles: every module of the runtime is imported, and none of these may have come along."""
    rooms = repo_root / "runtime"
    modules = [".".join(("atomc", *file.relative_to(repo_root).with_suffix("").parts)) for file in rooms.rglob("*.py")]
    names = [name.removesuffix(".__init__") for name in sorted(modules)]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
    assert loaded_after(code, repo_root) == []


# -- files -------------------------------------------------------------------------------------------------------------


def test_files_and_functions_stay_short(repo_root: Path) -> None:
    found = []
    for file in python_files(repo_root):
        text, where = file.read_text(), file.relative_to(repo_root)
        limit = MAX_TEST_FILE if where.parts[0] == "tests" else MAX_FILE
        if (lines := text.count("\n")) > limit:
            found.append(f"{where}: {lines} lines, at most {limit}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION:
                    found.append(f"{where}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}")
    report(found)


def test_every_module_says_what_it_is_for(repo_root: Path) -> None:
    report(
        [
            str(file.relative_to(repo_root))
            for file in python_files(repo_root)
            if not ast.get_docstring(ast.parse(file.read_text()))
        ]
    )


def test_no_banned_words(repo_root: Path) -> None:
    found = []
    for file in repository_files(repo_root):
        if file.is_symlink() or file.suffix not in TEXT or file.name == "LICENSE" or file.stat().st_size > 1_000_000:
            continue
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
            found += [
                f"{file.relative_to(repo_root)}:{number}: {what}: {line.strip()[:100]}"
                for what, pattern in BANNED.items()
                if pattern.search(line)
            ]
    report(found)


# -- errors ------------------------------------------------------------------------------------------------------------


def exception_classes(root: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """(name, file, names of its bases) of every class that is called an error or derives from one."""
    for file in python_files(root):
        if file.relative_to(root).parts[0] in ("tests", "benchmarks"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [
                    base.attr if isinstance(base, ast.Attribute) else base.id
                    for base in node.bases
                    if isinstance(base, ast.Name | ast.Attribute)
                ]
                if any(name.endswith(("Error", "Exception")) for name in (node.name, *bases)):
                    yield node.name, file, bases


def test_every_public_error_is_an_atomc_error(repo_root: Path) -> None:
    """So that `except AtomcError` is enough for the command line and for a library user."""
    classes = {name: (file, bases) for name, file, bases in exception_classes(repo_root)}

    def is_ours(name: str) -> bool:
        return name == "AtomcError" or any(is_ours(base) for base in classes.get(name, (None, []))[1])

    assert is_ours("AtomcError")
    assert "AtomcError" in classes
    report(
        [
            f"{file.relative_to(repo_root)}: {name}"
            for name, (file, _) in classes.items()
            if not name.startswith("_") and not is_ours(name)
        ]
    )
