"""benchmarks/gpu/status.py: what it says of results that are missing, of other sources, or of today's; and the page's block of figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu import goals as gpu_goals
from benchmarks.gpu import status as gpu_status
from benchmarks.gpu.cases import CUBLAS, OURS, TRANSFORMERS, Case
from benchmarks.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[2]


def made_on_a_gpu(phase: str, results: dict[str, Any], sources: dict[str, str], date: str = "2026-01-02 03:04:05") -> dict[str, Any]:
    return {
        "phase": phase, "device": "cuda", "digest": gpu_status.digest(sources), "sources": sources, "machine": {"gpu": "NVIDIA H200"},
        "versions": {"torch": "2.11.0"}, "runs": [{"date": date}], "left_out": {"a case": "no time was left"}, "results": results,
    }  # fmt: skip


def test_status_says_what_is_current_stale_and_failed(tmp_path: Path) -> None:
    now = gpu_status.source_digests()
    then = {**now, "csrc/kernels/cuda/sort.cu": "other", "csrc/kernels/cuda/gone.cu": "0"}
    del then["csrc/kernels/cuda/permute.cu"]
    tests = {"tests/gpu/a.py::b": {"outcome": "failed", "seconds": 1.0, "message": "it is wrong"}}
    (tmp_path / "gpu-correctness.json").write_text(json.dumps(made_on_a_gpu("correctness", tests, now)))
    (tmp_path / "gpu-speed.json").write_text(json.dumps(made_on_a_gpu("speed", {}, then)))
    (tmp_path / "gpu-speed-old.json").write_text(json.dumps(made_on_a_gpu("speed", {}, now, "2025-01-01 00:00:00")))
    (tmp_path / "gpu-broken.json").write_text("[]")
    said = gpu_status.status(*gpu_status.read_results(tmp_path), now)
    assert "correctness: current (1 results, NVIDIA H200, 2026-01-02 03:04:05)" in said
    assert "  failed: tests/gpu/a.py::b: it is wrong" in said and "  left out: a case: no time was left" in said
    assert "speed: stale" in said and "profile: never run on a GPU" in said and "refused: gpu-broken.json" in said
    for word in ("sort.cu", "gone.cu (gone)", "permute.cu (new)"):
        assert f"  changed since: csrc/kernels/cuda/{word}" in said


def test_readme_table_comes_from_the_files() -> None:
    case = Case(SHAPES["qwen3"], "forward-inference", 16384)
    record = gpu_goals.derive(case, 128, {name: {"p50": ms} for name, ms in ((OURS, 2.4), (CUBLAS, 1.8), (TRANSFORMERS, 4.8))})
    block = gpu_status.figures_block({"speed": made_on_a_gpu("speed", {case.key: record}, gpu_status.source_digests())})
    row = "| qwen3 | 16384 | forward-inference | eager | 2.4 | 515.4 | 75 % | 65 % | 2.00 | 500 / 550 TFLOP/s | must met |"
    assert row in block.splitlines() and "The tests have not run on a GPU yet." in block


def test_readme_is_what_the_results_say() -> None:
    page = gpu_status.PAGE.read_text()
    assert gpu_status.with_block(page, gpu_status.figures_block(gpu_status.read_results()[0])) == page


def test_a_source_that_changes_changes_the_digest(tmp_path: Path) -> None:
    source = tmp_path / "csrc/kernels/cuda/sort.cu"
    source.parent.mkdir(parents=True)
    source.write_text("a")
    before = gpu_status.source_digests(tmp_path)
    source.write_text("b")
    after = gpu_status.source_digests(tmp_path)
    assert list(before) == ["csrc/kernels/cuda/sort.cu"] and gpu_status.digest(before) != gpu_status.digest(after)
    assert {p.name for p in (ROOT / "csrc/kernels/cuda").glob("*.cu*")} <= {Path(p).name for p in gpu_status.source_digests()}
