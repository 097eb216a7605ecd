"""Everything CUDA that this tree has, on the GPU of this machine, in one command: tests, speed, profile; writes what happened.

    python -m benchmarks.gpu.run [--only correctness speed profile] [--seconds 540] [--out FOLDER]

Writes gpu-correctness.json, gpu-speed.json (.csv, .md) and gpu-profile.json (.md) after every case; runs of the same sources on the
same machine add up. A phase that runs out of time names what it left out. Needs no network. The op libraries are built first if they
are not beside moe_ext's modules; the build counts as part of the time. `--device cpu` tries the program without a GPU: its files say
so, and nothing accepts them as results. The exit status is 1 when a test failed or a result was wrong, 2 when nothing could be run.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Nothing here may import moe_ext, which has no libraries yet in a bare checkout. `phases` does, after the build.
from benchmarks.gpu.cases import DEFAULT_SHAPES, DEFAULT_TOKENS, MODES, PEER_NAMES
from benchmarks.gpu.status import PHASES, RESULTS
from benchmarks.gpu.supervise import ROOT, Deadline, start, stop
from benchmarks.shapes import SHAPES

LIBRARIES = {"cpu": ("libmoe_cpu.so",), "cuda": ("libmoe_cpu.so", "libmoe_cuda.so")}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES), help="phases to run")
    parser.add_argument("--seconds", type=float, default=540, help="for everything together")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the files go, and where earlier ones are added to")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(DEFAULT_SHAPES), help="of the speed phase, in order")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(DEFAULT_TOKENS), help="of the speed phase, in order")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of the speed phase")
    parser.add_argument("--peers", nargs="*", choices=PEER_NAMES, default=list(PEER_NAMES), help="beside moe_ext and cuBLAS")
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


def missing_libraries(device: str, package: Path) -> list[str]:
    return [name for name in LIBRARIES[device] if not (package / name).exists()]


def build(device: str, deadline: Deadline, root: Path = ROOT) -> list[str]:
    """Builds the op libraries unless they are there, built or brought along; what is missing after that."""
    package = root / "moe_ext"
    if missing := missing_libraries(device, package):
        print(f"{' and '.join(missing)} not found in {package}: building", flush=True)
        environ = os.environ if device == "cuda" else {"MOE_EXT_CUDA": "0", **os.environ}
        # Everything that it prints is about errors, or about progress: nobody reads it as a result.
        worker = start([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=root, env=environ, stdout=sys.stderr)
        try:
            worker.wait(timeout=max(0.0, deadline.left))
        except subprocess.TimeoutExpired:
            print("the build took longer than all of --seconds", file=sys.stderr)
        finally:
            stop(worker)  # with its compilers
    return missing_libraries(device, package)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    whole = Deadline(options.seconds)
    if options.device == "cpu" and (not options.quick or options.out == RESULTS):
        print("--device cpu is a trial of the program: it needs --quick, and --out for a folder that holds no results", file=sys.stderr)
        return 2
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device: nothing was run (--device cpu --quick tries the program)", file=sys.stderr)
            return 2
    if not options.worker:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is stopped on the way out
        if missing := build(options.device, whole):
            print(f"moe_ext/{' and moe_ext/'.join(missing)}: not there, and could not be built: nothing was run", file=sys.stderr)
            return 2

    from benchmarks.gpu import phases

    return phases.run(options, sys.argv[1:] if arguments is None else arguments, whole)


if __name__ == "__main__":
    sys.exit(main())
