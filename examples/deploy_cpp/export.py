"""Writes what the C++ host runs: `model.ts` (TorchScript), `model.pt2` (an AOTInductor package) and `cases.pt` (inputs, outputs).

    python export.py [FOLDER]

cases.pt is a list of (x, plain, truth), one per token count: the input, plain PyTorch's output in float32, and the output in
float64. The host accepts an output whose error against the truth is at most twice plain PyTorch's.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_ext import ExpertSpec, ExpertWeights, reference

TOKENS = (1, 3, 16, 100)
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 32, 8, 2


class MoE(nn.Module):
    """A router and its experts: `[T, H]` to `[T, H]`."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5)

    def forward(self, x: Tensor) -> Tensor:
        top_k_weights, top_k_index = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        return torch.ops.moe.grouped_forward(x, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)


def plain(model: MoE, x: Tensor, top_k_index: Tensor) -> Tensor:
    """The same in plain PyTorch. The routing is given: which experts win a near tie depends on rounding."""
    weights = ExpertWeights(gate_up_proj=model.gate_up_proj, down_proj=model.down_proj)
    top_k_weights = model.router(x).softmax(-1).gather(-1, top_k_index)
    return reference.grouped_experts(x, top_k_index, top_k_weights, weights, ExpertSpec())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("."))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = MoE().eval().requires_grad_(False)

    cases = []
    double = copy.deepcopy(model).double()
    for count in TOKENS:
        x = torch.randn(count, HIDDEN)
        index = model.router(x).topk(TOP_K, dim=-1).indices
        cases.append((x, plain(model, x, index), plain(double, x.double(), index)))
    torch.save(cases, folder / "cases.pt")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch deprecates TorchScript; hosts that use it remain
        torch.jit.script(model).save(str(folder / "model.ts"))

    # The token count is dynamic; everything else is fixed in the package.
    program = torch.export.export(model, (torch.randn(7, HIDDEN),), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=1)}})
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    print(f"wrote model.ts, model.pt2 and cases.pt ({', '.join(map(str, TOKENS))} tokens) to {folder}")


if __name__ == "__main__":
    main()
