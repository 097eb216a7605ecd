"""What each op moves and multiplies on the simulated GPU, beside the least it could: docs/gpu-counters.json and .md.

`python -m tools.gpu_counters` measures and writes both, `--check` names what differs from the file. Bytes are the 32-byte
sectors a launch touches, loaded and stored, summed over the launches of an op; the least is every input and result once.
T tokens, K top_k, S = T*K, E experts of which E_act have rows, H hidden size, I intermediate size, N columns; bfloat16.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from build_tools import toolchain
from moe_ext.testing import SimulatedGpu, simulated_gpu
from tests.helpers.op_table import Build, Case, Maker, Needs, activation_case, backward_of, layer, mm_case, rows_case

from . import gpusim_build

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "gpu-counters.json"
ARCHITECTURES = (80, 90)
STACKED = Needs.HIDDEN_STATES | Needs.TOP_K_WEIGHTS | Needs.GATE_UP | Needs.DOWN
FROZEN = Needs.HIDDEN_STATES | Needs.TOP_K_WEIGHTS
MM = "2*S*H + 2*E_act*H*N + 2*S*N"
FORWARD = "6*H*I*E_act + 4*T*H + S*(4*I + 4*H)"  # of a layer: x, weights, activation written and read, rows written and read, result
Counters = dict[str, int]


@dataclass(frozen=True)
class Shape:
    """Every second expert has rows (op_table's "sparse")."""

    T: int
    K: int
    E: int
    H: int
    I: int  # noqa: E741
    N: int

    @property
    def dimensions(self) -> dict[str, int]:
        return {**vars(self), "S": self.T * self.K, "E_act": (self.E + 1) // 2}

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in vars(self).items())


SHAPES = {"few rows": Shape(T=96, K=2, E=8, H=128, I=64, N=192), "many rows": Shape(T=400, K=2, E=3, H=128, I=136, N=264)}


@dataclass(frozen=True)
class Row:
    """One op: how its arguments are made, the least bytes and multiply-adds, and, of a layer, the part of its launches meant."""

    what: str
    op: str
    least: str
    useful: str = "0"
    part: str = "all"

    def build(self, s: Shape) -> Build:
        rows: dict[str, Any] = {"T": s.T, "K": s.K, "E": s.E, "H": s.H, "ids": "sparse"}
        if self.op == "sort_by_expert":
            return lambda m: ((m.ids("sparse", s.T, s.K, s.E, torch.int64), s.E), {})
        if "permute" in self.op:
            return rows_case(self.op, weighted=self.op == "unpermute", **rows)
        if "activation" in self.op:
            return activation_case(backward=self.op.endswith("backward"), S=s.T * s.K, I=s.I)
        if self.op.startswith("grouped_mm") or self.op == "grouped_bias_grad":
            sizes: dict[str, Any] = {"T": s.T, "K": s.K, "E": s.E, "inputs": s.H, "outputs": s.N, "ids": "sparse"}
            return mm_case(self.op, transposed="N-major" in self.what, **sizes)
        whole = layer(I=s.I, **rows)
        return backward_of(whole, FROZEN if "frozen" in self.what else STACKED) if self.op == "_grouped_backward" else whole


ROWS = [
    Row("sort", "sort_by_expert", "8*S + 4*(E + 1) + 8*S"),
    Row("permute", "permute", "2*T*H + 4*S + 2*S*H"),
    Row("unpermute", "unpermute", "2*S*H + 8*S + 2*T*H"),
    Row("unpermute backward", "unpermute_backward", "2*T*H + 2*S*H + 8*S + 2*S*H + 4*S"),
    Row("activation", "gated_activation", "4*S*I + 2*S*I"),
    Row("activation backward", "gated_activation_backward", "2*S*I + 4*S*I + 4*S*I"),
    Row("grouped_mm, K-major weights", "grouped_mm", MM, "S*H*N"),
    Row("grouped_mm, N-major weights", "grouped_mm", MM, "S*H*N"),
    Row("up projection and activation", "grouped_forward", "2*T*H + 4*S + 4*H*I*E_act + 2*S*I", "2*S*H*I", "up projection"),
    Row("weight gradient", "grouped_mm_wgrad", "2*S*H + 2*S*N + 2*E*H*N", "S*H*N"),
    Row("bias gradient", "grouped_bias_grad", "2*S*H + 2*E*H"),
    Row("layer, inference", "grouped_forward", FORWARD, "3*S*H*I"),
    Row("layer, training forward", "_grouped_forward_train", FORWARD + " + 4*S*I", "3*S*H*I"),
    Row("layer, backward", "_grouped_backward", "6*H*I*(E_act + E) + 8*T*H + S*(20*I + 4*H)", "6*S*H*I"),
    Row("layer, backward, experts frozen", "_grouped_backward", "6*H*I*E_act + 4*T*H + S*(12*I + 4*H)", "3*S*H*I"),
]


def launches_of(row: Row, shape: Shape, gpu: SimulatedGpu) -> list[dict[str, Any]]:
    args, kwargs = row.build(shape)(Maker(torch.bfloat16, row.what))
    gpu.take_launches()
    Case(row.op, row.what).function(*args, **kwargs)
    launches = gpu.take_launches()
    if row.part == "all":
        return launches
    # From the sort to the activation, which may be part of the projection's kernel.
    names = [launch["kernel"] for launch in launches]
    first = max(i for i, name in enumerate(names) if "sort_cu" in name) + 1
    last = next(i for i, name in enumerate(names) if any(word in name for word in ("activation_cu", "grouped_up_sm90_cu", "GroupedUp")))
    return launches[first : last + 1]


def measure(gpu: SimulatedGpu, architecture: int) -> Iterator[tuple[str, Counters]]:
    for label, shape in SHAPES.items():
        for row in ROWS:
            launches = launches_of(row, shape, gpu)
            total = {k: sum(launch[k] for launch in launches) for k in launches[0] if k != "kernel"}
            yield f"{row.what}; sm_{architecture}; {label}", {"kernels": len(launches), **total}


def measure_all(architectures: tuple[int, ...] = ARCHITECTURES) -> dict[str, Counters]:
    found: dict[str, Counters] = {}
    folder = gpusim_build.build().simulator.parent
    for architecture in architectures:
        with simulated_gpu(folder, architecture) as gpu:
            found |= measure(gpu, architecture)
    return found


def nvcc_version() -> str:
    return toolchain.find_cuda(os.environ).version


def differences(found: dict[str, Counters], recorded: dict[str, Any]) -> list[str]:
    """Sentences, of the ops in `found` only; what the compiler decides counts under the recorded nvcc only."""
    lines = [f"{key}: is measured but not recorded" for key in found.keys() - recorded["counters"].keys()]
    for key in found.keys() & recorded["counters"].keys():
        new, old = found[key], recorded["counters"][key]
        for name in new:
            if new[name] == old[name] or (name in COMPILED and nvcc_version() != recorded["nvcc"]):
                continue
            more = "more" if new[name] > old[name] else "fewer"
            what = f"moves {more} bytes" if name in BYTES else f"counts {more}"
            lines.append(f"{key}: {what} than recorded ({name}: {new[name]} instead of {old[name]}); `make gpu-counters` records anew")
    return sorted(lines)


BYTES = ("global_loaded", "global_stored", "unique_loaded", "unique_stored")
COMPILED = ("instructions", "global_loaded", "global_stored", "shared_accesses", "bank_conflicts")
HEAD = """# What the CUDA kernels move

Counted while the kernels' PTX ran on the simulated GPU (`tests/gpusim`), not measured on a device: nothing here is a time. bfloat16.
`make gpu-counters` writes this file; a test compares it with a fresh count.

- **bytes**: 32-byte sectors of global memory that a launch loads and stores, each once, summed over the launches of the op; **least** is
  the formula: every input and result once, for a layer that of its fused kernels.
- **requested**: bytes that threads ask for, so what caches must serve, as a multiple of the least.
- **multiply-adds**: issued to tensor cores, as a multiple of the useful ones: the rest is padding of tiles.
- **bank conflicts**: extra accesses of shared memory, per access. **waits**: barriers that a warp waited at. **instructions**: of warps.

T tokens, K top_k, S = T*K, E experts of which E_act have rows, H hidden size, I intermediate size, N columns of the other operand.
"""


def table(counters: dict[str, Counters]) -> str:
    text = HEAD
    for label, shape in SHAPES.items():
        for architecture in ARCHITECTURES:
            text += f"\n## sm_{architecture}, {label}: {shape}\n\n| op | launches | least | bytes | of least | requested | multiply-adds |"
            text += " bank conflicts | waits | instructions |\n" + "|---" * 10 + "|\n"
            for row in ROWS:
                text += line(row, shape, counters[f"{row.what}; sm_{architecture}; {label}"])
    return (
        text
        + "\n## Formulas\n\n| op | least bytes | useful multiply-adds |\n|---|---|---|\n"
        + "".join(f"| {r.what} | {r.least.replace('*', ' ')} | {r.useful.replace('*', ' ')} |\n" for r in ROWS)
    )


def line(row: Row, shape: Shape, c: Counters) -> str:
    least, useful = (eval(f, {}, shape.dimensions) for f in (row.least, row.useful))
    moved, requested = c["unique_loaded"] + c["unique_stored"], c["global_loaded"] + c["global_stored"]
    products = f"{c['tensor_macs'] / useful:.2f}" if useful else "-"
    conflicts = f"{c['bank_conflicts'] / c['shared_accesses']:.2f}" if c["shared_accesses"] else "-"
    cells = (row.what, c["kernels"], least, moved, f"{moved / least:.2f}", f"{requested / least:.1f}", products, conflicts)
    return "| " + " | ".join(str(cell) for cell in (*cells, c["barrier_waits"], c["instructions"])) + " |\n"


def main() -> int:
    counters = measure_all()
    if "--check" in sys.argv:
        lines = differences(counters, json.loads(FILE.read_text()))
        print("\n".join(lines) or "as recorded")
        return int(bool(lines))
    text = ",\n".join(f"  {json.dumps(key)}: {json.dumps(counts)}" for key, counts in counters.items())
    FILE.write_text(f'{{"nvcc": "{nvcc_version()}", "counters": {{\n{text}\n}}}}\n')
    FILE.with_suffix(".md").write_text(table(counters))
    print(table(counters))
    return 0


if __name__ == "__main__":
    sys.exit(main())
