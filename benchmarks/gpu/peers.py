"""The candidates of the GPU benchmark: the op, transformers' grouped_mm, products alone, and what others publish, on one set of weights.

A candidate is `prepare(layer) -> Candidate`; it raises LeftOut with a reason, or ImportError. Weights in a layout that a peer wants and
routing in the form it wants are made before anything is timed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.cases import COMPILED, CUBLAS, GROUPED_MM, LIGER, OURS, SCATTERMOE, SONICMOE, TRANSFORMERS
from benchmarks.peers import Experts, transformers_experts
from benchmarks.shapes import Shape, routing
from moe_ext import ops

#: Every new shape of inputs costs a compilation or none, and every mode one: it is worth it where T is typical.
COMPILED_TOKENS = (1024, 16384)


class LeftOut(Exception):
    """Why a candidate is not measured."""


class Layer:
    """The weights of one expert layer in bfloat16 on a device."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device = shape, device
        self.gate_up_proj = self._matrices(shape.E, 2 * shape.I, shape.H)
        self.down_proj = self._matrices(shape.E, shape.H, shape.I)
        self.weights = [self.gate_up_proj, self.down_proj]
        self.candidates: dict[str, Candidate] = {}

    def once(self, name: str, prepare: Callable[[Layer], Candidate]) -> Candidate:
        if name not in self.candidates:
            self.candidates[name] = prepare(self)
        return self.candidates[name]

    def _matrices(self, *size: int) -> nn.Parameter:
        stack = torch.empty(size, dtype=torch.bfloat16, device=self.device)
        for matrix in stack:  # by expert: no float32 copy of the stack
            matrix.copy_(torch.randn(matrix.shape, device=self.device) / size[-1] ** 0.5)
        return nn.Parameter(stack)


@dataclass
class Inputs:
    """One set of inputs: `x [T,H]`, the routing (weights in bfloat16, as routers of such models give them), a gradient of the result."""

    x: Tensor
    index: Tensor
    weights: Tensor
    cotangent: Tensor
    prepared: dict[str, Any] = field(default_factory=dict)  # what a peer made of them

    @classmethod
    def draw(cls, layer: Layer, tokens: int, kind: str, number: int) -> Inputs:
        index, weights = (t.to(layer.device) for t in routing(layer.shape, tokens, kind, number))
        x, cotangent = (torch.randn(tokens, layer.shape.H, device=layer.device).bfloat16() for _ in range(2))
        return cls(x, index, weights.bfloat16(), cotangent)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.prepared:
            self.prepared[name] = make()
        return self.prepared[name]


@dataclass
class Candidate:
    """`forward(inputs, x, weights)` gives `[T,H]`, from leaves that may require gradients."""

    forward: Callable[[Inputs, Tensor, Tensor], Tensor]
    parameters: list[nn.Parameter]
    capturable: bool = False  # in a CUDA graph

    def call(self, inputs: Inputs, mode: str) -> Callable[[], Any]:
        """What is timed, for one set of inputs."""
        for parameter in self.parameters:
            parameter.requires_grad_(mode in ("forward-training", "backward-full"))
        train = mode != "forward-inference"
        x, weights = inputs.x.detach().requires_grad_(train), inputs.weights.detach().requires_grad_(train)
        if not train:

            def infer() -> Tensor:
                with torch.no_grad():
                    return self.forward(inputs, x, weights)

            return infer
        if mode == "forward-training":
            return lambda: self.forward(inputs, x, weights)
        out = self.forward(inputs, x, weights)
        leaves = [x, weights, *(self.parameters if mode == "backward-full" else ())]
        return lambda: torch.autograd.grad(out, leaves, inputs.cotangent, retain_graph=True)


class Products(Candidate):
    """Matrix products alone, over rows that are sorted already."""

    def __init__(self, layer: Layer, call: Callable[[Layer, Inputs, str], Callable[[], Any]]) -> None:
        super().__init__(lambda inputs, x, weights: x, layer.weights, capturable=True)
        self.layer, self.products = layer, call

    def call(self, inputs: Inputs, mode: str) -> Callable[[], Any]:
        return self.products(self.layer, inputs, mode)


def ours(layer: Layer) -> Candidate:
    w1, w2 = layer.weights
    return Candidate(lambda i, x, w: ops.grouped_forward(x, i.index, w, w1, w2), layer.weights, capturable=True)


def transformers_module(layer: Layer) -> Experts:
    found = transformers_experts(layer.shape, layer.gate_up_proj, layer.down_proj)
    if isinstance(found, str):
        raise LeftOut(found)
    return found["grouped_mm"]


def transformers_grouped_mm(layer: Layer) -> Candidate:
    module = transformers_module(layer)
    return Candidate(lambda i, x, w: module(x, i.index, w), layer.weights, capturable=True)


def transformers_compiled(layer: Layer) -> Candidate:
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # a backward that is timed runs more than once
    compiled = torch.compile(transformers_module(layer), dynamic=True)
    return Candidate(lambda i, x, w: compiled(x, i.index, w), layer.weights)


