"""What every test on a GPU gets: the device, and the memory that the tests before it used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.on_gpu import KIND, Device, device_named


@pytest.fixture
def device() -> Device:
    return device_named(KIND)


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    """Several processes share the GPU's memory."""
    yield
    if KIND == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()
