"""`moe-ext demo`: one small Qwen3-MoE, trained twice on the same bytes from the same weights: as transformers ships it, and enabled.

The text is the Python standard library's own sources, the vocabulary the 256 byte values, the loss nats per byte, everything float32.
The two runs take turns step by step, so that whatever else the machine does slows both alike. What "the curves part" means is written
at `agreement` below, with the measurements behind its numbers.
"""

from __future__ import annotations

import copy
import math
import resource
import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .command import CommandError
from .memory import peak_bytes

TEXT_BYTES = 4 << 20
LEARNING_RATE = 5e-4
WARMUP_STEPS = 10

# See `agreement`.
EARLY_STEPS = 10
EARLY_LIMIT = 5e-5
LATE_LIMIT = 2e-2

COLORS = ("#e69f00", "#0b4f8a")  # transformers, moe_ext


@dataclass(frozen=True)
class Size:
    """A model, whose expert weights outweigh everything else, and the work of one step; "small" has the proportions of Qwen3-30B-A3B."""

    hidden: int
    layers: int
    experts: int
    top_k: int
    intermediate: int
    batch: int
    length: int
    steps: int


SIZES = {
    "small": Size(hidden=256, layers=4, experts=64, top_k=8, intermediate=96, batch=8, length=128, steps=150),
    "tiny": Size(hidden=64, layers=2, experts=8, top_k=2, intermediate=32, batch=4, length=64, steps=40),
}


@dataclass
class Run:
    """One of the two trainings: the model with its optimizer, and what was measured."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    step_memory: int | None = None

    def step(self, tokens: torch.Tensor, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        begin = time.perf_counter()
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(loss.item())


@dataclass(frozen=True)
class Agreement:
    """Relative differences of two loss curves, and whether they are one curve up to rounding."""

    largest: float
    largest_step: int  # counted from 1
    early: float  # the largest in the first EARLY_STEPS steps
    late: float  # of the mean losses of the last quarter of the steps
    agree: bool

    def __str__(self) -> str:
        return (
            f"largest difference of the losses, relative: {self.largest:.1e} (step {self.largest_step})\n"
            f"  in the first {EARLY_STEPS} steps            {self.early:.1e}, allowed {EARLY_LIMIT:.0e}\n"
            f"  of the last quarter's mean       {self.late:.1e}, allowed {LATE_LIMIT:.0e}"
        )


def agreement(reference: list[float], enabled: list[float]) -> Agreement:
    """Whether two loss curves agree: two limits, since training amplifies rounding.

    A router's choice between two experts that are equally probable up to rounding falls either way, and each such choice moves the
    weights a little off, for good. So transformers parts from itself too: its `eager` experts against its `grouped_mm` experts, or the
    same experts from initial weights that differ by one rounding, or simply run twice: its sums over tokens are not made in a fixed
    order. Measured with models of the default's size, the worst for transformers against itself, the mildest for the mistake that
    shows least, a router that gets no gradient:

                                     first 10 steps    last quarter's mean    any single step
      transformers against itself         6e-6               4e-3                  1e-2
      router without gradient             3e-4               8e-3                  4e-2

    The early steps tell rounding from a mistake. Later ones tell little, and what must agree then is how well the model learned,
    with room for what transformers does to itself. Losses that are not finite never agree.
    """
    if not all(map(math.isfinite, reference + enabled)):
        return Agreement(math.inf, 1, math.inf, math.inf, agree=False)
    relative = [abs(b - a) / a for a, b in zip(reference, enabled, strict=True)]
    largest, early = max(relative), max(relative[:EARLY_STEPS])
    quarter = max(1, len(reference) // 4)
    a, b = statistics.fmean(reference[-quarter:]), statistics.fmean(enabled[-quarter:])
    late = abs(b - a) / a
    return Agreement(largest, relative.index(largest) + 1, early, late, agree=early <= EARLY_LIMIT and late <= LATE_LIMIT)


def standard_library_text(limit: int = TEXT_BYTES) -> tuple[bytes, int]:
    """The first `limit` bytes of the standard library's top-level sources in order of their names, and how many files that is."""
    folder = Path(sysconfig.get_path("stdlib"))
    text, files = bytearray(), 0
    for path in sorted(folder.glob("*.py"), key=lambda p: p.name):
        if len(text) >= limit:
            break
        text += path.read_bytes()
        files += 1
    if len(text) < 1 << 16:
        raise CommandError(f"the demo reads the Python standard library's sources, and {folder} holds only {len(text)} bytes of them")
    return bytes(text[:limit]), files


