"""Frozen 4-bit experts, as under QLoRA: the ModuleList loop of bitsandbytes' Linear4bit against moe_ext, forward and backward to the
hidden states and routing weights.

    python -m benchmarks.bench_4bit [--shapes small qwen3] [--dtypes bfloat16] [--tokens 16 512] [--quick]

Hidden states, computation and the weights before they were quantized have one dtype; NF4 with double quantization, blocks of 64.
Reading the modules is part of each call of moe_ext. All candidates of a row share the packed weights and run in turns.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from benchmarks.harness import Candidate, machine, markdown_table, measure, milliseconds, write
from benchmarks.shapes import SHAPES, Shape, routing
from moe_ext import functional, testing
from moe_ext.cli.memory import peak_bytes
from moe_ext.experts import ExpertWeights
from moe_ext.integrations.run.bitsandbytes import DenseCache, Quantized4bit, read

LOOP, RECOMPUTE, CACHE = "bitsandbytes, ModuleList loop", "moe_ext, recompute", "moe_ext, cache"
NAMES = (LOOP, RECOMPUTE, CACHE)
TOP_K = {"small": 8}  # otherwise that of the shape


class Expert(nn.Module):
    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (linear(shape.H, shape.I, dtype) for _ in range(2))
        self.down_proj = linear(shape.I, shape.H, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def linear(in_features: int, out_features: int, dtype: torch.dtype) -> Linear4bit:
    made = Linear4bit(in_features, out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
    made.weight.data = (torch.randn(out_features, in_features) / in_features**0.5).to(dtype)
    return made.to("cpu")


class Loop(nn.ModuleList):
    """As in transformers 4: only experts with tokens run."""

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(top_k_index, num_classes=len(self)).permute(2, 1, 0)
        for e in mask.sum(dim=(1, 2)).nonzero().flatten().tolist():
            k, token = torch.where(mask[e])
            out.index_add_(0, token, (self[e](x[token]) * top_k_weights[token, k, None]).to(out.dtype))
        return out


def grouped(experts: Loop, cache: DenseCache | None) -> Callable[..., Tensor]:
    def run(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        found: dict[str, Any] = {
            name: read([e._modules[name] for e in experts], x, cache) for name in ("gate_proj", "up_proj", "down_proj")
        }
        assert all(isinstance(projection, Quantized4bit) for projection in found.values()), found
        return functional.grouped_experts(x, top_k_index, top_k_weights, ExpertWeights(**found))

    return run


def run_row(shape: Shape, experts: Loop, dtype: torch.dtype, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    index, w = routing(shape, tokens)
    leaves = [torch.randn(tokens, shape.H).to(dtype).requires_grad_(), w.requires_grad_()]
    cotangent, cache = torch.randn(tokens, shape.H).to(dtype), DenseCache()
    functions: dict[str, Callable[..., Tensor]] = {LOOP: experts, RECOMPUTE: grouped(experts, None), CACHE: grouped(experts, cache)}

    def step(function: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(leaves[0], index, leaves[1]), leaves, cotangent)

    steps = {name: step(function) for name, function in functions.items()}
    timings = measure([Candidate(name, run) for name, run in steps.items()], args.seconds, args.longest)
    memory = {name: peak_bytes(run) for name, run in steps.items()}
    outputs = {name: function(leaves[0], index, leaves[1]) for name, function in functions.items()}
    return {
        "shape": shape.name, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "threads": torch.get_num_threads(),
        "ms": timings,
        "peak_mib": {name: None if size is None else round(size / 2**20, 2) for name, size in memory.items()},
        "difference": {name: testing.relative_error(outputs[name], outputs[LOOP]) for name in (RECOMPUTE, CACHE)},
    }  # fmt: skip


HEADER = ("shape", "dtype", "T", "threads", *NAMES, "loop / recompute", "loop / cache")


def table_row(row: dict[str, Any], what: str) -> list[str]:
    values = {n: row["ms"][n].median if what == "ms" else row["peak_mib"][n] for n in NAMES}
    cells = [milliseconds(row["ms"][n]) if what == "ms" else "-" if values[n] is None else f"{values[n]:.1f}" for n in NAMES]
    ratios = [f"{values[LOOP] / values[n]:.2f}" if values[LOOP] and values[n] else "-" for n in (RECOMPUTE, CACHE)]
    return [row["shape"], row["dtype"], str(row["tokens"]), str(row["threads"]), *cells, *ratios]


def report(data: dict[str, Any]) -> str:
    m, rows = data["machine"], data["rows"]
    used = [with_top_k(name) for name in dict.fromkeys(row["shape"] for row in rows)]
    sizes = "; ".join(f"{s.name}: E={s.E}, H={s.H}, I={s.I}, top {s.K}" for s in used)
    found = [(row["dtype"], max(row["difference"].values())) for row in rows]
    worst = ", ".join(f"{max(d for n, d in found if n == dtype):.1e} in {dtype}" for dtype in dict.fromkeys(n for n, _ in found))
    return "\n".join(
        [
            "# 4-bit experts\n",
            f"{m['cpu']}, {m['cores']} cores ({', '.join(m['instruction_sets'])}), {m['memory_gib']} GiB; torch {m['torch']}, "
            f"bitsandbytes {m['bitsandbytes']}. {sizes}.",
            "A forward and a backward of one frozen expert layer in NF4 with double quantization. Ratios above 1: moe_ext is better.\n",
            f"Milliseconds: median [20th-80th percentile] of calls that take turns. Load average when the run began: {m['load_before']}.\n",
            markdown_table(HEADER, [table_row(row, "ms") for row in rows]),
            "Memory, MiB: tensors alive at the peak of a step beyond those before it, by PyTorch's profiler. What a cache keeps is not",
            "in it: of an expert that has had tokens, its dense weights and a copy of the packed ones.\n",
            markdown_table(HEADER, [table_row(row, "mib") for row in rows]),
            f"Outputs differ from the loop's by at most {worst}, relative to their norm.\n",
        ]
    )


def with_top_k(name: str) -> Shape:
    return replace(SHAPES[name], K=TOP_K.get(name, SHAPES[name].K))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "qwen3"])
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["float32", "bfloat16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 512])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="one is steadier on a machine with other load")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row of the table, beyond the least number of rounds")
    parser.add_argument("--longest", type=float, default=20.0, help="a candidate whose one call takes more seconds is skipped")
    parser.add_argument("--quick", action="store_true", help="the smallest shape, few rounds: tries the benchmark, writes nothing")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.tokens, args.seconds = ["tiny"], [16], 0.1
    return args


def main() -> None:
    import bitsandbytes

    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    data: dict[str, Any] = {"machine": machine() | {"bitsandbytes": bitsandbytes.__version__}, "rows": []}
    for name in args.shapes:
        shape = with_top_k(name)
        for dtype_name in args.dtypes:
            dtype = getattr(torch, dtype_name)
            experts = Loop(Expert(shape, dtype) for _ in range(shape.E)).requires_grad_(False)
            for tokens in args.tokens:
                data["rows"].append(run_row(shape, experts, dtype, tokens, args))
                print(*table_row(data["rows"][-1], "ms"), sep="  ", flush=True)
                gc.collect()
            del experts  # before the next ones are made
    print(report(data))
    if not args.quick:
        print("wrote", *write("nf4_cpu", data, report(data)))


if __name__ == "__main__":
    main()
