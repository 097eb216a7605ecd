"""benchmarks/gpu/run.py and status.py without a GPU: every phase runs on the CPU, files are complete when cut short, lost
workers are replaced, and nothing but a run on a GPU counts as one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import correctness as gpu_correctness
from benchmarks.gpu import goals as gpu_goals
from benchmarks.gpu import peers as gpu_peers
from benchmarks.gpu import profile as gpu_profile
from benchmarks.gpu import speed as gpu_speed
from benchmarks.gpu import status as gpu_status
from benchmarks.gpu import tables as gpu_tables
from benchmarks.gpu.cases import CUBLAS, GROUPED_MM, LIGER, MODES, OURS, TRANSFORMERS, Case
from benchmarks.gpu.device import Cpu
from benchmarks.gpu.results import ResultFile
from benchmarks.gpu.supervise import Deadline, search_path, supervise
from benchmarks.shapes import SHAPES
from moe_ext import ops
from tests.gpusim.record import FILE, source_digest

ROOT = Path(__file__).resolve().parents[2]
FEW = gpu_speed.Job(("tiny",), (16,), ("forward-inference", "backward-full"), (OURS, CUBLAS), samples=2, sample_ms=0.01, sets=2)


def gpu_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


# ---- the whole program
@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All phases, each in its processes. One of the tests ends its process, one fails, one is skipped, one passes."""
    folder = tmp_path_factory.mktemp("trial")
    tests = folder / "test_some.py"
    tests.write_text(
        "import os, pytest\ndef test_lost(): os._exit(3)\ndef test_failed(): assert 1 == 2, 'one is not two'\n"
        "def test_skipped(): pytest.skip('for a reason')\ndef test_passed(): pass\n"
    )
    options = ["--device", "cpu", "--quick", "--seconds", "100", "--out", str(folder), "--modes", "forward-inference", "backward-full"]
    done = gpu_run(*options, "--processes", "1", "--tests", str(tests), "--peers", "grouped_mm", "liger")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "correctness: 4 results, 2 failed, 0 left out" in done.stdout
    return folder


def read(folder: Path, phase: str) -> dict[str, Any]:
    return dict(json.loads((folder / f"gpu-{phase}.json").read_text()))


def test_every_file_says_what_it_is_of(trial: Path) -> None:
    sources = gpu_status.source_digests()
    for phase in gpu_status.PHASES:
        found = read(trial, phase)
        assert (found["phase"], found["device"], found["digest"]) == (phase, "cpu", gpu_status.digest(sources))
        assert found["sources"] == sources and found["versions"]["torch"] == torch.__version__
        assert [run["finished"] for run in found["runs"]] == [True]
    assert {p.name for p in trial.glob("gpu-*")} == {f"gpu-{name}" for name in (
        "correctness.json", "speed.json", "speed.csv", "speed.md", "profile.json", "profile.md")}  # fmt: skip


def test_outcomes_of_tests_survive_a_lost_process(trial: Path) -> None:
    results = {key.split("::")[1]: record for key, record in read(trial, "correctness")["results"].items()}
    assert {name: record["outcome"] for name, record in results.items()} == {
        "test_lost": "failed", "test_failed": "failed", "test_skipped": "skipped", "test_passed": "passed",
    }  # fmt: skip
    assert "exit code 3" in results["test_lost"]["message"]
    assert "one is not two" in results["test_failed"]["message"] and "for a reason" in results["test_skipped"]["message"]


