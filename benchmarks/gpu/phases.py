"""The phases of benchmarks.gpu.run: what each runs, in which processes, and its share of the time.

This imports moe_ext, so it is imported once the libraries are there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import cases, correctness, profile, speed, tables
from benchmarks.gpu.device import Device, device_named
from benchmarks.gpu.results import Render, ResultFile
from benchmarks.gpu.status import PHASES, failures
from benchmarks.gpu.supervise import DONE, LOST, Deadline, search_path, supervise

SHARE = {"correctness": 0.35, "speed": 0.5, "profile": 0.15}  # of the time; what a phase does not need, the next ones have
RENDERS: dict[str, dict[str, Render]] = {
    "correctness": {},
    "speed": {".csv": tables.as_csv, ".md": tables.as_markdown},
    "profile": {".md": profile.as_markdown},
}
SILENCE = 240  # seconds: a peer that tunes itself compiles dozens of variants


def jobs(options: argparse.Namespace) -> tuple[speed.Job, profile.Job]:
    names = [cases.OURS, cases.CUBLAS, *(cases.PEER_NAMES[name] for name in options.peers)]
    timed = speed.Job(options.shapes, options.tokens, options.modes, names)
    if options.quick:
        timed.samples, timed.sample_ms = 3, 0.01
        return timed, profile.Job("tiny", (16,))
    return timed, profile.Job()


def run(options: argparse.Namespace, given: Sequence[str], deadline: Deadline) -> int:
    """Every phase that was asked for, or one in this process if it is a worker; the exit status."""
    device = device_named(options.device)
    if options.worker:
        return work(options, device, deadline)
    status, phases = 0, [phase for phase in PHASES if phase in options.only]
    for number, phase in enumerate(phases):
        share = SHARE[phase] / sum(SHARE[other] for other in phases[number:])
        file = run_phase(phase, options, list(given), device, Deadline(share * deadline.left))
        failed, left_out = failures(file.data), file.data["left_out"]
        status |= bool(failed)
        print(f"{phase}: {len(file.data['results'])} results, {len(failed)} failed, {len(left_out)} left out; {file.path}")
        for key, message in failed.items():
            print(f"  failed: {key}: {message.splitlines()[0] if message else ''}")
    return status


def work(options: argparse.Namespace, device: Device, deadline: Deadline) -> int:
    """One phase in this process, after `run_phase` in another has begun its file."""
    file = ResultFile(options.out, options.worker, device, RENDERS[options.worker])
    file.resume()
    timed, profiled = jobs(options)
    try:
        if options.worker == "speed":
            speed.run(timed, device, file, deadline)
        else:
            profile.run(profiled, device, file, deadline)
    except speed.DeviceLost as error:
        print(error, file=sys.stderr)
        return LOST
    return DONE


def run_phase(phase: str, options: argparse.Namespace, arguments: list[str], device: Device, deadline: Deadline) -> ResultFile:
    file = ResultFile(options.out, phase, device, RENDERS[phase])
    if file.displaced:
        print(file.displaced)
    file.begin(arguments)
    if phase == "correctness":
        correctness.run(correctness.Tests(tuple(options.tests), options.processes), device, file, deadline)
    else:
        with tempfile.TemporaryDirectory() as folder:
            program = [sys.executable, "-m", "benchmarks.gpu.run", *arguments, "--worker", phase, "--seconds"]
            lost = supervise(lambda seconds: [*program, f"{seconds:.0f}"], Path(folder), deadline, SILENCE, search_path(options.bring))
        begun, file = file, ResultFile(options.out, phase, device, RENDERS[phase])  # what the workers have written
        file.started = begun.started
        for name, reason in lost.items():
            file.leave_out(name, reason)
    file.finish()
    return file
