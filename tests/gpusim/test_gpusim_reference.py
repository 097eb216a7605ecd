"""A kernel that others wrote and that is right on hardware, on the simulated GPU: CUTLASS's grouped GEMM for sm_80."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

from moe_ext.testing import assert_accurate, compare
from tests.gpusim.harness import ROOT, Loaded, changed, gpusim_build, needs_nvcc, toolchain

pytestmark = needs_nvcc
E, N, K = 4, 200, 328
OFFSETS = [0, 150, 150, 289, 300]  # an expert without rows, tails in each direction of a tile


@pytest.fixture(scope="module")
def gemm(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    try:
        include = toolchain.find_cutlass(os.environ, ROOT).include
    except toolchain.BuildError:
        pytest.skip("CUTLASS is not installed")
    output = tmp_path_factory.mktemp("gpusim") / "cutlass_sm80.so"
    source = Path(__file__).parent / "cutlass_sm80.cu"
    return Loaded(gpusim_build.compile_test(source, output, "80", ("-isystem", str(include), "-diag-suppress", "2908")), 80)


def result(gemm: Loaded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the kernel, of plain PyTorch, and the truth."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(OFFSETS[-1], K, generator=generator).bfloat16()
    weight = (torch.randn(E, N, K, generator=generator) / K**0.5).bfloat16()
    out = torch.full((OFFSETS[-1], N), float("nan"), dtype=torch.bfloat16)
    assert gemm.call(x, weight, out, (ctypes.c_int * (E + 1))(*OFFSETS), E, N, K) == ""
    bounds = list(enumerate(zip(OFFSETS, OFFSETS[1:], strict=False)))
    plain = torch.cat([x[a:b] @ weight[e].T for e, (a, b) in bounds])
    return out, plain, torch.cat([x[a:b].double() @ weight[e].double().T for e, (a, b) in bounds])


@pytest.mark.parametrize("mode", ["late", "early", "1"])
def test_cutlass_for_sm80(gemm: Loaded, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSIM_ASYNC", mode)
    assert_accurate(*result(gemm))


def test_a_dropped_product_is_noticed(gemm: Loaded) -> None:
    with changed(gemm.simulator, "GemmGrouped;mma.sync;5;drop"):
        assert not compare(*result(gemm)).ok
