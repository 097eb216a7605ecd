"""A training step of one expert layer with LoRA of PEFT on every projection: moe_ext against PEFT's own way.

    python -m benchmarks.bench_lora [--shapes small] [--dtypes bfloat16] [--tokens 64 512] [--rank 16] [--threads 1] [--quick]

Stacked experts (transformers 5, `target_parameters`), where PEFT adds the adapters to the whole stack and transformers' grouped_mm or
loop multiplies with the sum; and one module per expert (`target_modules`), where PEFT's layers are called expert by expert.
A step is a forward, and a backward to the input, the routing weights and all factors; the experts are frozen, factors are float32.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import moe_ext
from benchmarks.harness import Candidate, machine, markdown_table, measure, milliseconds, write
from benchmarks.peers import transformers_experts
from benchmarks.shapes import SHAPES, Shape, routing
from moe_ext import functional, testing
from moe_ext.cli.memory import peak_bytes
from moe_ext.experts import ExpertWeights
from moe_ext.integrations.run.peft import project, unwrap

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PAIRS = {"moe_ext, stacked": "PEFT, grouped_mm", "moe_ext, listed": "PEFT, ModuleList loop"}
NAMES = ("PEFT, eager", "PEFT, grouped_mm", "moe_ext, stacked", "PEFT, ModuleList loop", "moe_ext, listed")

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """What PEFT wants around the experts, to put its wrappers there."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.experts(x, top_k_index, top_k_weights)