def build_model(size: Size, seed: int) -> torch.nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=size.hidden // 4,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        moe_intermediate_size=size.intermediate,
        norm_topk_prob=True,
        max_position_embeddings=size.length,
        use_cache=False,
    )
    return Qwen3MoeForCausalLM(config).float().train()


def start(name: str, model: torch.nn.Module) -> Run:
    return Run(name, model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1))


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def train(runs: tuple[Run, Run], text: bytes, size: Size, steps: int, seed: int) -> None:
    """`steps` steps of each run in turn, every step on the same batch, with a progress bar."""
    from tqdm import tqdm

    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    terminal = sys.stderr.isatty()
    with tqdm(total=steps, desc="training both", unit="step", mininterval=0.1 if terminal else 10, ncols=None if terminal else 100) as bar:
        for step in range(steps):
            begins = torch.randint(0, len(data) - size.length, (size.batch,), generator=generator)
            tokens = torch.stack([data[i : i + size.length] for i in begins.tolist()])
            for run in runs:
                run.step(tokens, learning_rate(step, steps))
            bar.set_postfix_str(f"loss {runs[0].losses[-1]:.4f} | {runs[1].losses[-1]:.4f}", refresh=False)
            bar.update()
    for run in runs:
        run.step_memory = peak_bytes(partial(_backward, run.model, tokens))
        run.model.zero_grad()


