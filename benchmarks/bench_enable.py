"""What `enable` costs once, and what the look at the experts costs at each forward: 48 layers of 128 experts, made small (H=32, I=16).

Run in an environment with transformers 5 (stacked experts) and in one with transformers 4 (lists of MLPs); each adds its row to
benchmarks/results/enable_cpu.json, from which the table beside it is written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import moe_ext
from moe_ext.integrations.run import decorated, patch

RESULTS = Path(__file__).parent / "results"
LAYERS, EXPERTS = 48, 128


def build() -> torch.nn.Module:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=EXPERTS, num_experts_per_tok=8, moe_intermediate_size=16, intermediate_size=32, norm_topk_prob=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config)


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def guard_microseconds(model: torch.nn.Module, rounds: int = 9, calls: int = 200) -> float:
    """Median time to read the weights of one set of experts, with all that is looked at before they are used."""
    x = torch.randn(4, 32)
    for module in model.modules():
        for one in patch.patches_of(module).values():
            if isinstance(one.replacement, patch.MethodReplacement):
                return 1e6 * _median(partial(one.replacement.reader.read, module, x), rounds, calls)
        if decorated.plan_of(module) is not None:
            return 1e6 * _median(partial(decorated.read_adapted, module, x), rounds, calls)
    raise RuntimeError("nothing is enabled")


def _median(call: Callable[[], Any], rounds: int, calls: int) -> float:
    return statistics.median(seconds(lambda: [call() for _ in range(calls)]) / calls for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    model = build()
    report = moe_ext.enable(model, strict=True)
    row = {
        "layout": report.blocks[0].layout,
        "explain_s": round(seconds(lambda: moe_ext.explain(model)), 2),
        "enable_s": round(report.seconds, 2),
        "disable_s": None,
        "guard_us": round(guard_microseconds(model), 1),
        "blocks": report.enabled_count,
    }
    row["disable_s"] = round(seconds(lambda: moe_ext.disable(model)), 2)
    path = RESULTS / "enable_cpu.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    rows[f"transformers {transformers.__version__}"] = row
    path.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    lines = [f"# The cost of enabling\n\n{LAYERS} layers of {EXPERTS} experts (H=32, I=16, top 8), float32, one thread.\n"]
    lines += [
        "| | layout | blocks | explain | enable, with all proofs | disable | look at the experts, per block and forward |",
        "|" + "---|" * 7,
    ]
    for name, r in sorted(rows.items()):
        times = f"{r['explain_s']} s | {r['enable_s']} s | {r['disable_s']} s | {r['guard_us']} us"
        lines.append(f"| {name} | {r['layout']} | {r['blocks']} | {times} |")
    (RESULTS / "enable_cpu.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
