"""The op table on a simulated GPU: csrc/ops over the CUDA kernels' PTX, for compute capabilities 8.0 and 9.0.

Everything the simulator checks (bounds, races, reads before writes, deadlock) is checked on the way. What a test of another
device would need many draws for (results of a few numbers) is left to whole numbers, which are compared exactly.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
import torch

from moe_ext.testing import SimulatedGpu, simulated_gpu
from tests.gpusim.few_rows import FEW_ROWS_CASES
from tests.gpusim.harness import folder, needs_nvcc
from tests.gpusim.mutations import kernels_of_9_0
from tests.helpers import plain_ops
from tests.helpers.error_rule import check_error_rule
from tests.helpers.op_table import (
    ACTIVATIONS,
    ALL_STACKED,
    CASES,
    GPT_OSS,
    Build,
    Case,
    Inputs,
    Maker,
    activation_case,
    backward_of,
    layer,
    mm_case,
    results_and_gradients,
    rows_case,
)

pytestmark = needs_nvcc

FEW_NUMBERS = ("tiny_bias", "single_token", "k_is_1", "all_dropped", "no_tokens", "no_rows")
LAYER_OPS = ("grouped_forward", "_grouped")
MODES: list[dict[str, str | int]] = [{"ASYNC": "early"}, {"ASYNC": 1, "SCHED": 1}, {"ASYNC": "late", "SCHED": 2}]
DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16,)
# `make gpusim-full`
FULL = os.environ.get("GPUSIM_FULL") == "1"
if FULL:
    MODES += [{"ASYNC": seed, "SCHED": seed} for seed in range(3, 7)]
    MODES += [{"ASYNC": "late", "STRICT": 1}, {"ASYNC": "late", "SMS": 3}, {"ASYNC": "late", "SMS": 2, "SCHED": 7}]
    DTYPES = (torch.bfloat16, torch.float16)

# Shapes that every kernel of sm_90a accepts: multiples of 8, with tails in each direction of every tile; the last two fill
# the tiles of the cooperative kernel and its clusters.
HOPPER = {
    "grouped_mm": {
        "small": mm_case("grouped_mm", T=100, inputs=64, outputs=72),
        "tails": mm_case("grouped_mm", T=150, E=5, inputs=200, outputs=136),
        "transposed_tails": mm_case("grouped_mm", T=150, E=3, inputs=72, outputs=264, transposed=True),
        "large": mm_case("grouped_mm", T=400, E=2, inputs=136, outputs=264),
        "transposed_large": mm_case("grouped_mm", T=400, E=2, inputs=72, outputs=200, transposed=True),
    },
    "grouped_mm_wgrad": {
        "tails": mm_case("grouped_mm_wgrad", T=150, E=9, inputs=136, outputs=264),
        "empty_experts": mm_case("grouped_mm_wgrad", T=150, E=8, inputs=200, outputs=136, ids="sparse"),
        "many_rows": mm_case("grouped_mm_wgrad", T=400, E=2, inputs=136, outputs=264),
        "many_rows_empty_experts": mm_case("grouped_mm_wgrad", T=400, E=3, inputs=72, outputs=136, ids="sparse"),
    },
    "grouped_forward": {
        "hopper": layer(T=70, K=2, E=4, H=64, I=72),
        "hopper_transposed_bias": layer(T=70, K=2, E=4, H=72, I=64, transposed=True, bias=True, ids="dropped"),
    },
}


def unaligned_view(build: Build) -> Build:
    """The first argument as columns of a wider matrix."""

    def built(m: Maker) -> Inputs:
        (x, *others), options = build(m)
        wide = x.new_full((x.shape[0], x.shape[1] + 8), float("nan"))
        return (wide[:, 3:-5].copy_(x), *others), options

    return built


# For GPUSIM_FULL.
WIDER = {
    "grouped_mm": {
        "wide": mm_case("grouped_mm", T=450, E=3, inputs=328, outputs=392),
        "wide_transposed": mm_case("grouped_mm", T=450, E=3, inputs=328, outputs=392, transposed=True),
        "many_experts": mm_case("grouped_mm", T=350, E=70, inputs=136, outputs=264),
    },
    "grouped_mm_wgrad": {"wide": mm_case("grouped_mm_wgrad", T=450, E=3, inputs=264, outputs=392)},
    "grouped_forward": {
        "wide": layer(T=150, K=4, E=5, H=264, I=136),
        "wide_gpt_oss": layer(**(GPT_OSS | {"T": 150, "K": 4, "E": 5, "H": 264, "I": 136})),
    },
}
if FULL:
    HOPPER = {op: {**cases, **WIDER[op]} for op, cases in HOPPER.items()}
# No row begins at a multiple of 16 bytes: elements are loaded one by one.
ODD = {
    "grouped_mm": {
        "unaligned": mm_case("grouped_mm", inputs=21, outputs=35, bias=True),
        "unaligned_transposed": mm_case("grouped_mm", inputs=21, outputs=35, transposed=True),
        "unaligned_results": mm_case("grouped_mm", T=150, inputs=64, outputs=131, bias=True),
    },
    "grouped_mm_wgrad": {"unaligned_results": mm_case("grouped_mm_wgrad", T=150, inputs=64, outputs=131)},
    "permute": {"unaligned": rows_case("permute", H=301), "unaligned_view": unaligned_view(rows_case("permute", H=256))},
    "unpermute": {"unaligned": rows_case("unpermute", H=301, weighted=True)},
    "unpermute_backward": {
        "unaligned": rows_case("unpermute_backward", H=301),
        "unaligned_view": unaligned_view(rows_case("unpermute_backward", H=256)),
    },
    "grouped_bias_grad": {
        "unaligned": mm_case("grouped_bias_grad", T=150, inputs=37),
        "unaligned_view": unaligned_view(mm_case("grouped_bias_grad", T=150, inputs=64)),
    },
    **{
        op: {f"{name}_unaligned": activation_case(op.endswith("backward"), I=21, **options) for name, options in ACTIVATIONS.items()}
        for op in ("gated_activation", "gated_activation_backward")
    },
}
# Rows of whole 16-byte accesses: several rows in a block, a row that fills it, and one that does so more than once; more rows and
# tokens per expert than are in flight at a time.
WIDE = {
    "permute": {"wide": rows_case("permute", H=256), "wide_long": rows_case("permute", T=4, H=8456)},
    "unpermute": {
        "wide": rows_case("unpermute", H=64, K=8, E=9, weighted=True),
        "wide_long": rows_case("unpermute", T=4, H=2120, K=11, E=12, weighted=True),
    },
    "unpermute_backward": {"wide": rows_case("unpermute_backward", H=64), "wide_long": rows_case("unpermute_backward", H=2120)},
    "grouped_bias_grad": {"wide": mm_case("grouped_bias_grad", T=450, E=3, inputs=264)},
    **{
        op: {f"{name}_wide": activation_case(op.endswith("backward"), I=72, **options) for name, options in ACTIVATIONS.items()}
        for op in ("gated_activation", "gated_activation_backward")
    },
    "_grouped_backward": {"wide": backward_of(layer(H=2120, I=72, T=9, bias=True, ids="dropped"), ALL_STACKED)},
    "grouped_mm": {"wide_bias": mm_case("grouped_mm", T=150, inputs=40, outputs=136, bias=True)},
}


class OwnCase(Case):
    """A case of the tables of this file, under the name of its op."""

    def inputs(self, dtype: torch.dtype, integers: bool = False, draw: int = 0) -> Inputs:
        build = next(table[self.op][self.label] for table in (HOPPER, ODD, WIDE) if self.label in table.get(self.op, {}))
        return build(Maker(dtype, f"{self}/{draw}", integers))


def own_cases(table: dict[str, dict[str, Build]]) -> list[OwnCase]:
    return [OwnCase(op, label) for op, labels in table.items() for label in labels]


HOPPER_CASES, ODD_CASES, WIDE_CASES = own_cases(HOPPER), own_cases(ODD), own_cases(WIDE)


@pytest.fixture
def ampere() -> Iterator[SimulatedGpu]:
    with simulated_gpu(folder(), 80) as gpu:
        yield gpu


@pytest.fixture
def hopper() -> Iterator[SimulatedGpu]:
    if not kernels_of_9_0():
        pytest.skip("CUTLASS is not installed, so the library has no kernels of sm_90a")
    with simulated_gpu(folder(), 90) as gpu:
        yield gpu


def ran(gpu: SimulatedGpu, word: str) -> bool:
    return any(word in launch["kernel"] for launch in gpu.take_launches())


@pytest.mark.parametrize("case", [*(c for c in CASES if c.label not in FEW_NUMBERS), *ODD_CASES, *WIDE_CASES], ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(case: Case, ampere: SimulatedGpu) -> None:
    dtypes = DTYPES if case.op.startswith(LAYER_OPS) else (torch.float32, torch.bfloat16, torch.float16)
    for dtype in dtypes:
        check_error_rule(case, dtype, "cpu")
        assert ampere.take_launches(), "nothing ran on the simulated GPU"


def is_exact(case: Case) -> bool:
    """Whole numbers stay whole: without an activation, and with those that are piecewise polynomials."""
    activation = case.inputs(torch.float32, integers=True)[1].get("activation", "silu")
    return not any(w in case.op for w in ("grouped_forward", "grouped_backward", "activation")) or activation in ("relu", "relu2")


@pytest.mark.parametrize("case", [c for c in [*CASES, *ODD_CASES, *WIDE_CASES] if is_exact(c)], ids=str)
def test_whole_numbers_are_exact(case: Case, ampere: SimulatedGpu) -> None:
    for dtype in (torch.float32, torch.float64):
        args, kwargs = case.inputs(dtype, integers=True)
        new = results_and_gradients(case, case.function, args, kwargs)
        for n, t in zip(new, results_and_gradients(case, case.entry.reference, args, kwargs), strict=True):
            assert torch.equal(n, t)


@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_kernels_of_9_0(case: OwnCase, hopper: SimulatedGpu) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        check_error_rule(case, dtype, "cpu")
        assert ran(hopper, "GemmUniversal")


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("case", [*HOPPER_CASES, *ODD_CASES, *CASES] if FULL else HOPPER_CASES[:-1], ids=str)
def test_any_order_of_events(case: Case, architecture: int, mode: dict[str, str | int]) -> None:
    """Asynchronous work early, late and in between, warps in other orders: the same bits."""
    for dtype in DTYPES:
        with simulated_gpu(folder(), architecture):
            args, kwargs = case.inputs(dtype)
            expected = results_and_gradients(case, case.function, args, kwargs)
        with simulated_gpu(folder(), architecture, **mode):
            args, kwargs = case.inputs(dtype)
            found = results_and_gradients(case, case.function, args, kwargs)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("case", [c for c in [*ODD_CASES, *WIDE_CASES] if not c.op.startswith(("_", "grouped_mm"))], ids=str)
def test_whole_rows_move_16_bytes_at_a_time(case: OwnCase, ampere: SimulatedGpu) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        args, kwargs = case.inputs(dtype)
        case.function(*args, **kwargs)
        elements = 16 // dtype.itemsize if "wide" in case.label else 1
        assert ran(ampere, f"Li{elements}EE"), dtype


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("T, E", [(4400, 37), (30, 9001), (4400, 9001)])
def test_sort_of_many_slots_or_experts(T: int, E: int, dtype: torch.dtype, ampere: SimulatedGpu) -> None:
    """More slots than one block sorts, more experts than shared memory counts."""
    ids = Maker(torch.float32, "many").ids("dropped", T, 4, E, dtype)
    for n, p in zip(torch.ops.moe_ext.sort_by_expert(ids, E), plain_ops.sort_by_expert(ids, E), strict=True):
        assert torch.equal(n, p)
    launched = {launch["kernel"] for launch in ampere.take_launches()}
    assert all(any(kernel in name for name in launched) for kernel in (["count", "scan", "place"] if T > 4096 else ["sort"]))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("label", ["grouped_mm-large", "grouped_mm_wgrad-many_rows", "grouped_forward-hopper"])
def test_an_odd_number_of_multiprocessors(label: str) -> None:
    """Clusters of two leave one of them idle."""
    case = next(c for c in HOPPER_CASES if str(c) == label)
    with simulated_gpu(folder(), 90, SMS=3):
        check_error_rule(case, torch.bfloat16, "cpu")


def test_every_kernel_runs() -> None:
    """The list of kernels in the library against the list of kernels that ran."""
    seen: set[str] = set()
    operations = ("permute", "unpermute", "unpermute_backward", "sort_by_expert", "grouped_bias_grad", "gated_activation")
    chosen = [c for c in CASES if c.op in (*operations, "gated_activation_backward") and c.label != "no_rows"]
    chosen += [Case("grouped_forward", "gpt_oss"), Case("grouped_mm.list", "bias"), Case("grouped_mm", "transposed")]
    chosen += [Case("grouped_mm_wgrad", "default"), Case("_grouped_backward", "all")]
    chosen += [c for c in FEW_ROWS_CASES if c.label in ("few", "few_transposed_bias", "few_gpt_oss")]
    for architecture in (80, 90):
        with simulated_gpu(folder(), architecture) as gpu:
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                for case in [*chosen, *ODD_CASES, *WIDE_CASES, *(HOPPER_CASES if dtype.itemsize == 2 else HOPPER_CASES[1:2])]:
                    args, kwargs = case.inputs(dtype)
                    case.function(*args, **kwargs)
            for ids, T, E in itertools.product((torch.int32, torch.int64), (30, 4400), (37, 9001)):
                torch.ops.moe_ext.sort_by_expert(Maker(torch.float32).ids("dropped", T, 4, E, ids), E)
            seen |= {launch["kernel"] for launch in gpu.take_launches()}
            # Those of another test file.
            elsewhere = ("_instructions_", "gathered_gemm_kernel", "slot_weights_kernel", "tensor_maps_sm90")
            missing = {name for name in gpu.kernels() if not any(word in name for word in elsewhere)} - seen
    assert not missing, "\n".join(sorted(missing))


def test_the_cpu_kernels_are_back_afterwards() -> None:
    case = Case("permute", "default")
    with simulated_gpu(folder(), 80) as gpu:
        args, kwargs = case.inputs(torch.float32)
        case.function(*args, **kwargs)
        assert len(gpu.take_launches()) == 1
    args, kwargs = case.inputs(torch.float32)
    case.function(*args, **kwargs)
    assert gpu.take_launches() == []
