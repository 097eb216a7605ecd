"""Second derivatives and tangents of experts with LoRA adapters (stacked and listed) and in 4 bit; what else reads their products.

The number of a trap is in the name of its test (docs/traps.md).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ext.experts import ExpertSpec, ListedWeights, StackedWeights
from moe_ext.functional import grouped_experts
from moe_ext.integrations.run.peft import LoraProjection, LowRank
from moe_ext.testing import assert_accurate

T, K, E, H, I, R = 7, 2, 4, 8, 6, 3  # noqa: E741


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def layer(is_list: bool, transposed: bool, dtype: torch.dtype = torch.float64) -> tuple[Any, list[Tensor]]:
    """The layer with adapters on both projections, as a function of x, routing weights, and every factor."""
    torch.manual_seed(0)
    index = torch.randint(0, E, (T, K))

    def turned(t: Tensor) -> Any:
        t = t.to(dtype)
        return list(t.unbind()) if is_list else t.mT.contiguous() if transposed else t

    ups = [turned(floats(E, n, H) / 3) for n in ((I, I) if is_list else (2 * I,))]
    down = turned(floats(E, H, I) / 3)
    leaves = [floats(T, H), torch.rand(T, K, dtype=torch.float64)]
    for out, inner in [*((u, H) for u in ((I, I) if is_list else (2 * I,))), (H, I)]:
        leaves += [floats(E, R, inner) / 2, floats(E, out, R) / 2]

    def function(x: Tensor, w: Tensor, *factors: Tensor) -> Tensor:
        given = [list(f.unbind()) for f in factors] if is_list else list(factors)
        on = [LoraProjection(b, [LowRank(*given[2 * k : 2 * k + 2], 1.5)], transposed) for k, b in enumerate([*ups, down])]
        weights = ListedWeights(gate_proj=on[0], up_proj=on[1], down_proj=on[2]) if is_list else StackedWeights(*on)
        return grouped_experts(x, index, w, weights, ExpertSpec(activation="gelu", transposed=transposed))

    return function, [t.to(dtype).requires_grad_() for t in leaves]


LAYOUTS = pytest.mark.parametrize(
    ("is_list", "transposed"), [(False, False), (False, True), (True, False)], ids=["stack", "transposed", "list"]
)


@LAYOUTS
def test_T101_T102_adapters_of_every_layout(is_list: bool, transposed: bool) -> None:
    function, leaves = layer(is_list, transposed)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@LAYOUTS
def test_T103_transforms_of_adapters(is_list: bool, transposed: bool) -> None:
    """Against second derivatives without `torch.func`, which the test above has checked."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        function, leaves = layer(is_list, transposed, dtype)
        x, *rest = (t.detach() for t in leaves)
        found[dtype] = torch.autograd.functional.hessian(lambda a, f=function, r=rest: f(a, *r).square().sum(), x)
    new = torch.func.hessian(lambda a: function(a, *rest).square().sum())(x)
    assert_accurate(new, found[torch.float32], found[torch.float64])


def test_T101_T102_T103_experts_in_4_bit() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install bitsandbytes)")
    from moe_ext.integrations.run import bitsandbytes as ours

    torch.manual_seed(0)

    def linears(inputs: int, outputs: int) -> list[Any]:
        found = [bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.float32, quant_type="nf4") for _ in range(3)]
        return [m.to("cpu") for m in found]

    modules = [linears(64, 128), linears(64, 128), linears(128, 64)]
    index = torch.randint(0, 3, (5, 2))
    x, w = torch.randn(5, 64), torch.rand(5, 2)
    like = torch.empty(0)

    def function(x: Tensor) -> Tensor:
        gate, up, down = (ours.read(m, like) for m in modules)
        return grouped_experts(x, index, w, ListedWeights(gate_proj=gate, up_proj=up, down_proj=down), ExpertSpec(activation="gelu"))

    dense = [[ours.read(m, like)[e] for e in range(3)] for m in modules]

    def plain(x: Tensor) -> Tensor:
        gate, up, down = ([t.to(x.dtype) for t in matrices] for matrices in dense)
        return grouped_experts(x, index, w, ListedWeights(gate_proj=gate, up_proj=up, down_proj=down), ExpertSpec(activation="gelu"))

    v = torch.randn_like(x)
    for of in (
        lambda f, x, v: torch.autograd.functional.hvp(lambda a: f(a).square().sum(), x, v)[1],
        lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
        lambda f, x, v: torch.func.grad(lambda a: f(a).square().sum())(x),
    ):
        assert_accurate(of(function, x, v), of(plain, x, v), of(plain, x.double(), v.double()))


def test_T109_compiled_experts_with_adapters_on_their_stacks() -> None:
    peft = pytest.importorskip("peft", reason="needs peft (pip install peft)")
    import moe_ext
    from tests.helpers.models import Holder, build_experts, routing

    experts = build_experts("qwen3_moe", torch.float32).requires_grad_(False)
    held = Holder(experts)
    moe_ext.enable(held, strict=True)
    names = [f"experts_of_mine.{name}" for name in ("gate_up_proj", "down_proj")]
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=names, init_lora_weights=False)
    model = peft.get_peft_model(held, config)
    args = torch.randn(6, experts.down_proj.shape[1], requires_grad=True), *routing(6, len(experts.down_proj))
    factors = [p for p in model.parameters() if p.requires_grad]

    def run() -> list[Tensor]:
        out = held.experts_of_mine(*args)
        return [out, *torch.autograd.grad(out.square().sum(), factors)]

    expected = run()
    experts.compile(backend="aot_eager")
    assert all(map(torch.equal, run(), expected))