def _backward(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()


def run(size_name: str, steps: int | None, seed: int, out: Path) -> int:
    """The whole demo; the exit code of `moe-ext demo`."""
    import moe_ext

    if not out.resolve().parent.is_dir():
        raise CommandError(f"cannot write {out}: the directory {out.resolve().parent} does not exist")
    if out.is_dir():
        raise CommandError(f"cannot write {out}: it is a directory; --out names the PNG itself")
    size = SIZES[size_name]
    steps = steps or size.steps
    text, files = standard_library_text()
    reference = build_model(size, seed)
    enabled = copy.deepcopy(reference)
    parameters = sum(p.numel() for p in reference.parameters())
    experts = sum(p.numel() for name, p in reference.named_parameters() if ".experts." in name)
    print(
        f"Qwen3-MoE, {parameters / 1e6:.1f} M parameters, {100 * experts / parameters:.0f} % of them in experts: {size.layers} layers, "
        f"{size.experts} experts, {size.top_k} per token; float32\n"
        f"text: the Python {sys.version_info[0]}.{sys.version_info[1]} standard library, {files} files, {len(text) / 2**20:.1f} MiB\n"
        f"work: {steps} steps of {size.batch} x {size.length} bytes with AdamW, {torch.get_num_threads()} threads\n"
    )
    report = moe_ext.enable(enabled)
    print(f"{report}\n", flush=True)
    if not report.enabled_count:
        raise CommandError("nothing was enabled, so there is nothing to compare; the table above has the reasons", exit_code=1)

    runs = (start(_transformers_name(reference), reference), start("moe_ext", enabled))
    train(runs, text, size, steps, seed)
    result = agreement(runs[0].losses, runs[1].losses)
    print(_table(runs, size))
    print(result)
    print(f"peak memory of this process, which holds both models: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    plot(runs, size, result, out)
    print(f"plot: {out}\n")
    if not result.agree:
        print("The curves part: the two runs did not compute the same training.", file=sys.stderr)
        return 1
    print("The curves agree.")
    return 0


def _transformers_name(model: Any) -> str:
    experts = getattr(model.config, "_experts_implementation", None)
    return f"transformers {version('transformers')}" + (f" ({experts})" if experts else "")


def tokens_per_second(run: Run, size: Size) -> float:
    """Of whole training steps, by the median step."""
    return size.batch * size.length / statistics.median(run.seconds)


def _table(runs: tuple[Run, Run], size: Size) -> str:
    rows = [("", [run.name for run in runs], "moe_ext / transformers")]
    for label, index in (("loss of the first step", 0), ("loss of the last step", -1)):
        rows.append((label, [f"{run.losses[index]:.6f}" for run in runs], ""))
    speeds = [tokens_per_second(run, size) for run in runs]
    rows.append(("tokens/s, whole training step, median", [f"{speed:,.0f}" for speed in speeds], f"{speeds[1] / speeds[0]:.2f}"))
    memory = [run.step_memory for run in runs]
    if memory[0] and memory[1]:
        cells = [f"{m / 2**20:.1f} MiB" for m in memory if m]
        rows.append(("peak memory of forward + backward *", cells, f"{memory[1] / memory[0]:.2f}"))
        note = "* tensors alive at the peak beyond weights and optimizer state: activations and gradients"
    else:
        note = "(peak memory of a step: not measured, this torch was built without its profiler)"
    widths = [max(len(row[1][i]) for row in rows) for i in (0, 1)]
    lines = [f"{label:<38}{a:>{widths[0]}}  {b:>{widths[1]}}  {ratio}".rstrip() for label, (a, b), ratio in rows]
    return "\n".join([*lines, note])


def plot(runs: tuple[Run, Run], size: Size, result: Agreement, out: Path) -> None:
    """Loss by step with the curves' difference below it, and loss by time, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 5.2), dpi=120, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1), width_ratios=(1, 1))
    by_step = figure.add_subplot(grid[0, 0])
    difference = figure.add_subplot(grid[1, 0], sharex=by_step)
    by_time = figure.add_subplot(grid[:, 1])
    steps = range(1, len(runs[0].losses) + 1)
    for run, color, width in zip(runs, COLORS, (5, 1.6), strict=True):  # the wide one below stays visible beside the other
        by_step.plot(steps, run.losses, color=color, linewidth=width, label=f"{run.name}: {tokens_per_second(run, size):,.0f} tokens/s")
        elapsed = torch.tensor(run.seconds).cumsum(0).tolist()
        by_time.plot(elapsed, run.losses, color=color, linewidth=1.8, label=f"{run.name}: {elapsed[-1]:.0f} s")
    by_step.set(ylabel="loss (nats per byte)", title="The same steps give the same losses")
    by_step.tick_params(labelbottom=False)
    relative = [abs(b - a) / a for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
    smallest = 1e-8  # below float32's rounding: where equal losses are drawn on the logarithmic axis
    difference.semilogy(steps, [max(r, smallest) for r in relative], color="#444444", linewidth=1.2)
    difference.hlines(EARLY_LIMIT, 1, min(EARLY_STEPS, len(steps)), color="#c0392b", linewidth=1.4, linestyle="--")
    difference.text(1, 1.6 * EARLY_LIMIT, "allowed", color="#c0392b", fontsize=8)
    difference.set(
        xlabel="training step", ylabel="relative\ndifference", ylim=(smallest / 2, max(30 * EARLY_LIMIT, min(1, 3 * result.largest)))
    )
    by_time.set(xlabel="training time (s)", ylabel="loss (nats per byte)", title="and take this long")
    for axes in (by_step, by_time):
        axes.legend(frameon=False)
    for axes in (by_step, by_time, difference):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    speeds = [tokens_per_second(run, size) for run in runs]
    figure.suptitle(
        f"Byte-level Qwen3-MoE, {size.experts} experts, top {size.top_k}: "
        f"moe_ext trains at {speeds[1] / speeds[0]:.2f}x the tokens/s of transformers"
    )
    figure.savefig(out, format="png")
    plt.close(figure)