class Expert(nn.Module):
    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        for name, weight in zip(PROJECTIONS, weights, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Loop(nn.ModuleList):
    """One module per expert; only experts with tokens are called."""

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in top_k_index.unique().tolist():
            token, k = torch.where(top_k_index == e)
            out.index_add_(0, token, (self[e](x[token]) * top_k_weights[token, k, None]).to(out.dtype))
        return out


class Layer:
    """One set of weights, with the same adapters on it in every way there is: name to (function, its trainable factors)."""

    def __init__(self, shape: Shape, dtype: torch.dtype, rank: int) -> None:
        self.shape, self.dtype, self.rank = shape, dtype, rank
        gate_up = torch.randn(shape.E, 2 * shape.I, shape.H).div_(shape.H**0.5).to(dtype)
        down = torch.randn(shape.E, shape.H, shape.I).div_(shape.I**0.5).to(dtype)
        generator = torch.Generator().manual_seed(1)
        sizes = {"gate": (shape.H, shape.I), "up": (shape.H, shape.I), "gate_up": (shape.H, 2 * shape.I), "down": (shape.I, shape.H)}
        self.factors = {
            name: (torch.randn(shape.E, rank, n, generator=generator) / n**0.5, torch.randn(shape.E, m, rank, generator=generator) * 0.02)
            for name, (n, m) in sizes.items()
        }
        # Gate and up share their A where they are one projection: the listed form is given the same sums.
        a, b = self.factors["gate_up"]
        self.factors["gate"], self.factors["up"] = (a, b[:, : shape.I]), (a, b[:, shape.I :])
        self.functions: dict[str, tuple[Experts, list[nn.Parameter]]] = {}
        self.missing = self._add_stacked(nn.Parameter(gate_up, requires_grad=False), nn.Parameter(down, requires_grad=False))
        self._add_listed([*gate_up.chunk(2, dim=1), down])

    def _add_stacked(self, gate_up: nn.Parameter, down: nn.Parameter) -> str | None:
        for name, implementation in (("PEFT, eager", "eager"), ("PEFT, grouped_mm", "grouped_mm"), ("moe_ext, stacked", "grouped_mm")):
            found = transformers_experts(self.shape, gate_up, down)
            if isinstance(found, str):
                return found
            targets = ["experts.gate_up_proj", "experts.down_proj"]
            model = self._with_lora(Block(found[implementation]), target_modules=[], target_parameters=targets)
            for wrapper in (m for m in model.modules() if hasattr(m, "parameter_name")):
                a, b = self.factors[wrapper.parameter_name.removesuffix("_proj")]
                wrapper.lora_A["default"].weight.data = a.flatten(0, 1).clone()
                wrapper.lora_B["default"].weight.data = b.permute(1, 2, 0).flatten(1).contiguous()  # the experts run fastest
            if name.startswith("moe_ext"):
                moe_ext.enable(model, strict=True)
            self.functions[name] = (model.base_model.model, [p for p in model.parameters() if p.requires_grad])
        return None

    def _add_listed(self, weights: Sequence[Tensor]) -> None:
        loop = Loop(Expert([w[e] for w in weights]) for e in range(self.shape.E))
        model = self._with_lora(Block(loop.requires_grad_(False)), target_modules=list(PROJECTIONS))
        for e, expert in enumerate(loop):
            for name in PROJECTIONS:
                a, b = self.factors[name.removesuffix("_proj")]
                getattr(expert, name).lora_A["default"].weight.data = a[e].clone()
                getattr(expert, name).lora_B["default"].weight.data = b[e].clone()

        def grouped(x: Tensor, index: Tensor, w: Tensor) -> Tensor:
            found = {}
            for name in PROJECTIONS:
                taken = unwrap([expert._modules[name] for expert in loop])
                found[name] = project([base.weight for base in taken[0]], taken[1])
            return functional.grouped_experts(x, index, w, ExpertWeights(**found))

        factors = [p for p in model.parameters() if p.requires_grad]
        self.functions |= {"PEFT, ModuleList loop": (loop, factors), "moe_ext, listed": (grouped, factors)}

    def _with_lora(self, block: nn.Module, **targets: Any) -> Any:
        return get_peft_model(block, LoraConfig(r=self.rank, lora_alpha=2 * self.rank, **targets))


def step(experts: Experts, factors: list[nn.Parameter], inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Any]:
    x, index, w = inputs
    leaves, cotangent = [x.detach().requires_grad_(), w.detach().requires_grad_(), *factors], torch.randn_like(x)
    # The loop leaves experts without tokens without a gradient.
    return lambda: torch.autograd.grad(experts(leaves[0], index, leaves[1]), leaves, cotangent, allow_unused=True)


def run_row(layer: Layer, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    index, w = routing(layer.shape, tokens)
    inputs = (torch.randn(tokens, layer.shape.H).to(layer.dtype), index, w)
    steps = {name: step(*layer.functions[name], inputs) for name in layer.functions}
    candidates = [Candidate(name, steps.get(name, lambda: None), skip=None if name in steps else layer.missing) for name in NAMES]
    timings = measure(candidates, args.seconds, args.longest)
    with torch.no_grad():
        outputs = {name: experts(*inputs) for name, (experts, _) in layer.functions.items()}
    return {
        "shape": layer.shape.name, "dtype": str(layer.dtype).removeprefix("torch."), "tokens": tokens, "rank": layer.rank,
        "threads": torch.get_num_threads(), "ms": timings,
        "peak_mib": {n: None if timings[n].skipped or (b := peak_bytes(steps[n])) is None else round(b / 2**20, 2) for n in steps},
        "difference": {a: testing.relative_error(outputs[a], outputs[b]) for a, b in PAIRS.items() if a in outputs},
    }  # fmt: skip


HEADER = ("shape", "dtype", "T", "rank", "threads", *NAMES, *(f"{b} / {a}" for a, b in PAIRS.items()))


def table_row(row: dict[str, Any], what: str) -> list[str]:
    values = {n: row["ms"][n].median if what == "ms" else row["peak_mib"].get(n) for n in NAMES}
    cells = [milliseconds(row["ms"][n]) if what == "ms" else "-" if values[n] is None else f"{values[n]:.1f}" for n in NAMES]
    ratios = [f"{values[b] / values[a]:.2f}" if values[a] and values[b] else "-" for a, b in PAIRS.items()]
    return [row["shape"], row["dtype"], str(row["tokens"]), str(row["rank"]), str(row["threads"]), *cells, *ratios]


def report(data: dict[str, Any]) -> str:
    m, rows = data["machine"], data["rows"]
    skipped = {f"{n}: {t.skipped}" for row in rows for n, t in row["ms"].items() if t.skipped}
    sizes = ", ".join(f"{s.name}: E={s.E}, H={s.H}, I={s.I}, top {s.K}" for s in (SHAPES[n] for n in {row["shape"]: 0 for row in rows}))
    worst = max(d for row in rows if row["dtype"] == "float32" for d in row["difference"].values()) if rows else 0.0
    return "\n".join(
        [
            "# LoRA on experts\n",
            f"{m['cpu']}, {m['cores']} cores ({', '.join(m['instruction_sets'])}), {m['memory_gib']} GiB; torch {m['torch']}, "
            f"transformers {m['transformers']}, peft {m['peft']}; load average before the run {m['load_before']}. {sizes}.",
            "A forward and a backward of one expert layer, adapters on all projections, experts frozen. Ratios above 1: ours is better.\n",
            "Milliseconds: median [20th-80th percentile] of calls that take turns.\n",
            markdown_table(HEADER, [table_row(row, "ms") for row in rows]),
            "Memory, MiB: tensors alive at the peak of a step beyond those before it, by PyTorch's profiler.\n",
            markdown_table(HEADER, [table_row(row, "mib") for row in rows]),
            f"Outputs differ from PEFT's by at most {worst:.1e} in float32, relative to their norm.\n",
            *(f"- not measured: {reason}" for reason in sorted(skipped)),
        ]
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small"])
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["float32", "bfloat16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 128, 512])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row of the table, beyond the least number of rounds")
    parser.add_argument("--longest", type=float, default=20.0, help="a candidate whose one call takes more seconds is skipped")
    parser.add_argument("--quick", action="store_true", help="the smallest shape, few rounds: tries the benchmark, writes nothing")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.tokens, args.seconds = ["tiny"], [16], 0.1
    return args


def main() -> None:
    import peft
    import transformers

    args = parse()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    data: dict[str, Any] = {"machine": machine() | {"transformers": transformers.__version__, "peft": peft.__version__}, "rows": []}
    for name in args.shapes:
        for dtype in args.dtypes:
            layer = Layer(SHAPES[name], getattr(torch, dtype), args.rank)
            for tokens in args.tokens:
                data["rows"].append(run_row(layer, tokens, args))
                print(*table_row(data["rows"][-1], "ms"), sep="  ", flush=True)
                gc.collect()
    print(report(data))
    if not args.quick:
        print("wrote", *write("lora_cpu", data, report(data)))


if __name__ == "__main__":
    main()
