"""torch.ops.moe.grouped_forward against transformers' eager, batched_mm and grouped_mm experts and against the ModuleList loop.

    python -m benchmarks.bench_grouped_forward [--shapes qwen3 olmoe] [--dtypes bfloat16] [--tokens 1 16] [--modes forward] [--quick]

Modes: forward (no gradients), frozen (forward and backward to x and the routing weights), full (and to all expert weights).
All candidates of a row share the weights and run in turns. Memory: the weights of one layer, twice that in mode full.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Candidate, Timing, ceiling, machine, markdown_table, measure, milliseconds, write
from benchmarks.peers import TRANSFORMERS, Experts, module_list_loop, transformers_experts
from benchmarks.shapes import ROUTINGS, SHAPES, Shape, routing
from moe_ext import ops, testing

MODES = ("forward", "frozen", "full")
OURS = ("moe_ext", "moe_ext list")
LOOP = "ModuleList loop"
PEERS = (*TRANSFORMERS, LOOP)
#: batched_mm copies the weights of every slot, and is meant for decoding.
BATCHED_MM_TOKENS = 16


class Layer:
    """One set of weights in memory, seen stacked and as one matrix per expert."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.gate_up_proj = nn.Parameter(torch.empty(shape.E, 2 * shape.I, shape.H, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(shape.E, shape.H, shape.I, dtype=dtype))
        with torch.no_grad():
            for stack in (self.gate_up_proj, self.down_proj):
                for matrix in stack:  # by expert: no float32 copy of the stack
                    matrix.copy_(torch.randn(matrix.shape) / matrix.shape[-1] ** 0.5)
        gate, up = self.gate_up_proj.detach().chunk(2, dim=1)
        self.gate, self.up, self.down = ([nn.Parameter(w) for w in stack] for stack in (gate, up, self.down_proj.detach()))
        self.stacked, self.listed = [self.gate_up_proj, self.down_proj], [*self.gate, *self.up, *self.down]

    def functions(self) -> tuple[dict[str, tuple[Experts, list[nn.Parameter]]], str | None]:
        """Name to (function, its expert parameters), and why transformers' are missing, if they are."""
        found = transformers_experts(self.shape, self.gate_up_proj, self.down_proj)
        missing = found if isinstance(found, str) else None
        peers = {} if isinstance(found, str) else {name: (experts, self.stacked) for name, experts in found.items()}
        return {
            **peers,
            LOOP: (module_list_loop(self.gate, self.up, self.down), self.listed),
            OURS[0]: (lambda x, index, w: ops.grouped_forward(x, index, w, self.gate_up_proj, self.down_proj), self.stacked),
            OURS[1]: (lambda x, index, w: ops.grouped_forward_list(x, index, w, self.gate, self.up, self.down), self.listed),
        }, missing


def step(experts: Experts, parameters: list[nn.Parameter], mode: str, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Any]:
    """What is timed: a forward, or a forward and the gradients of a fixed cotangent."""
    x, index, w = inputs
    if mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return experts(x, index, w)

        return forward
    cotangent = torch.randn_like(x)
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_(), *(parameters if mode == "full" else ())]

    def train() -> tuple[Tensor | None, ...]:
        # Experts without tokens have no gradient in the loops.
        return torch.autograd.grad(experts(leaves[0], index, leaves[1]), leaves, cotangent, allow_unused=True)

    return train


def probe_seconds(probe: Candidate) -> float:
    return (measure([probe], seconds=0, longest=float("inf"), rounds=(1, 1))[probe.name].median or 0.0) / 1e3


def extrapolate(past: list[tuple[int, Timing]], tokens: int) -> float:
    """Seconds for `tokens`, on the line through two measurements."""
    (t0, a), (t1, b) = past
    first, second = a.median or 0.0, b.median or 0.0
    return (second + (tokens - t1) * max(second - first, 0.0) / (t1 - t0)) / 1e3


History = dict[str, list[tuple[int, Timing]]]


def candidates(layer: Layer, mode: str, inputs: tuple[Tensor, Tensor, Tensor], history: History) -> list[Candidate]:
    """history: what each candidate took for fewer tokens, so that a call of minutes is not begun."""
    functions, missing = layer.functions()
    tokens, index = inputs[0].shape[0], inputs[1]
    found = [Candidate(name, lambda: None, skip=missing) for name in TRANSFORMERS if missing]
    for name, (experts, parameters) in functions.items():
        candidate = Candidate(name, step(experts, parameters, mode, inputs))
        if name == "batched_mm" and tokens > BATCHED_MM_TOKENS:
            copied = layer.shape.bytes_read(tokens * layer.shape.K, layer.dtype) / 1e9
            candidate.skip = f"copies the weights of every slot, {copied:.1f} GB"
        for fewer, timing in history.get(name, []):
            if timing.skipped and not candidate.skip:
                candidate.skip = f"skipped at T={fewer} already: {timing.skipped}"
        if len(history.get(name, [])) >= 2:
            candidate.estimate = lambda past=history[name][-2:]: extrapolate(past, tokens)
        if name == "eager" and mode == "full":
            # Each expert with tokens makes a gradient as large as the whole stack: one such expert is timed, and multiplied.
            one = (inputs[0], torch.zeros_like(index), inputs[2])
            probe, hit = Candidate(name, step(experts, parameters, mode, one)), index.unique().numel()

            candidate.estimate = lambda probe=probe, hit=hit: hit * probe_seconds(probe)
        found.append(candidate)
    return found


