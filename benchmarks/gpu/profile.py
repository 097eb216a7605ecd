"""The profile phase: time per kernel by torch.profiler, and what Nsight Compute's counters say of the slowest, where `ncu` is there.

`python -m benchmarks.gpu.profile SHAPE MODE TOKENS` makes one call, for ncu to watch.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.cases import OURS, Case, Record
from benchmarks.gpu.device import Device, device_named
from benchmarks.gpu.peers import PEERS, Inputs, Layer
from benchmarks.gpu.results import ResultFile
from benchmarks.gpu.speed import check_device, one_line
from benchmarks.gpu.supervise import Deadline, abandoned, announce, search_path, start, stop
from benchmarks.harness import markdown_table
from benchmarks.shapes import SHAPES

CALLS = 10
MODES = ("forward-inference", "forward-training", "backward-full", "backward-frozen")
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis")
NCU_MODES = ("forward-inference", "backward-full")
NCU_KERNELS, NCU_SECONDS = 3, 90
METRIC = ("Section Name", "Metric Name", "Metric Unit", "Metric Value")


@dataclass
class Job:
    shape: str = "qwen3"
    tokens: Sequence[int] = (16384, 1024)
    modes: Sequence[str] = MODES


def run(job: Job, device: Device, file: ResultFile, deadline: Deadline) -> None:
    torch.manual_seed(0)
    given_up, cases = abandoned(), [Case(SHAPES[job.shape], mode, tokens) for tokens in job.tokens for mode in job.modes]
    layer = Layer(SHAPES[job.shape], device.kind)
    for case in sorted(cases, key=lambda case: case.key in file.data["results"]):
        if deadline.left <= 0 or case.key in given_up:
            file.leave_out(case.key, given_up.get(case.key, "no time was left"))
            continue
        announce(case.key)
        try:
            call = PEERS[OURS](layer).call(Inputs.draw(layer, case.tokens, case.routing, 0), case.mode)
            file.record(case.key, {"shape": job.shape, "mode": case.mode, "tokens": case.tokens, "kernels": kernels(call, device)})
        except RuntimeError as error:
            file.leave_out(case.key, one_line(error))
            check_device(device, error)
    del layer
    for case in cases:
        if case.mode in NCU_MODES and case.key in file.data["results"]:
            announce(f"ncu {case.key}")
            if reason := given_up.get(f"ncu {case.key}"):
                file.leave_out(f"ncu {case.key}", reason)
            else:
                counters(case, device, file, deadline)


def kernels(call: Callable[[], Any], device: Device) -> list[Record]:
    """Name, launches and microseconds per call, and share of the whole, slowest first; on the CPU, of operators."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        call()
    device.synchronize()
    activities = [ProfilerActivity.CUDA] if device.kind == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(CALLS):
            call()
        device.synchronize()
    times = []
    for event in profiler.key_averages():
        on_device = str(event.device_type).endswith("CUDA")
        if on_device == (device.kind == "cuda"):
            times.append((event.key, event.count, event.self_device_time_total if on_device else event.self_cpu_time_total))
    total = sum(us for _, _, us in times) or 1.0
    rows = [{"name": name, "launches": count / CALLS, "us": us / CALLS, "share": us / total} for name, count, us in times if us]
    return sorted(rows, key=lambda row: -row["us"])


# ---- Nsight Compute
def counters(case: Case, device: Device, file: ResultFile, deadline: Deadline) -> None:
    """The sections of the slowest kernels, as ncu prints them, into the record of the case."""
    key, record = f"ncu {case.key}", file.data["results"][case.key]
    program = shutil.which("ncu")
    if program is None:
        file.leave_out(key, "ncu is not on PATH")
        return
    names = slowest(record["kernels"])
    if device.kind != "cuda":
        names = names or ["none"]
    if deadline.left < 30 or not names:
        file.leave_out(key, "no time was left" if names else "no kernel was seen")
        return
    options = [option for section in SECTIONS for option in ("--section", section)]
    command = [
        *(program, "--clock-control", "none", "--csv", "--page", "details", *options),
        *("--kernel-name", "regex:^(" + "|".join(map(re.escape, names)) + ")$", "--launch-count", str(2 * NCU_KERNELS)),
        *(sys.executable, "-m", "benchmarks.gpu.profile", case.shape.name, case.mode, str(case.tokens), device.kind),
    ]
    done = start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **search_path()})
    try:
        said, _ = done.communicate(timeout=min(NCU_SECONDS, deadline.left))
    except subprocess.TimeoutExpired as error:
        file.leave_out(key, f"ncu took longer than {error.timeout:.0f} s")
        return
    finally:
        stop(done)
    found = parse(said)
    if done.returncode or not found:
        file.leave_out(key, f"ncu ended with exit code {done.returncode}: {said.strip()[-400:]}")
        return
    file.record(case.key, record | {"ncu": found})
    file.data["left_out"].pop(key, None)


def slowest(rows: list[Record]) -> list[str]:
    """Function names of the slowest kernels, as ncu matches them: without return type, namespaces, template arguments, parameters."""
    names: list[str] = []
    for row in rows:
        name = base_name(row["name"])
        if name and name not in names and not name.startswith(("Mem", "[")):
            names.append(name)
    return names[:NCU_KERNELS]


def base_name(kernel: str) -> str:
    """`void ns::f<A<B>>(int)` to `f`."""
    text, depth = "", 0
    for c in kernel.replace("(anonymous namespace)::", ""):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            break
        text += c if depth == 0 and c != ">" else ""
    return text.split()[-1].split("::")[-1] if text.split() else ""


def parse(text: str) -> list[Record]:
    """One entry per kernel launch of ncu's CSV: name and metrics."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    launches: dict[str, Record] = {}
    for row in csv.DictReader(lines[start:]) if start is not None else ():
        launch = launches.setdefault(row["ID"], {"name": row["Kernel Name"], "metrics": []})
        if row.get("Metric Name"):
            launch["metrics"].append([row[column] for column in METRIC])
    return list(launches.values())


# ---- files
def as_markdown(data: Record) -> str:
    m = data["machine"]
    parts = ["# Kernels of the expert layer\n", f"{m['gpu']}, torch {data['versions']['torch']}; CUDA sources {data['digest']}.\n"]
    if data["device"] != "cuda":
        parts.append(f"A trial of the program on the {data['device']}: these are no kernels of a GPU.\n")
    for key, record in data["results"].items():
        rows = [(_cell(r["name"]), f"{r['launches']:g}", f"{r['us']:.1f}", f"{r['share']:.1%}") for r in record["kernels"]]
        parts += [f"## {key}\n", markdown_table(("kernel", "launches", "us", "share"), rows)]
        for launch in record.get("ncu", ()):
            parts += [f"`{base_name(launch['name'])}`\n", markdown_table(METRIC, launch["metrics"])]
    parts += ["## Not measured\n", *(f"- {key}: {reason}" for key, reason in data["left_out"].items())]
    return "\n".join(parts) + "\n"


def _cell(name: str) -> str:
    return name[:110].replace("|", "\\|")


def main(shape: str, mode: str, tokens: str, kind: str) -> None:
    device = device_named(kind)
    layer = Layer(SHAPES[shape], device.kind)
    PEERS[OURS](layer).call(Inputs.draw(layer, int(tokens), "uniform", 0), mode)()
    device.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
