"""Digests of the sources of the CUDA library: the build writes the one of all into the libraries, results of a GPU name it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

SOURCES = ("kernels/*", "kernels/cuda/*", "ops/*", "registration/*cuda*", "registration/impls.h", "registration/schemas.cpp")
SUFFIXES = (".h", ".cuh", ".cu", ".cpp")


def source_digests(root: Path) -> dict[str, str]:
    """Path to digest, of every source that the CUDA library is made of."""
    found = {p for pattern in SOURCES for p in (root / "csrc").glob(pattern) if p.suffix in SUFFIXES}
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in sorted(found)}


def digest(sources: Mapping[str, str]) -> str:
    """One digest of all sources: results belong to exactly these."""
    return hashlib.sha256("\n".join(f"{path} {value}" for path, value in sorted(sources.items())).encode()).hexdigest()[:16]
