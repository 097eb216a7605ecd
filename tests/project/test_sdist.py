"""The sdist is the whole project: every tracked file is in it, and its tests are those of the checkout."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import moe_ext

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(moe_ext.__file__).parent
#: What a folder without git holds besides the sources, by the name of a file or of a folder above it.
MADE = ("build", "dist", "demo.png", "PKG-INFO", "setup.cfg", "*.egg-info", "*.so", "*.pyc", "__pycache__", ".venv*", ".*_cache", "cutlass")


def sources() -> set[str]:
    """Paths of what git tracks; where there is no git, of everything that no program has made."""
    if (ROOT / ".git").exists():
        said = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return {name for name in said.split("\0") if name and (ROOT / name).exists()}
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return {str(path) for path in found if not any(fnmatch.fnmatch(part, name) for part in path.parts for name in MADE)}


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *command], cwd=cwd, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of the tracked files, made in a copy and unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in sources():
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "copy" / name)
    run("setup.py", "--quiet", "sdist", "--formats", "gztar", "--dist-dir", str(folder), cwd=folder / "copy")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (result,) = (folder / "unpacked").iterdir()
    return result


def test_every_tracked_file_is_in_the_sdist(unpacked: Path) -> None:
    packed = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert sources() - packed == set(), "MANIFEST.in leaves these out"
    assert {name for name in packed - sources() if ".egg-info/" not in name} <= {"PKG-INFO", "setup.cfg"}


def test_the_sdist_has_the_same_tests(unpacked: Path) -> None:
    for library in PACKAGE.glob("*.so"):
        shutil.copy2(library, unpacked / "moe_ext")
    command = ("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider")
    here, there = ({line for line in run(*command, cwd=folder).splitlines() if "::" in line} for folder in (ROOT, unpacked))
    assert here == there and len(here) > 1000