def grouped_mm_alone(layer: Layer) -> Candidate:
    if not hasattr(F, "grouped_mm"):
        raise LeftOut(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")

    def call(layer: Layer, inputs: Inputs, mode: str) -> Callable[[], Any]:
        shape, train = layer.shape, mode != "forward-inference"
        offsets, _, _ = inputs.once("maps", lambda: ops.sort_by_expert(inputs.index, shape.E))
        rows = inputs.once("rows", lambda: sorted_rows(layer, inputs))
        act = inputs.once("act", lambda: torch.randn(len(rows), shape.I, device=rows.device).bfloat16())
        gradient = inputs.once("gradient", lambda: torch.randn(len(rows), 2 * shape.I, device=rows.device).bfloat16())
        w1, w2 = (w.detach().requires_grad_(mode in ("forward-training", "backward-full")) for w in layer.weights)
        rows, act = (t.detach().requires_grad_(train) for t in (rows, act))

        def forward() -> tuple[Tensor, Tensor]:
            return F.grouped_mm(rows, w1.mT, offs=offsets[1:]), F.grouped_mm(act, w2.mT, offs=offsets[1:])

        if not mode.startswith("backward"):
            return forward
        leaves = [rows, act, *((w1, w2) if mode == "backward-full" else ())]
        results, gradients = forward(), (gradient, rows.detach())
        return lambda: torch.autograd.grad(results, leaves, gradients, retain_graph=True)

    return Products(layer, call)


def cublas(layer: Layer) -> Candidate:
    """One dense product [S,H] x [H,3I], of 6I in the full backward."""

    def call(layer: Layer, inputs: Inputs, mode: str) -> Callable[[], Any]:
        rows = inputs.once("rows", lambda: sorted_rows(layer, inputs))
        width = (6 if mode == "backward-full" else 3) * layer.shape.I
        weight = inputs.once(f"dense {width}", lambda: torch.randn(width, rows.shape[1], device=rows.device).bfloat16())
        return lambda: torch.mm(rows, weight.T)

    return Products(layer, call)


def sorted_rows(layer: Layer, inputs: Inputs) -> Tensor:
    _, row_to_slot, slot_to_row = ops.sort_by_expert(inputs.index, layer.shape.E)
    return ops.permute(inputs.x, row_to_slot, slot_to_row, layer.shape.K)


def liger(layer: Layer) -> Candidate:
    """LigerFusedMoEFunction, which replaces stacked experts; autotunes at its first call unless LIGER_FUSED_MOE_AUTOTUNE=0."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    w1, w2 = layer.weights
    index = lambda i: i.once("int32", lambda: i.index.int())  # noqa: E731
    return Candidate(lambda i, x, w: LigerFusedMoEFunction.apply(x, w1, w2, index(i), w), layer.weights)


def scattermoe(layer: Layer) -> Candidate:
    """The two linear layers of its gated MLP, with routing weights in the dtype of the rows, as it needs them."""
    from scattermoe import flatten_sort_count, parallel_linear

    w1, w2, E = *layer.weights, layer.shape.E

    def forward(i: Inputs, x: Tensor, w: Tensor) -> Tensor:
        maps = flatten_sort_count(i.index, num_experts=E)
        gate, up = parallel_linear(x, w1.permute(0, 2, 1), layer.shape.K, *maps, grouped_out=True).chunk(2, -1)
        return parallel_linear(F.silu(gate) * up, w2.permute(0, 2, 1), 1, *maps, grouped_in=True, gates=w.to(x.dtype))

    return Candidate(forward, layer.weights)


def sonicmoe(layer: Layer) -> Candidate:
    """Its entry for given routing; gate and up interleaved where it knows no other layout."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs as moe

    options: dict[str, Any] = {}
    w1, w2 = layer.weights
    if "concat_layout" in inspect.signature(moe).parameters:
        options["concat_layout"] = True
    else:
        gate, up = w1.detach().chunk(2, 1)
        w1 = nn.Parameter(torch.stack((gate, up), 2).flatten(1, 2))
    E, K = layer.shape.E, layer.shape.K

    def forward(i: Inputs, x: Tensor, w: Tensor) -> Tensor:
        tokens = i.once("tokens", lambda: torch.arange(len(x), device=x.device, dtype=torch.int32).repeat_interleave(K))
        experts = i.once("flat", lambda: i.index.int().flatten())
        stream, infer = torch.cuda.current_stream().cuda_stream, not torch.is_grad_enabled()
        w1_, w2_ = w1.permute(1, 2, 0), w2.permute(1, 2, 0)
        return moe(x, w.float().flatten(), tokens, experts, w1_, None, w2_, None, E, stream, ActivationType.SWIGLU, infer, **options)[0]

    return Candidate(forward, [w1, w2])


PEERS: dict[str, Callable[[Layer], Candidate]] = {
    OURS: ours, CUBLAS: cublas, GROUPED_MM: grouped_mm_alone, TRANSFORMERS: transformers_grouped_mm, COMPILED: transformers_compiled,
    LIGER: liger, SCATTERMOE: scattermoe, SONICMOE: sonicmoe,
}  # fmt: skip