def differences(layer: Layer, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Relative difference of our outputs from the loop's: that the same thing was timed."""
    functions, _ = layer.functions()
    with torch.no_grad():
        outputs = {name: functions[name][0](*inputs) for name in (LOOP, *OURS)}
    return {name: testing.relative_error(outputs[name], outputs[LOOP]) for name in OURS}


def run_layer(layer: Layer, args: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    shape, rows = layer.shape, []
    for mode in args.modes:
        for parameter in (*layer.stacked, *layer.listed):
            parameter.requires_grad_(mode == "full")
        history: History = {}
        for tokens in sorted(set(args.tokens)):
            index, w = routing(shape, tokens, args.routing)
            inputs = (torch.randn(tokens, shape.H).to(layer.dtype), index, w.to(layer.dtype))
            row = {
                "shape": shape.name, "dtype": str(layer.dtype).removeprefix("torch."), "mode": mode, "tokens": tokens,
                "threads": threads, "gflop": shape.flops(tokens, mode) / 1e9,
                "weights_read_gb": shape.bytes_read(index.unique().numel(), layer.dtype) / 1e9,
                "difference": differences(layer, inputs),
                "ms": measure(candidates(layer, mode, inputs, history), args.seconds, args.longest),
            }  # fmt: skip
            rows.append(row)
            for name, timing in row["ms"].items():
                if name != "batched_mm":  # its limit is the memory
                    history.setdefault(name, []).append((tokens, timing))
            gc.collect()
            print(" ", *table_row(row), sep="  ", flush=True)
    return rows


def best(timings: dict[str, Timing], names: tuple[str, ...]) -> tuple[float, str] | None:
    return min(((t.median, name) for name in names if (t := timings[name]).median is not None), default=None)


HEADER = ("shape", "dtype", "threads", "mode", "T", *PEERS, *OURS, "best peer", "best peer / moe_ext", "/ moe_ext list", "GFLOP/s")


def table_row(row: dict[str, Any]) -> list[str]:
    timings: dict[str, Timing] = row["ms"]
    peer = best(timings, PEERS)
    ours = [timings[name].median for name in OURS]
    ratios = [f"{peer[0] / mine:.2f}" if peer and mine else "-" for mine in ours]
    speed = f"{1e3 * row['gflop'] / ours[0]:.1f}" if ours[0] else "-"
    names = [milliseconds(timings[name]) for name in (*PEERS, *OURS)]
    return [
        row["shape"],
        row["dtype"],
        str(row["threads"]),
        row["mode"],
        str(row["tokens"]),
        *names,
        peer[1] if peer else "-",
        *ratios,
        speed,
    ]


def report(data: dict[str, Any]) -> str:
    m, rows = data["machine"], data["rows"]
    text = [
        "# grouped_forward\n",
        f"{m['cpu']}, {m['cores']} cores ({', '.join(m['instruction_sets'])}), {m['memory_gib']} GiB; torch {m['torch']}, "
        f"transformers {m['transformers']}; routing {data['routing']}.",
        "Milliseconds: median [20th-80th percentile] of calls that take turns. Ratios above 1: moe_ext is faster than the best peer. "
        f"In mode full the {LOOP} makes gradients for experts with tokens only, all others for every expert.\n",
        markdown_table(HEADER, [table_row(row) for row in rows]),
        "What the machine gives at best:\n",
        markdown_table(
            ("dtype", "threads", "x @ w.T 2048^3, GFLOP/s", "read, GB/s", "copy, GB/s moved"),
            [
                (c["dtype"], c["threads"], *(f"{c[k]:.1f}" for k in ("mm_gflops", "read_gb_per_s", "copy_gb_per_s")))
                for c in data["ceilings"]
            ],
        ),
    ]
    skipped: dict[str, list[str]] = {}
    for row in rows:
        where = f"{row['shape']} {row['dtype']} {row['mode']} T={row['tokens']}"
        for name, timing in row["ms"].items():
            if timing.skipped:
                skipped.setdefault(f"{name}: {timing.skipped}", []).append(where)
    if skipped:
        text += ["Not measured:\n", *(f"- {reason} ({'; '.join(where)})" for reason, where in skipped.items()), ""]
    return "\n".join(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3"])
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32", "float16", "float64"), default=["bfloat16", "float32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 1024])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--routing", choices=ROUTINGS, default="uniform")
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row of the table, beyond the least number of rounds")
    parser.add_argument("--longest", type=float, default=20.0, help="a candidate whose one call takes more seconds is skipped")
    parser.add_argument("--out", help="name of the result files (default grouped_forward_cpu; with --quick nothing is written)")
    parser.add_argument("--quick", action="store_true", help="the smallest shape, few rounds: tries the benchmark, measures nothing")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.tokens, args.seconds = ["tiny"], [1, 16, 32], 0.1
    elif not args.out:
        args.out = "grouped_forward_cpu"
    return args


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    data: dict[str, Any] = {"machine": machine(), "routing": args.routing, "ceilings": [], "rows": []}
    try:
        import transformers

        transformers.logging.set_verbosity_error()
        data["machine"]["transformers"] = transformers.__version__
    except ImportError:
        data["machine"]["transformers"] = "not installed"
    print("  ", *HEADER, sep="  ")
    for dtype_name in args.dtypes:
        dtype = getattr(torch, dtype_name)
        for threads in args.threads:
            torch.set_num_threads(threads)
            sizes = {"size": 256, "megabytes": 16} if args.quick else {}
            data["ceilings"].append({"dtype": dtype_name, "threads": threads, **ceiling(dtype, **sizes)})
        for name in args.shapes:
            layer = Layer(SHAPES[name], dtype)
            for threads in args.threads:
                torch.set_num_threads(threads)
                data["rows"] += run_layer(layer, args, threads)
            del layer  # before the next one is made
            gc.collect()
            if args.out:
                write(args.out, data, report(data))  # what is there if the run is cut short
    if args.out:
        print("wrote", *write(args.out, data, report(data)))
    else:
        print(report(data))


if __name__ == "__main__":
    main()
