"""What every test gets: a fixed seed, one thread, and the default dtype it expects.

Markers are registered in pyproject.toml. Tests on one machine must give one answer: nothing here depends on the time or the host.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import torch

# Graphs that another version of the ops has left in the compiler's cache would run ops that this one does not have.
_COMPILED = tempfile.mkdtemp(prefix="moe_ext-compiled-")
atexit.register(shutil.rmtree, _COMPILED, ignore_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _COMPILED


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-json", metavar="FILE", help="where test_architectures.py writes what it finds out")


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seeds torch and sets one thread: on small inputs, threads cost more than they save. Tests about threads set their number."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(params=(torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype the ops compute in."""
    return request.param
