"""Everything CUDA that this tree has, on the GPU of this machine, in one command: builds if needed, tests, writes what happened.

    python benchmarks/gpu_run.py --out FOLDER

Writes gpu-correctness.json: the machine, versions, a digest of the CUDA sources, and the outcome of each test in tests/gpu. The exit
status is that of the tests; 2 without a GPU. Needs no network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc/kernels/*.h", "csrc/kernels/cuda/*", "csrc/ops/*", "csrc/registration/*cuda*", "csrc/registration/schemas.cpp")


def digest() -> str:
    """Of every source that the CUDA library is made of: results belong to exactly these."""
    total = hashlib.sha256()
    for path in sorted({p for pattern in SOURCES for p in ROOT.glob(pattern) if p.is_file()}):
        total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return total.hexdigest()


def machine() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_GiB": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "cuda_sources_sha256": digest(),
    }


def run_tests(seconds: float) -> tuple[int, dict[str, str]]:
    """Exit status, and test -> "passed", "skipped" or the first line of its failure."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        status = subprocess.run(command, cwd=ROOT, timeout=seconds).returncode
        outcomes = {}
        for case in ElementTree.parse(report).iter("testcase"):
            problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            name = f"{case.get('classname')}::{case.get('name')}"
            message = "" if problem is None else (problem.get("message") or "").splitlines()[0:1]
            outcomes[name] = "passed" if problem is None else f"{problem.tag}: {''.join(message)}"
    return status, outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the files go")
    parser.add_argument("--seconds", type=float, default=540, help="for everything together")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was run", file=sys.stderr)
        return 2
    begin = time.monotonic()
    if not (ROOT / "moe_ext" / "libmoe_cuda.so").exists():
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True, timeout=options.seconds)
    status, outcomes = run_tests(options.seconds - (time.monotonic() - begin))
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), "seconds": round(time.monotonic() - begin, 1), "tests": outcomes}, indent=1)
    (options.out / "gpu-correctness.json").write_text(text + "\n")
    passed = sum(outcome == "passed" for outcome in outcomes.values())
    print(f"{passed} of {len(outcomes)} passed; wrote {options.out / 'gpu-correctness.json'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
