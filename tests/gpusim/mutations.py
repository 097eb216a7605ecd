"""Breaks kernels on purpose: one statement of PTX is dropped or changed as it is loaded, and a run of the op must notice.

`python tests/gpusim/mutations.py` prints the table of MUTATIONS with what caught each; `--sweep` drops every synchronising
statement of the kernels in turn, to find those that no run depends on.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent)]

from error_rule import check_error_rule  # noqa: E402
from op_table import CASES, Case  # noqa: E402

from gpusim.harness import folder  # noqa: E402
from moe_ext.testing import SimulatedGpu, SimulationError, simulated_gpu  # noqa: E402

MODES: list[dict[str, str]] = [{"ASYNC": "late"}, {"ASYNC": "early"}, {"ASYNC": "1", "SCHED": "1"}, {"ASYNC": "2", "SCHED": "2"}]


@dataclass(frozen=True)
class Mutation:
    """`kernel` is part of the mangled name; the k-th statement with `text` is changed by `action` (ptx/mutation.h)."""

    what: str
    architecture: int
    case: str
    kernel: str
    text: str
    k: int = 0
    action: str = "drop"

    @property
    def setting(self) -> str:
        return f"{self.kernel};{self.text};{self.k};{self.action}"


SM80, WGRAD, SM90, GATHER = "grouped_mm_cu", "grouped_mm_wgrad_cu", "GemmUniversal", "wgrad_gather_kernel"
TAILS, NOINC = "grouped_mm_wgrad-tails", "cp.async.mbarrier.arrive.noinc.shared::cta.b64"
MUTATIONS = [
    Mutation("sort: first barrier dropped", 80, "sort_by_expert-random_int64", "sort_kernel", "bar.sync"),
    Mutation("sort: second barrier dropped", 80, "sort_by_expert-random_int64", "sort_kernel", "bar.sync", 1),
    Mutation("sort: another lane's rank", 80, "sort_by_expert-random_int64", "sort_kernel", "popc.b32", 0, "popc=>brev"),
    Mutation("row sum: barrier dropped", 80, "unpermute_backward-wide_long", "unpermute_backward", "bar.sync"),
    Mutation("row sum: shuffle distance", 80, "unpermute_backward-wide", "unpermute_backward", "shfl.sync.down", 1, "down=>up"),
    Mutation("permute: a 16-byte store dropped", 80, "permute-wide_long", "14permute_kernel", "st.global.v4.b32", 1),
    Mutation("unpermute: a row not added", 80, "unpermute-weighted", "16unpermute_kernel", "fma.rn.f32", 4),
    Mutation("mma.sync: copies not waited for", 80, "grouped_mm-large", SM80, "cp.async.wait_group"),
    Mutation("mma.sync: one stage too few waited for", 80, "grouped_mm-large", SM80, "cp.async.wait_group", 0, " 2=> 3"),
    Mutation("mma.sync: barrier of the loop dropped", 80, "grouped_mm-large", SM80, "bar.sync"),
    Mutation("mma.sync: a product dropped", 80, "grouped_mm-large", SM80, "mma.sync", 3),
    Mutation("mma.sync: a fragment of another matrix", 80, "grouped_mm-large", SM80, "ldmatrix", 1, ".x4.shared=>.x4.trans.shared"),
    Mutation("mma.sync: a copy dropped", 80, "grouped_mm-large", SM80, "cp.async.cg", 1),
    Mutation("mma.sync: barrier before the sums are put down dropped", 80, "grouped_mm-large", SM80, "bar.sync", 1),
    Mutation("mma.sync: barrier before the sums are taken up dropped", 80, "grouped_mm-large", SM80, "bar.sync", 2),
    Mutation("mma.sync: half of a result's sums", 80, "grouped_mm-large", SM80, "ld.shared.v4.f32", 1),
    Mutation("wgrad mma.sync: barrier dropped", 80, "grouped_mm_wgrad-tails", WGRAD, "bar.sync"),
    Mutation("wgrad mma.sync: copies not waited for", 80, "grouped_mm_wgrad-tails", WGRAD, "cp.async.wait_group"),
    Mutation("wgmma: a product dropped", 90, "grouped_mm-tails", SM90, "wgmma.mma_async"),
    Mutation("wgmma: accumulators reset within a tile", 90, "grouped_mm-tails", SM90, "setp.ne.b32 p", 1, ", 0=>, 1"),
    Mutation("wgmma: A negated", 90, "grouped_mm-tails", SM90, "wgmma.mma_async", 1, "p, 1, 1=>p, -1, 1"),
    Mutation("TMA: load of an operand dropped", 90, "grouped_mm-tails", SM90, "cp.async.bulk.tensor"),
    Mutation("TMA: full barrier not waited for", 90, "grouped_mm-tails", SM90, "mbarrier.try_wait", 3, "true"),
    Mutation("TMA: number of bytes not announced", 90, "grouped_mm-tails", SM90, "mbarrier.arrive.expect_tx"),
    Mutation("tensor map: size not replaced", 90, "grouped_mm-tails", SM90, "tensormap.replace.tile.global_dim"),
    Mutation("tensor map: address not replaced", 90, "grouped_mm-tails", SM90, "tensormap.replace.tile.global_address"),
    Mutation("tensor map: stride not replaced", 90, "grouped_mm-tails", SM90, "tensormap.replace.tile.global_stride"),
    Mutation("tensor map: fence dropped", 90, "grouped_mm-tails", SM90, "fence.proxy.tensormap"),
    Mutation("epilogue: stmatrix dropped", 90, "grouped_mm-tails", SM90, "stmatrix"),
    Mutation("epilogue: barrier dropped", 90, "grouped_mm-large", SM90, "bar.sync"),
    Mutation("cluster: barrier dropped", 90, "grouped_mm-large", SM90, "barrier.cluster.wait"),
    Mutation("cluster: arrival at the other CTA dropped", 90, "grouped_mm-large", SM90, "mbarrier.arrive.shared::cluster"),
    Mutation("wgrad: product dropped", 90, "grouped_mm_wgrad-many_rows", SM90, "wgmma.mma_async", 2),
    Mutation("wgrad gather: product dropped", 90, TAILS, GATHER, "wgmma.mma_async", 1),
    Mutation("wgrad gather: the other order of a", 90, TAILS, GATHER, "wgmma.mma_async", 0, "p, 1, 1, 1, 1=>p, 1, 1, 0, 1"),
    Mutation("wgrad gather: copy dropped", 90, TAILS, GATHER, "cp.async.cg", 5),
    Mutation("wgrad gather: arrival before the copies", 90, TAILS, GATHER, NOINC, 0, f"{NOINC}=>mbarrier.arrive.shared::cta.b64 _,"),
    Mutation("wgrad gather: stage filled before it is free", 90, TAILS, GATHER, "mbarrier.try_wait", 0, "true"),
    Mutation("wgrad gather: box read before it is written", 90, TAILS, GATHER, "bar.warp.sync"),
]
SYNCHRONISING = (
    "bar.sync", "bar.warp.sync", "barrier.cluster", "mbarrier.arrive", "mbarrier.try_wait", "cp.async.wait_group", "cp.async.commit_group",
    "cp.async.bulk.wait_group", "cp.async.bulk.commit_group", "wgmma.wait_group", "wgmma.commit_group", "fence.proxy",
)  # fmt: skip


def find_case(name: str) -> Case:
    from test_gpusim_ops import HOPPER_CASES, WIDE_CASES

    return next(c for c in [*HOPPER_CASES, *WIDE_CASES, *CASES] if str(c) == name)


@contextmanager
def mutated(setting: str, architecture: int, **mode: str) -> Iterator[SimulatedGpu]:
    """Kernels are decoded anew, so that the statement is changed, and once more afterwards."""
    simulator = ctypes.CDLL(str(folder() / "libgpusim.so"))
    simulator.gpusim_forget_kernels()
    try:
        with simulated_gpu(folder(), architecture, MUTATE=setting, LIMIT=200_000_000, **mode) as gpu:
            yield gpu
    finally:
        simulator.gpusim_forget_kernels()


def caught_by(m: Mutation, modes: list[dict[str, str]] | None = None) -> str:
    """The mode that noticed and how, or ''."""
    for mode in modes or MODES:
        name = ", ".join(f"{k}={v}" for k, v in mode.items())
        try:
            with mutated(m.setting, m.architecture, **mode):
                check_error_rule(find_case(m.case), torch.bfloat16, "cpu")
        except SimulationError as error:
            return f"{name}: {str(error).splitlines()[0][:90]}"
        except AssertionError:
            return f"{name}: wrong result"
        except RuntimeError as error:
            return f"{name}: {str(error)[:90]}"
    return ""


def kernels_of_9_0() -> bool:
    """Whether the library has the CUTLASS kernels."""
    with simulated_gpu(folder()) as gpu:
        return any(SM90 in kernel for kernel in gpu.kernels())


def table(mutations: list[Mutation]) -> str:
    rows = ["| mutation | kernel | caught |", "|---|---|---|"]
    for m in mutations:
        how = re.sub(r"_ZN?\w{40,}", "...", caught_by(m)) or "**not caught**"
        rows.append(f"| {m.what} | {m.case}, sm_{m.architecture} | {how} |")
        print(rows[-1], file=sys.stderr, flush=True)
    return "\n".join(rows)


def sweep() -> list[Mutation]:
    """Every synchronising statement of the kernels above, each dropped (a wait with a predicate: taken as true)."""
    found = []
    for architecture, case, kernel in (
        (80, "grouped_mm-large", SM80),
        (80, "grouped_mm_wgrad-tails", WGRAD),
        (90, "grouped_mm-large", SM90),
    ):
        for text in SYNCHRONISING:
            for k in range(count(architecture, case, kernel, text)):
                action = "true" if text == "mbarrier.try_wait" else "drop"
                found.append(Mutation(f"{text} {k}", architecture, case, kernel, text, k, action))
    return found


def count(architecture: int, case: str, kernel: str, text: str) -> int:
    """How many statements match, as the simulator says on stderr (of the process, so a pipe is put in its place)."""
    reading, writing = os.pipe()
    kept = os.dup(2)
    os.dup2(writing, 2)
    try:
        with mutated(f"{kernel};{text};count;print", architecture):
            args, kwargs = find_case(case).inputs(torch.bfloat16)
            find_case(case).function(*args, **kwargs)
    finally:
        os.dup2(kept, 2)
        os.close(writing)
    said = os.read(reading, 1 << 16).decode()
    os.close(reading)
    return max((int(n) for n in re.findall(r"gpusim: (\d+) statements of", said)), default=0)


if __name__ == "__main__":
    print(table(sweep() if "--sweep" in sys.argv else MUTATIONS))
