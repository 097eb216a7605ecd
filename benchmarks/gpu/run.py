"""Everything CUDA that this tree has, on the GPU of this machine, in one command: tests, speed, profile; writes what happened.

    python -m benchmarks.gpu.run [--only correctness speed profile] [--seconds 540] [--out FOLDER]

Writes gpu-correctness.json, gpu-speed.json (.csv, .md) and gpu-profile.json (.md) after every case; runs of the same sources on the
same machine add up. A phase that runs out of time names what it left out. Needs no network. `--device cpu` tries the program without
a GPU: its files say so, and nothing accepts them as results. The exit status is 1 when a test failed or a result was wrong, 2
when nothing could be run.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import cases, correctness, peers, profile, speed, tables
from benchmarks.gpu.device import Device, device_named
from benchmarks.gpu.results import Render, ResultFile
from benchmarks.gpu.status import PHASES, RESULTS, failures
from benchmarks.gpu.supervise import DONE, LOST, ROOT, Deadline, search_path, supervise
from benchmarks.shapes import SHAPES

SHARE = {"correctness": 0.35, "speed": 0.5, "profile": 0.15}  # of the time; what a phase does not need, the next ones have
RENDERS: dict[str, dict[str, Render]] = {
    "correctness": {},
    "speed": {".csv": tables.as_csv, ".md": tables.as_markdown},
    "profile": {".md": profile.as_markdown},
}
SILENCE = 240  # seconds: a peer that tunes itself compiles dozens of variants


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES), help="phases to run")
    parser.add_argument("--seconds", type=float, default=540, help="for everything together")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the files go, and where earlier ones are added to")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(speed.DEFAULT_SHAPES), help="of the speed phase, in order")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(speed.DEFAULT_TOKENS), help="of the speed phase, in order")
    parser.add_argument("--modes", nargs="+", choices=cases.MODES, default=list(cases.MODES), help="of the speed phase")
    parser.add_argument("--peers", nargs="*", choices=peers.NAMES, default=list(peers.NAMES), help="beside moe_ext and cuBLAS")
    parser.add_argument("--bring", type=Path, help="a folder of packages that are not installed (pip install --target), for peers")
    parser.add_argument("--tests", nargs="+", default=["tests/gpu"], help="of the correctness phase, as pytest takes them")
    parser.add_argument("--processes", type=int, default=4, help="of the correctness phase")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the program, with --quick")
    parser.add_argument("--quick", action="store_true", help="a tiny layer and few samples: tries the program, measures nothing")
    parser.add_argument("--worker", choices=("speed", "profile"), help=argparse.SUPPRESS)  # a phase, in a process of its own
    options = parser.parse_args(arguments)
    if options.quick:
        options.shapes, options.tokens = ["tiny"], [16, 128]
    return options


def jobs(options: argparse.Namespace) -> tuple[speed.Job, profile.Job]:
    names = [cases.OURS, cases.CUBLAS, *(peers.NAMES[name] for name in options.peers)]
    timed = speed.Job(options.shapes, options.tokens, options.modes, names)
    if options.quick:
        timed.samples, timed.sample_ms = 3, 0.01
        return timed, profile.Job("tiny", (16,))
    return timed, profile.Job()


def build(deadline: Deadline) -> bool:
    """Whether the library is there: it was brought along, or it is built."""
    library = ROOT / "moe_ext" / "libmoe_cuda.so"
    if not library.exists():
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        try:
            subprocess.run(command, cwd=ROOT, timeout=deadline.left)
        except subprocess.TimeoutExpired:
            print("the build took longer than all of --seconds", file=sys.stderr)
    return library.exists()


def work(options: argparse.Namespace, device: Device) -> int:
    """One phase in this process, after `run_phase` in another has begun its file."""
    file = ResultFile(options.out, options.worker, device, RENDERS[options.worker])
    file.resume()
    deadline, (timed, profiled) = Deadline(options.seconds), jobs(options)
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


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was run (--device cpu --quick tries the program)", file=sys.stderr)
        return 2
    if options.device == "cpu" and (not options.quick or options.out == RESULTS):
        print("--device cpu is a trial of the program: it needs --quick, and --out for a folder that holds no results", file=sys.stderr)
        return 2
    device = device_named(options.device)
    if options.worker:
        return work(options, device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # workers are stopped on the way out
    whole = Deadline(options.seconds)
    if options.device == "cuda" and not build(whole):
        print("moe_ext/libmoe_cuda.so is not there and could not be built: nothing was run", file=sys.stderr)
        return 2
    status, phases = 0, [phase for phase in PHASES if phase in options.only]
    given = list(sys.argv[1:] if arguments is None else arguments)
    for number, phase in enumerate(phases):
        share = SHARE[phase] / sum(SHARE[other] for other in phases[number:])
        file = run_phase(phase, options, given, device, Deadline(share * whole.left))
        failed, left_out = failures(file.data), file.data["left_out"]
        status |= bool(failed)
        print(f"{phase}: {len(file.data['results'])} results, {len(failed)} failed, {len(left_out)} left out; {file.path}")
        for key, message in failed.items():
            print(f"  failed: {key}: {message.splitlines()[0] if message else ''}")
    return status


if __name__ == "__main__":
    sys.exit(main())
