"""The CUDA kernels for few rows per expert, grouped_mm and the fused up projection, on a simulated GPU of 8.0 and 9.0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ext.testing import SimulatedGpu, simulated_gpu
from tests.gpusim.few_rows import FEW_ROWS_CASES, FewRowsCase
from tests.gpusim.harness import folder, needs_nvcc
from tests.gpusim.orders import MODES
from tests.helpers.error_rule import check_error_rule
from tests.helpers.op_table import ACTIVATIONS, Maker, layer, listed, results_and_gradients, to_double

pytestmark = needs_nvcc

FEW_ROWS, UP = "few_rows_kernel", "GroupedUpParams"
GROUPED_MM_CASES = [c for c in FEW_ROWS_CASES if c.op.startswith("grouped_mm")]


@pytest.fixture(params=[80, 90])
def gpu(request: pytest.FixtureRequest) -> Iterator[SimulatedGpu]:
    with simulated_gpu(folder(), request.param) as gpu:
        gpu.take_launches()  # of tests before
        yield gpu


def kernels(gpu: SimulatedGpu) -> list[str]:
    return [str(launch["kernel"]) for launch in gpu.take_launches()]


@pytest.mark.parametrize("case", FEW_ROWS_CASES, ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(case: FewRowsCase, gpu: SimulatedGpu) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        check_error_rule(case, dtype, "cpu")
        ran = kernels(gpu)
        assert any(FEW_ROWS in name for name in ran)
        assert any(FEW_ROWS in name and UP in name for name in ran) == ("forward" in case.op and "few_ungated" not in case.label)


@pytest.mark.parametrize("case", GROUPED_MM_CASES, ids=str)
def test_whole_numbers_are_exact(case: FewRowsCase, gpu: SimulatedGpu) -> None:
    args, kwargs = case.inputs(torch.float16, integers=True)
    expected = case.entry.reference(*to_double(args), **kwargs)
    assert expected.abs().max() <= 2048  # whole numbers up to there are float16's
    assert torch.equal(case.function(*args, **kwargs).double(), expected)
    assert FEW_ROWS in kernels(gpu)[-1]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", [c for c in FEW_ROWS_CASES if "backward" not in c.op][::3], ids=str)
def test_any_order_of_events_gives_the_same_bits(case: FewRowsCase, mode: dict[str, str]) -> None:
    results = []
    for settings in ({}, {}, mode):
        with simulated_gpu(folder(), 90, **settings):
            args, kwargs = case.inputs(torch.bfloat16)
            results.append(results_and_gradients(case, case.function, args, kwargs))
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], found, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_does_not_depend_on_the_others(transposed: bool, gpu: SimulatedGpu) -> None:
    """In the batch, among every third row of it, and alone; NaN in one row stays there."""
    m = Maker(torch.bfloat16, "rows")
    counts, H, I = [0, 18, 1, 0, 7, 20], 296, 72  # noqa: E741
    x, weight = m.floats(sum(counts), H), m.floats(len(counts), *((H, I) if transposed else (I, H)))
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))

    def product(rows: Tensor, values: Tensor) -> Tensor:
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int32)
        offsets[1:] = torch.bincount(expert[rows], minlength=len(counts)).cumsum(0)
        return torch.ops.moe_ext.grouped_mm(values, weight, offsets, None, transposed=transposed)

    everything = product(torch.arange(len(x)), x)
    for rows in (torch.arange(0, len(x), 3), *torch.arange(0, len(x), 11).unbind()):
        assert torch.equal(product(rows.reshape(-1), x[rows.reshape(-1)]), everything[rows.reshape(-1)])
    spoilt = x.clone()
    spoilt[20] = float("nan")
    found = product(torch.arange(len(x)), spoilt)
    others = torch.arange(len(x)) != 20
    assert found[20].isnan().all() and torch.equal(found[others], everything[others])
    assert all(FEW_ROWS in name for name in kernels(gpu))


@pytest.mark.parametrize("listed_weights", [False, True])
def test_both_layouts_give_the_same_bits(listed_weights: bool, gpu: SimulatedGpu) -> None:
    m = Maker(torch.float16, "layouts")
    x, weight = m.floats(30, 328), m.floats(5, 80, 328, fan_in=328)
    offsets = torch.tensor([0, 4, 4, 21, 28, 29], dtype=torch.int32)
    function = torch.ops.moe_ext.grouped_mm.list if listed_weights else torch.ops.moe_ext.grouped_mm.default
    pack = (lambda t: list(t.unbind())) if listed_weights else (lambda t: t)
    one = function(x, pack(weight), offsets, None)
    other = function(x, pack(weight.mT.contiguous()), offsets, None, transposed=True)
    assert torch.equal(one, other) and not one[29:].any()
    assert [FEW_ROWS in name for name in kernels(gpu) if "store" not in name] == [True, True]


def poisoned(t: Tensor, dim: int, size: int) -> Tensor:
    """The same values in a view whose rows end before their stride does: NaN follows."""
    wide = torch.full([*t.shape[:dim], size, *t.shape[dim + 1 :]], float("nan"), dtype=t.dtype)
    view = wide.narrow(dim, 0, t.shape[dim])
    return view.copy_(t)


@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_else_is_read(transposed: bool, gpu: SimulatedGpu) -> None:
    """NaN behind each row and matrix, in experts without rows, and in rows of dropped slots."""
    m = Maker(torch.bfloat16, "poison")
    x, weight = m.floats(25, 72), m.floats(4, *((72, 40) if transposed else (40, 72)))
    offsets = torch.tensor([0, 3, 3, 20, 22], dtype=torch.int32)
    expected = torch.ops.moe_ext.grouped_mm(x, weight, offsets, None, transposed=transposed)
    x = poisoned(x, 1, 104)
    x[22:] = float("nan")
    weight = poisoned(poisoned(weight, 2, 104), 1, 80)
    weight[1] = float("nan")
    assert torch.equal(torch.ops.moe_ext.grouped_mm(x, weight, offsets, None, transposed=transposed), expected)
    assert torch.equal(expected[22:], torch.zeros(3, 40, dtype=x.dtype))
    assert all(FEW_ROWS in name for name in kernels(gpu))


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_are_loaded_once_per_tile_of_rows(transposed: bool, gpu: SimulatedGpu) -> None:
    """Bytes that the kernel loads grow with k as those of two tiles' weights and of x do, for all 32 or 64 outputs of a block."""
    offsets, outputs = torch.tensor([0, 5, 5, 16], dtype=torch.int32), 64 if transposed else 32
    loaded = {}
    for k in (320, 1288):
        weight = torch.randn(3, *((k, outputs) if transposed else (outputs, k))).half()
        torch.ops.moe_ext.grouped_mm(torch.randn(16, k).half(), weight, offsets, None, transposed=transposed)
        (launch,) = gpu.take_launches()
        loaded[k] = launch["global_loaded"]
    assert loaded[1288] - loaded[320] == (2 * outputs + 16) * (1288 - 320) * 2


