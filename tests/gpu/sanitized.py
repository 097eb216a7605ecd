"""What test_sanitizer_on_gpu.py runs under compute-sanitizer: each op forward and backward at sizes with tails, on inputs made on the
CPU, so that few kernels other than ours run. Ends with a line that says that all of it ran.
"""

from __future__ import annotations

import sys

import torch

from moe_ext import ops
from tests.helpers.op_table import CASES, Maker, layer, results_and_gradients

CHOSEN = {"default", "tiny_bias", "gpt_oss", "ungated_relu2", "all", "frozen", "weighted", "random_int64", "silu"}


def main(device: str) -> None:
    builds = {"aligned": layer(T=70, K=2, E=4, H=72, I=136, bias=True, ids="dropped"), "one": layer(T=150, K=2, E=3, H=64, I=72, ids="one")}
    for dtype in (torch.bfloat16, torch.float32):
        for case in CASES:
            if case.label in CHOSEN:
                args, kwargs = case.inputs(dtype)
                results_and_gradients(case, case.function, put(args, device), kwargs)
        for name, build in builds.items():
            args, kwargs = build(Maker(dtype, name))
            leaves = [t.detach().to(device).requires_grad_(t.is_floating_point()) if t is not None else None for t in args]
            ops.grouped_forward(*leaves, **kwargs).backward(torch.ones(args[0].shape, dtype=dtype).to(device))
    if device == "cuda":
        torch.cuda.synchronize()
    print("all of it ran")


def put(value: object, device: str) -> object:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return type(value)(put(v, device) for v in value) if isinstance(value, (tuple, list)) else value


if __name__ == "__main__":
    main(sys.argv[1])
