"""Breaks kernels on purpose: one statement of PTX is dropped or changed as it is loaded, and a run of the op must notice.

`python -m tests.gpusim.mutations` writes the table of MUTATIONS with what caught each; `--sweep` drops every synchronising
statement of the kernels in turn, to find those that no run depends on. The tables are build products: build/gpusim/{mutations,sweep}.md.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moe_ext.testing import SimulatedGpu, SimulationError, simulated_gpu
from tests.gpusim.few_rows import FEW_ROWS_CASES
from tests.gpusim.harness import folder
from tests.helpers.error_rule import check_error_rule
from tests.helpers.op_table import ALL_STACKED, CASES, Build, Case, Maker, backward_of, layer, mm_case, rows_case

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
FEW, FEW_UP = "few_rows_kernelI13__nv_bfloat16LNS0_5MajorE0ENS_15GroupedMm", "few_rows_kernelI13__nv_bfloat16LNS0_5MajorE1ENS_15GroupedUp"
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
    Mutation("few rows: sums read before all are written", 80, "grouped_mm-few_long", FEW, "bar.sync"),
    Mutation("few rows: sums overwritten before all are read", 80, "grouped_mm-few_many_outputs", FEW, "bar.sync", 1),
    Mutation("few rows: a product dropped", 80, "grouped_mm-few_long", FEW, "mma.sync", 5),
    Mutation("few rows: a slice of weights not loaded", 80, "grouped_mm-few_long", FEW, "ld.global.nc.L1::no_allocate", 13),
    Mutation("few rows: a sum not stored", 80, "grouped_mm-few", FEW, "st.shared"),
    Mutation("few rows: rows of x not loaded", 80, "grouped_mm-few_long", FEW, "ld.global.nc.v4", 3),
    Mutation("few rows, up: a product dropped", 80, "grouped_forward-few_gpt_oss", FEW_UP, "mma.sync", 3),
    Mutation("few rows, up: sums overwritten", 80, "grouped_forward-few_wide_gpt_oss", FEW_UP, "bar.sync", 1),
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
    Mutation("registers: the producer keeps too many", 90, "grouped_mm-tails", SM90, "setmaxnreg.dec", 0, " 40=> 48"),
    Mutation("epilogue: a store not waited for", 90, "grouped_mm-large", SM90, "cp.async.bulk.wait_group.read", 2),
    Mutation("epilogue: the last store not waited for", 90, "grouped_mm-large", SM90, "cp.async.bulk.wait_group.read", 10),
    Mutation("tensor map: copied before the warp has it", 90, "grouped_mm-tails", SM90, "bar.warp.sync", 1),
]
SYNCHRONISING = (
    "bar.sync", "bar.warp.sync", "barrier.cluster", "mbarrier.arrive", "mbarrier.try_wait", "cp.async.wait_group", "cp.async.commit_group",
    "cp.async.mbarrier", "cp.async.bulk.wait_group", "cp.async.bulk.commit_group", "wgmma.wait_group", "wgmma.commit_group", "fence.proxy",
)  # fmt: skip


def find_case(name: str) -> Case:
    from tests.gpusim.test_gpusim_ops import HOPPER_CASES, WIDE_CASES

    return next(c for c in [*HOPPER_CASES, *WIDE_CASES, *FEW_ROWS_CASES, *CASES] if str(c) == name)


@contextmanager
def mutated(setting: str, architecture: int, **mode: str | int) -> Iterator[SimulatedGpu]:
    """Kernels are decoded anew, so that the statement is changed, and once more afterwards."""
    simulator = ctypes.CDLL(str(folder() / "libgpusim.so"))
    simulator.gpusim_forget_kernels()
    try:
        with simulated_gpu(folder(), architecture, MUTATE=setting, **{"LIMIT": 200_000_000} | mode) as gpu:
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
    rows = ["# Kernels broken on purpose", "", "Written by `python -m tests.gpusim.mutations`.", ""]
    rows += ["| mutation | kernel | caught |", "|---|---|---|"]
    for m in mutations:
        how = re.sub(r"_ZN?\w{40,}", "...", caught_by(m)) or "**not caught**"
        rows.append(f"| {m.what} | {m.case}, sm_{m.architecture} | {how} |")
        print(rows[-1], file=sys.stderr, flush=True)
    return "\n".join(rows) + "\n"


# ---- the sweep
@dataclass(frozen=True)
class Sweep:
    """Every synchronising statement of the kernels whose names contain `kernel` is dropped, in a run of one op.

    More k-blocks than stages, and more tiles than blocks (`multiprocessors`): what protects the second use of a buffer is needed.
    """

    name: str
    architecture: int
    kernel: str
    op: str
    build: Build
    multiprocessors: int = 2

    def run(self, setting: str = "none;-;0;drop", **mode: str | int) -> tuple[list[torch.Tensor], int]:
        """The results, and how many instructions the kernels took."""
        with mutated(setting, self.architecture, **{"SMS": self.multiprocessors, "LIMIT": 200_000_000} | mode) as gpu:
            args, kwargs = self.build(Maker(torch.bfloat16, self.name))
            results = Case(self.op, self.name).function(*args, **kwargs)
            results = [results] if isinstance(results, torch.Tensor) else list(results)
            return [r.clone() for r in results], max(launch["instructions"] for launch in gpu.take_launches())

    def sites(self) -> list[tuple[str, int]]:
        return [(text, k) for text in SYNCHRONISING for k in range(self.count(text))]

    def count(self, text: str) -> int:
        """How many statements match, as the simulator says on stderr (of the process, so a file is put in its place)."""
        kept = os.dup(2)
        with tempfile.TemporaryFile("w+") as said:
            os.dup2(said.fileno(), 2)
            try:
                self.run(f"{self.kernel};{text};count;print")
            finally:
                os.dup2(kept, 2)
                os.close(kept)
            said.seek(0)
            return max((int(n) for n in re.findall(r"gpusim: (\d+) statements of", said.read())), default=0)

    def noticed(self, text: str, k: int, expected: list[torch.Tensor], instructions: int) -> str:
        """How the drop of one statement shows (a wait with a predicate: taken as true), or ''."""
        action = "true" if text == "mbarrier.try_wait" else "drop"
        for mode in SWEEP_MODES:
            name = " ".join(f"{key}={value}" for key, value in mode.items() if key != "STRICT")
            try:
                found, _ = self.run(f"{self.kernel};{text};{k};{action}", LIMIT=20 * instructions, **mode)
            except (SimulationError, RuntimeError) as error:
                return f"{name}: {first_words(str(error))}"
            if not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)):
                return f"{name}: wrong result"
        return ""


def first_words(message: str) -> str:
    """What went wrong, without the kernel and the place."""
    message = re.sub(r"^_Z\w+: ", "", message)
    return re.split(r" at |: |, | in |; ", message)[0 if not message.startswith(("moe::", "moe_ext::")) else 1][:60]


SWEEP_MODES: list[dict[str, str | int]] = [{"ASYNC": "late", "STRICT": 1}, {"ASYNC": "early"}]
SWEEP_MODES += [{"ASYNC": seed, "SCHED": seed} for seed in range(1, 4)]
LARGE = {"T": 650, "E": 5, "inputs": 264, "outputs": 264}
SMALL = {"T": 200, "E": 7, "inputs": 584, "outputs": 136}
WIDE = {"T": 300, "E": 2, "inputs": 264, "outputs": 264}
BACKWARD = backward_of(layer(T=200, E=4, H=392, I=136), ALL_STACKED)
SWEEPS = [
    Sweep("sort", 80, "sort", "sort_by_expert", lambda m: ((m.ids("dropped", 4400, 4, 37, torch.int32), 37), {})),
    Sweep("unpermute backward", 80, "unpermute_backward", "unpermute_backward", rows_case("unpermute_backward", H=2120)),
    Sweep("bias gradient", 80, "bias_grad", "grouped_bias_grad", mm_case("grouped_bias_grad", T=90)),
    Sweep("mma.sync", 80, SM80, "grouped_mm", mm_case("grouped_mm", **SMALL)),
    Sweep("mma.sync wgrad", 80, WGRAD, "grouped_mm_wgrad", mm_case("grouped_mm_wgrad", **WIDE)),
    Sweep("ping-pong", 90, SM90, "grouped_mm", mm_case("grouped_mm", **SMALL)),
    Sweep("cooperative", 90, SM90, "grouped_mm", mm_case("grouped_mm", **LARGE)),
    Sweep("cooperative wgrad", 90, SM90, "grouped_mm_wgrad", mm_case("grouped_mm_wgrad", **WIDE)),
    Sweep("few rows", 80, "few_rows_kernel", "grouped_forward", layer(T=8, E=9, H=328, I=136)),
    Sweep("up, ping-pong", 90, "grouped_up_sm90", "_grouped_forward_train", layer(T=150, E=4, H=328, I=136)),
    Sweep("up, cooperative", 90, "grouped_up_sm90", "_grouped_forward_train", layer(T=520, E=4, H=328, I=136)),
    Sweep("down backward", 90, "grouped_down_backward_sm90", "_grouped_backward", BACKWARD),
    Sweep("gathered wgrad", 90, GATHER, "_grouped_backward", BACKWARD),
]


# Why a drop is not noticed: read in the PTX around the statement, whose number is its place among those with the same words.
NO_SOURCE = "waits for, or frees, a tile of C, and this epilogue has none"
TAIL = "a producer's wait before it ends: needed when the other block of a cluster, or a consumer, is a whole tile behind"
DESCRIPTOR = "no bulk copy reads the descriptor in shared memory: maps are read where they were copied to"
SCHEDULER = "orders what no asynchronous copy touches: the scheduler's tile numbers"
ONE_LANE = "between two parts that the same elected lane runs, or that share nothing"
ORDERED = "the order is also that of another barrier: the next tile's number is read before its loads are announced"
AHEAD = "waits again for what was just looked for: the loads were always issued before, in every order tried"
BOTH_ORDER = "the cluster's barrier behind it orders the same"
STACK = "acquires the maps of a list of matrices: here they are a stack"
IN_STEP = "lanes that have not diverged run in step here, and go on to an instruction that they execute together or one of them does"
EPILOGUE = "the two groups' epilogues take turns, and each ends with a wait for all its stores"
REASONS = (
    (("cooperative", "cooperative wgrad"), "bar.warp.sync", (0, 3, 4, 5), ONE_LANE),
    (("cooperative", "cooperative wgrad"), "mbarrier.try_wait", range(4, 12), NO_SOURCE),
    (("cooperative", "cooperative wgrad"), "mbarrier.try_wait", (12,), ORDERED),
    (("cooperative", "cooperative wgrad"), "mbarrier.try_wait", (13,), "needed from the ninth tile of a block on"),
    (("cooperative", "cooperative wgrad"), "mbarrier.try_wait", (22,), "lets the loads of A and B go first, for speed"),
    (("cooperative", "cooperative wgrad"), "mbarrier.try_wait", (*range(14, 22), *range(32, 36), *range(38, 42)), TAIL),
    (("cooperative", "cooperative wgrad"), "mbarrier.try_wait", (1, 3), AHEAD),
    (("cooperative", "cooperative wgrad"), "cp.async.bulk", (0, 9, 11, 12), DESCRIPTOR),
    (("cooperative", "cooperative wgrad"), "cp.async.bulk.commit_group", (10,), DESCRIPTOR),
    (("cooperative", "cooperative wgrad"), "fence.proxy", range(1, 16, 2), NO_SOURCE),
    (("cooperative", "cooperative wgrad"), "fence.proxy", (17, 18, 19, 22), SCHEDULER),
    (("ping-pong",), "bar.warp.sync", (0, 3, 4, 5), ONE_LANE),
    (("ping-pong",), "mbarrier.try_wait", range(6, 10), NO_SOURCE),
    (("ping-pong",), "mbarrier.try_wait", (10,), ORDERED),
    (("ping-pong",), "mbarrier.try_wait", (12,), "needed from the ninth tile of a block on"),
    (("ping-pong",), "mbarrier.try_wait", (21,), "lets the loads of A and B go first, for speed"),
    (("ping-pong",), "mbarrier.try_wait", (*range(13, 21), *range(27, 31), *range(33, 42)), TAIL),
    (("ping-pong",), "cp.async.bulk.wait_group", (0, 5, 7, 8), DESCRIPTOR),
    (("ping-pong",), "cp.async.bulk.commit_group", (0, 5, 6, 7), DESCRIPTOR),
    (("ping-pong",), "cp.async.bulk.wait_group", (1, 4), EPILOGUE),
    (("ping-pong",), "bar.sync", (2, 8), EPILOGUE),
    (("ping-pong",), "fence.proxy", range(1, 8, 2), NO_SOURCE),
    (("ping-pong",), "fence.proxy", (9, 10, 11, 12, 15, 16), SCHEDULER),
    (("up, cooperative",), "bar.sync", (0,), BOTH_ORDER),
    (("up, ping-pong", "up, cooperative"), "fence.proxy", (7, 8), STACK),
    (("down backward",), "fence.proxy", (9,), STACK),
    (("down backward",), "bar.warp.sync", (*range(0, 32, 4), *range(2, 32, 8), *range(3, 32, 8)), IN_STEP),
)


def why_not(name: str, text: str, k: int) -> str:
    reasons = [reason for names, part, ks, reason in REASONS if name in names and text.startswith(part) and k in ks]
    return f"no: {reasons[0]}" if reasons else "**no**, and nobody has said why"


HEAD = """# Synchronising statements that are dropped