# What the kernel is not for: the same call takes another one.
OTHERS: dict[str, Callable[[Maker], tuple[Tensor, Tensor, bool]]] = {
    "k_not_in_eights": lambda m: (poisoned(m.floats(16, 20), 1, 24), poisoned(m.floats(4, 32, 20), 2, 24), False),
    "rows_not_aligned": lambda m: (m.floats(16, 20), m.floats(4, 32, 20), False),
    "contiguous_outputs_not_in_eights": lambda m: (m.floats(16, 40), poisoned(m.floats(4, 40, 36), 2, 40), True),
    "many_rows": lambda m: (m.floats(33, 40), m.floats(4, 32, 40), False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_take_other_kernels(name: str, gpu: SimulatedGpu) -> None:
    x, weight, transposed = OTHERS[name](Maker(torch.float16, name, integers=True))
    S = len(x)
    offsets = torch.tensor([0, 5, 5, 12, S], dtype=torch.int32)
    found = torch.ops.moe_ext.grouped_mm(x, weight, offsets, None, transposed=transposed)
    for e in range(4):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        matrix = weight[e].double() if transposed else weight[e].double().T
        assert torch.equal(found[rows].double(), x[rows].double() @ matrix)
    assert not any(FEW_ROWS in kernel for kernel in kernels(gpu))


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"interleaved": True},
    {"transposed": True},
    {"transposed": True, "interleaved": True},
    {"listed": True},
]
CLAMPED = [{**options, "interleaved": True} for name, options in ACTIVATIONS.items() if name in ("gpt_oss", "clamped_silu")]
OTHER_ACTIVATIONS = [{"activation": name} for name in ("gelu", "gelu_tanh", "relu", "relu2")]


@pytest.mark.parametrize("options", [*LAYOUTS, *CLAMPED, *OTHER_ACTIVATIONS], ids=str)
def test_fused_is_bit_for_bit_the_composed(options: dict[str, Any], gpu: SimulatedGpu) -> None:
    is_list, transposed = options.get("listed", False), options.get("transposed", False)
    options = {k: v for k, v in options.items() if k != "listed"}
    build = layer(T=14, K=3, E=7, H=296, I=40, bias=True, ids="dropped", **options)
    args, _ = (listed(build) if is_list else build)(Maker(torch.bfloat16, str(options)))
    function = torch.ops.moe_ext._grouped_forward_train
    out, pre_act, offsets, r2s, s2r = (function.list if is_list else function.default)(*args, **options)
    assert sum(UP in name for name in kernels(gpu)) == 1
    rows = torch.ops.moe_ext.permute(args[0], r2s, s2r, 3)
    if is_list:
        gate, up = (torch.ops.moe_ext.grouped_mm.list(rows, args[i], offsets, args[i + 3]) for i in (3, 4))
        steps = torch.cat([gate, up], 1)
    else:
        steps = torch.ops.moe_ext.grouped_mm(rows, args[3], offsets, args[5], transposed=transposed)
    assert torch.equal(pre_act, steps) and not pre_act[int(offsets[-1]) :].any()
    act = torch.ops.moe_ext.gated_activation(steps, **{k: v for k, v in options.items() if k != "transposed"})
    act[int(offsets[-1]) :] = 0  # the op by itself knows of no dropped slots
    down, down_bias = (args[5], args[8]) if is_list else (args[4], args[6])
    mm = torch.ops.moe_ext.grouped_mm.list if is_list else torch.ops.moe_ext.grouped_mm.default
    y = mm(act, down, offsets, down_bias, transposed=transposed)
    assert torch.equal(out, torch.ops.moe_ext.unpermute(y, r2s, s2r, 3, args[2]))