def test_every_figure_is_complete(trial: Path) -> None:
    speed = read(trial, "speed")
    assert set(speed["results"]) == {
        f"tiny {mode} T={launch}" for mode in ("forward-inference", "backward-full") for launch in ("16 eager", "16 graph", "128 eager")
    }
    for key, record in speed["results"].items():
        assert set(record["candidates"]) == {OURS, CUBLAS, GROUPED_MM}
        assert record["left_out"] == {LIGER: "not importable: No module named 'liger_kernel'"}
        for name, c in record["candidates"].items():
            assert 0 < c["p20"] <= c["p50"] <= c["p80"] and c["samples"] == 3
            assert c["tflops"] > 0 and c["gb_per_s"] > 0 and 0 < c["of_floor"] < 1
            assert c["of_cublas"] == record["candidates"][CUBLAS]["p50"] / c["p50"]
            assert ("error" in c) == (record["mode"] == "forward-inference" and name == OURS)
            assert name == OURS or record["ratios"][name] == c["p50"] / record["candidates"][OURS]["p50"]
        if key.startswith("tiny backward-full") and record["launch"] == "eager":
            ours = record["memory"][OURS]
            assert 0 < ours["saved_frozen"] < ours["saved"] and ours["peak_full"] > ours["peak_frozen"] > 0
            assert [g["verdict"] for g in record["goals"]] == ["target met"] * 2
    rows = (trial / "gpu-speed.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * len(speed["results"])
    assert "A trial of the program on the cpu" in (trial / "gpu-speed.md").read_text()


def test_profile_has_shares_and_names_what_it_lacks(trial: Path) -> None:
    profile = read(trial, "profile")
    for record in profile["results"].values():
        assert sum(row["share"] for row in record["kernels"]) == pytest.approx(1)
    assert all("ncu" in reason for reason in profile["left_out"].values())


def test_a_trial_is_no_result(trial: Path) -> None:
    results, refused = gpu_status.read_results(trial)
    assert results == {} and len(refused) == 3
    said = gpu_status.status(results, refused, gpu_status.source_digests())
    assert all(f"{phase}: never run on a GPU" in said for phase in gpu_status.PHASES)
    assert "No figure has been measured on a GPU yet" in gpu_status.figures_block(results)


def test_without_a_gpu_nothing_is_run(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = gpu_run("--out", str(tmp_path))
    assert done.returncode == 2 and "no CUDA device" in done.stderr and not list(tmp_path.iterdir())


def test_a_trial_does_not_write_among_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu import run as gpu_run

    assert gpu_run.main(["--device", "cpu", "--quick"]) == 2
    assert "--out for a folder that holds no results" in capsys.readouterr().err


def test_the_tests_for_a_gpu_run_on_the_cpu() -> None:
    """With small sizes: that they are right about the ops' CPU kernels. The op table has its own test."""
    files = [str(p) for p in (ROOT / "tests/gpu").glob("test_*.py") if p.stem.split("_")[1] in ("layer", "memory", "streams")]
    environ = {**os.environ, "MOE_GPU_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not float16 and not float32", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout.splitlines()[-1]


# ---- adding up, and time
def run_speed(job: gpu_speed.Job, folder: Path, seconds: float = 60.0) -> ResultFile:
    file = ResultFile(folder, "speed", Cpu(), {".md": gpu_tables.as_markdown})
    file.begin([])
    gpu_speed.run(job, Cpu(), file, Deadline(seconds))
    return file


def test_short_runs_add_up(tmp_path: Path) -> None:
    first = run_speed(FEW, tmp_path, seconds=-1.0)
    assert set(first.data["left_out"].values()) == {"no time was left"} and not first.data["results"]
    assert "no time was left (tiny forward-inference T=16 eager; " in (tmp_path / "gpu-speed.md").read_text()
    one = replace(FEW, modes=("forward-inference",))
    assert len(run_speed(one, tmp_path).data["results"]) == 2
    last = run_speed(replace(FEW, modes=("backward-full",)), tmp_path).data
    assert len(last["results"]) == 4 and last["left_out"] == {} and len(last["runs"]) == 3


def test_a_run_with_other_peers_does_not_displace_the_first(tmp_path: Path) -> None:
    job = replace(FEW, modes=("backward-full",), tokens=(128,))
    run_speed(replace(job, peers=(OURS, CUBLAS, GROUPED_MM)), tmp_path)
    results = run_speed(replace(job, peers=(OURS, CUBLAS, TRANSFORMERS)), tmp_path).data["results"]
    assert set(results) == {"tiny backward-full T=128 eager", f"tiny backward-full T=128 eager ({TRANSFORMERS})"}
    memory = results[f"tiny backward-full T=128 eager ({TRANSFORMERS})"]["memory"]
    assert memory[OURS]["saved"] < memory[TRANSFORMERS]["saved"] and memory[OURS]["saved_frozen"] < memory[TRANSFORMERS]["saved_frozen"]


def test_results_of_other_sources_are_kept_beside_the_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = run_speed(FEW, tmp_path).data
    monkeypatch.setattr("benchmarks.gpu.results.source_digests", lambda: {"csrc/kernels/cuda/sort.cu": "0"})
    monkeypatch.setattr("benchmarks.gpu.results.library", lambda: {"sha256": "0", "sources": "0", "older_than": []})
    file = ResultFile(tmp_path, "speed", Cpu())
    assert "its digest is" in str(file.displaced) and file.data["results"] == {}
    (other,) = tmp_path.glob("gpu-speed-*.json")
    assert json.loads(other.read_text()) == old


def test_a_run_that_is_killed_leaves_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_speed, "memory", killed)  # in the second mode
    with pytest.raises(KeyboardInterrupt):
        run_speed(replace(FEW, tokens=(128,)), tmp_path)
    left = read(tmp_path, "speed")
    assert list(left["results"]) == ["tiny forward-inference T=128 eager"] and left["runs"][-1]["finished"] is False
    assert (tmp_path / "gpu-speed.md").exists() and not list(tmp_path.glob("*.part"))


def test_a_case_that_does_not_fit_says_how_long_it_would_take(tmp_path: Path) -> None:
    job = replace(FEW, sample_ms=1e5, modes=("forward-inference",))
    reasons = run_speed(job, tmp_path, seconds=5.0).data["left_out"].values()
    assert all(reason.startswith("would take") and "were left" in reason for reason in reasons) and len(reasons) == 2


def test_a_wrong_result_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(layer: gpu_peers.Layer) -> gpu_peers.Candidate:
        right = gpu_peers.ours(layer)
        return gpu_peers.Candidate(lambda i, x, w: right.forward(i, x, w) * 1.1, layer.weights)

    monkeypatch.setitem(gpu_peers.PEERS, OURS, wrong)
    found = run_speed(replace(FEW, tokens=(128,)), tmp_path).data
    assert list(gpu_status.failures(found)) == [f"tiny forward-inference T=128 eager {OURS}"]
    assert "moe_ext is WRONG: error" in (tmp_path / "gpu-speed.md").read_text()


def test_a_test_that_fails_and_takes_its_process_along_keeps_both_reasons(tmp_path: Path) -> None:
    outcomes, file = tmp_path / "outcomes", ResultFile(tmp_path, "correctness", Cpu())
    file.begin([])
    failed = {"test": "a", "outcome": "failed", "seconds": 1.0, "message": "illegal access"}
    outcomes.write_text("\n".join([json.dumps({"collected": ["a", "b", "c"]}), json.dumps(failed), '{"test": "half a li']))
    gpu_correctness.absorb(outcomes, file)
    gpu_correctness.conclude(outcomes, {"a": "the device no longer answers after it", "b": "no answer in 9 s"}, file)
    messages = {test: record["message"] for test, record in file.data["results"].items()}
    assert messages == {"a": "illegal access\nthe device no longer answers after it", "b": "no answer in 9 s"}
    assert file.data["left_out"] == {"c": "no time was left"}


def test_what_a_process_was_lost_in_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = "tiny forward-inference T=128 eager"
    abandoned = {f"{case} | {OURS}": "no answer in 9 s", "tiny backward-full T=128 eager | taking turns": "exit code 1"}
    (tmp_path / "abandoned.json").write_text(json.dumps(abandoned))
    monkeypatch.setenv("MOE_GPU_WORKER", str(tmp_path))
    found = run_speed(replace(FEW, tokens=(128,)), tmp_path).data
    assert set(found["results"][case]["candidates"]) == {CUBLAS}
    assert gpu_status.failures(found) == {f"{case} {OURS}": "no answer in 9 s"}
    assert found["left_out"] == {"tiny backward-full T=128 eager": "taking turns: exit code 1"}


WORKER = """
import os, sys, time, json, pathlib
folder = pathlib.Path(os.environ["MOE_GPU_WORKER"])
lost = json.loads((folder / "abandoned.json").read_text()) if (folder / "abandoned.json").exists() else {}
for name in ("fine", "dies", "hangs", "last"):
    if name in lost: continue
    (folder / "begun").write_text(name)
    if name == "dies": os.kill(os.getpid(), 11)
    if name == "hangs": time.sleep(60)
    with (folder / "done").open("a") as f: f.write(name + " ")
"""


def test_lost_workers_are_replaced(tmp_path: Path) -> None:
    lost = supervise(lambda seconds: [sys.executable, "-c", WORKER], tmp_path, Deadline(60), 2.0, {})
    assert lost == {"dies": "the process ended with SIGSEGV", "hangs": "no answer in 2 s"}
    assert (tmp_path / "done").read_text().split() == ["fine", "fine", "fine", "last"]


def test_a_worker_that_cannot_start_is_tried_once(tmp_path: Path) -> None:
    assert supervise(lambda seconds: [sys.executable, "-c", "raise SystemExit(9)"], tmp_path, Deadline(60), 5.0, {}) == {
        "start": "the process ended with exit code 9"
    }


def test_packages_that_are_brought_along_come_before_installed_ones(tmp_path: Path) -> None:
    (tmp_path / "pytest.py").write_text("NAME = 'brought'\n")
    code = "import pytest, benchmarks.gpu.status; print(pytest.NAME)"
    environ = {**os.environ, **search_path(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], cwd="/", env=environ, capture_output=True, text=True).stdout == "brought\n"


# ---- what times mean
def expected_hit(case: Case) -> float:
    s = case.shape
    return s.E * (1 - (1 - s.K / s.E) ** case.tokens)


@pytest.mark.parametrize(("shape", "tokens", "microseconds"), [
    ("qwen3", 1, (17.6, 17.6, 298.5, 17.6)), ("qwen3", 1024, (304.3, 310.2, 610.6, 316.0)), ("qwen3", 4096, (391.4, 398.0, 782.9, 421.4)),
    ("qwen3", 16384, (1565.8, 1565.8, 3131.5, 1565.8)), ("mixtral", 64, (657.9, 659.6, 1320.5, 661.3)),
    ("gpt_oss", 1024, (395.0, 406.0, 812.0, 417.0)),
])  # fmt: skip
def test_floors_are_those_computed_by_hand(shape: str, tokens: int, microseconds: tuple[float, ...]) -> None:
    for mode, us in zip(MODES, microseconds, strict=True):
        case = Case(SHAPES[shape], mode, tokens)
        assert round(1e3 * case.floor_ms(expected_hit(case)), 1) == us, mode


def times(**p50: float) -> dict[str, dict[str, Any]]:
    return {name: {"p20": t, "p50": t, "p80": t, "samples": 15} for name, t in p50.items()}


def test_goals_are_judged_in_their_direction() -> None:
    def verdicts(mode: str, tokens: int, launch: str = "eager", **p50: float) -> dict[str, str]:
        return {g["of"]: g["verdict"] for g in gpu_goals.derive(Case(SHAPES["qwen3"], mode, tokens, launch), 128, times(**p50))["goals"]}

    units = Case(SHAPES["qwen3"], "forward-training", 16384).flops()
    for tflops, verdict in ((560, "target met"), (510, "must met"), (499, "missed")):
        assert verdicts("forward-training", 16384, moe_ext=units / tflops / 1e9) == {OURS: verdict}
    assert verdicts("forward-inference", 1, "graph", moe_ext=0.05) == {OURS: "must met"}
    assert verdicts("forward-inference", 1, moe_ext=0.05) == {}
    assert verdicts("backward-full", 64, moe_ext=1.0, **{TRANSFORMERS: 1.9, LIGER: 2.1}) == {TRANSFORMERS: "missed", LIGER: "target met"}


# ---- Nsight Compute
NCU = """#!/bin/sh
echo '==PROF== Connected'
echo '"ID","Process ID","Process Name","Host Name","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","1","python","here","f(int)","GPU Speed Of Light Throughput","Memory Throughput","%","91.2"'
echo '"0","1","python","here","f(int)","Memory Workload Analysis","L2 Hit Rate","%","50.1"'
echo '"1","1","python","here","g(int)","GPU Speed Of Light Throughput","Memory Throughput","%","12.0"'
echo "$@" > ARGUMENTS
exit CODE
"""


@pytest.mark.parametrize("code", [0, 1])
def test_counters_are_read_from_ncu(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ncu"
    program.write_text(NCU.replace("CODE", str(code)).replace("ARGUMENTS", str(tmp_path / "arguments")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    case, file = Case(SHAPES["tiny"], "forward-inference", 16), ResultFile(tmp_path, "profile", Cpu(), {".md": gpu_profile.as_markdown})
    file.begin([])
    file.record(case.key, {"kernels": [{"name": "void moe::f<int>(int)", "launches": 1.0, "us": 2.0, "share": 1.0}]})
    gpu_profile.counters(case, Cpu(), file, Deadline(60))
    asked = (tmp_path / "arguments").read_text()
    assert "--clock-control none" in asked and "--section SpeedOfLight" in asked and "regex:^(f)$" in asked
    if code:
        assert "exit code 1" in file.data["left_out"][f"ncu {case.key}"]
        return
    first, second = file.data["results"][case.key]["ncu"]
    assert (first["name"], second["name"]) == ("f(int)", "g(int)")
    assert ["Memory Workload Analysis", "L2 Hit Rate", "%", "50.1"] in first["metrics"]


@pytest.mark.parametrize(("kernel", "name"), [
    ("void moe::(anonymous namespace)::unpermute_kernel<float, 4>(float const*, int)", "unpermute_kernel"),
    ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<int, (int)3> >(Params)", "device_kernel"),
    ("sort_kernel", "sort_kernel"),
])  # fmt: skip
def test_function_names_of_kernels(kernel: str, name: str) -> None:
    assert gpu_profile.base_name(kernel) == name


# ---- what it is about
def test_the_recorded_instructions_are_todays() -> None:
    assert json.loads(FILE.read_text())["source"] == source_digest(), "instructions.cu has changed: run python -m tests.gpusim.record"


def test_ops_are_those_of_this_tree() -> None:
    assert Path(ops.__file__).is_relative_to(ROOT)