Each in turn, as the kernel's PTX is loaded (a wait with a predicate is taken as true), in one run per order of events on the simulated
GPU. Written by `python -m tests.gpusim.mutations --sweep`, or of some kernels with their names after `--sweep`; the reasons are
REASONS in that file.

"""


def with_reason(row: str) -> str:
    """A row of a drop that was not noticed, with the reason of today."""
    found = re.fullmatch(r"\| (.+), sm_\d+ \| (.+) (\d+) \| (?:no: |\*\*no\*\*).* \|", row)
    return row if found is None else f"{row[: row.rindex(' | ')]} | {why_not(found[1], found[2], int(found[3]))} |"


def sweep(chosen: list[Sweep], before: str = "") -> str:
    """The table; rows of kernels that are not chosen are taken from the one before."""
    rows = {one.name: [with_reason(r) for r in before.splitlines() if r.startswith(f"| {one.name}, sm_")] for one in SWEEPS}
    for one in chosen:
        expected, instructions = one.run()
        rows[one.name] = []
        for text, k in one.sites():
            how = one.noticed(text, k, expected, instructions) or why_not(one.name, text, k)
            rows[one.name].append(f"| {one.name}, sm_{one.architecture} | {text} {k} | {how} |")
            print(rows[one.name][-1], file=sys.stderr, flush=True)
    found = [row for of_kernel in rows.values() for row in of_kernel]
    missed = sum("| no: " in row or "| **no**" in row for row in found)
    head = f"{len(found) - missed} of {len(found)} drops are noticed.\n\n| kernel | dropped | noticed |\n|---|---|---|\n"
    return HEAD + head + "\n".join(found) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sweep",
        nargs="*",
        metavar="NAME",
        help="names of SWEEPS, or none for all; reasons: nothing is run, the table gets today's reasons",
    )
    parser.add_argument("--kernel", help="with one name: another part of the kernels' mangled names")
    parser.add_argument("--markdown", type=Path, help="where to write the table, if not to build/gpusim")
    options = parser.parse_args()
    output = options.markdown or folder() / ("mutations.md" if options.sweep is None else "sweep.md")
    if options.sweep is None:
        text = table(MUTATIONS)
    else:
        chosen = [one for one in SWEEPS if one.name in (options.sweep or [one.name])]
        before = output.read_text() if output.exists() else ""
        text = sweep([replace(one, kernel=options.kernel or one.kernel) for one in chosen], before)
    output.write_text(text)
    print(f"wrote {output}")
