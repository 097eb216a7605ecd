"""The rooms of the repository: which may import which, and that modules are found without edits of `sys.path`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: What a room may import of the others.
ROOMS: dict[str, set[str]] = {
    "moe_ext": set(),
    "build_tools": set(),
    "benchmarks": {"moe_ext", "build_tools"},  # the digest of the CUDA sources is the build's
    "tools": {"moe_ext", "build_tools", "tests"},
    "tests": {"moe_ext", "build_tools", "benchmarks", "tools"},
}
EDIT = re.compile(r"sys\.path(\[.*\]\s*\+?=|\s*\+?=|\.(insert|append|extend)\()")


def imported(path: Path) -> set[str]:
    """The first names of what a file imports, relative imports left out."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_may(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        others = imported(path) & ROOMS.keys() - {room}
        assert others <= ROOMS[room], f"{path.relative_to(ROOT)} imports {', '.join(sorted(others - ROOMS[room]))}"


def test_nothing_but_setup_edits_the_search_path_of_modules() -> None:
    files = [path for room in (*ROOMS, "examples") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 100 and EDIT.search((ROOT / "setup.py").read_text())
    assert [str(path.relative_to(ROOT)) for path in files if EDIT.search(path.read_text())] == []
