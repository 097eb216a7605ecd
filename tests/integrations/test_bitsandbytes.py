"""4-bit experts against bitsandbytes' own modules, by the error rule: formats, dtypes, what is refused and why, and the layout that some
processors bring. Tests are called by the traps they are about; how products are computed is in test_bitsandbytes_blocks.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_ext.integrations.run import bitsandbytes as ours
from moe_ext.integrations.usable import Refused
from tests.integrations.quantized import (
    COUNTS,
    LOW,
    bitsandbytes,
    check,
    dense,
    experts4bit,
    linear4bit,
    loop,
    offsets_of,
    pack_for_cpu,
    product_and_gradient,
    quantize,
    random,
    read,
)  # fmt: skip


def refused(linears: Any, like: Tensor | None = None) -> str:
    with pytest.raises(Refused) as caught:
        ours.read(linears, like)
    found = str(caught.value)
    return found


FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "nf4_double": {"quant_type": "nf4"},  # T61
    "fp4_double": {"quant_type": "fp4"},
    "many_blocks_double": {"quant_type": "nf4", "blocksize": 32, "out_features": 150, "in_features": 100},  # more scales than 256, T61
    "blocksize_128": {"quant_type": "nf4", "blocksize": 128},
    "blocksize_1024": {"quant_type": "fp4", "blocksize": 1024},
    "blocksize_2048": {"quant_type": "nf4", "blocksize": 2048, "compress_statistics": False},
    "blocksize_4096": {"quant_type": "nf4", "blocksize": 4096},  # larger than the matrix
    "partial_last_block": {"quant_type": "nf4", "out_features": 47, "in_features": 34},  # T62, T68
    "rows_end_inside_bytes": {"quant_type": "nf4", "out_features": 33, "in_features": 63, "compress_statistics": False},  # T68
    "stored_in_bfloat16": {"quant_type": "nf4", "quant_storage": torch.bfloat16},  # T64
    "stored_in_float32": {"quant_type": "fp4", "quant_storage": torch.float32},
}  # fmt: skip


@pytest.mark.parametrize("dtype", LOW[:2], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_T61_T62_T64_T68_formats(name: str, dtype: torch.dtype) -> None:
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles what it runs for odd rows
        check(experts4bit(len(COUNTS), compute=dtype, **FORMATS[name]), dtype)


def test_T63_experts_of_different_formats_in_one_projection() -> None:
    options = [o for o in FORMATS.values() if "out_features" not in o][: len(COUNTS) + 2][-len(COUNTS) :]
    check(nn.ModuleList(linear4bit(seed=e, **o) for e, o in enumerate(options)))


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4_double", "many_blocks_double", "partial_last_block", "stored_in_bfloat16"])
def test_T61_T68_the_weights_are_those_of_the_format(name: str) -> None:
    """High nibble first, a table of 16 numbers, and scales that are 8-bit codes around an offset themselves: written out."""
    linear = linear4bit(**FORMATS[name])
    state, packed = linear.weight.quant_state, linear.weight.data.view(torch.uint8).flatten()
    scales = state.absmax
    if state.nested:
        each = state.state2.absmax.repeat_interleave(256)[: scales.numel()]
        scales = state.state2.code[scales.long()] * each + state.offset
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[: state.shape.numel()]
    expected = state.code[codes.long()] * scales.repeat_interleave(state.blocksize)[: codes.numel()]
    assert torch.equal(read([linear], random(1, 1))[0], expected.view(state.shape))


def test_matrices_of_a_few_numbers() -> None:
    for out_features, in_features in ((1, 2), (2, 1), (1, 1), (2, 2)):
        linear = linear4bit(out_features, in_features, quant_type="nf4")
        with torch.compiler.set_stance("force_eager"):
            found = read([linear], random(1, 1))[0]
        assert torch.equal(found, dense(linear).reshape(out_features, in_features))


# -------------------------------------------------------------------------------------------------------------- dtypes of computation
@pytest.mark.parametrize("stored", LOW, ids=str)
@pytest.mark.parametrize("compute", [None, *LOW], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_T42_T44_T69_every_combination_of_dtypes(dtype: torch.dtype, compute: torch.dtype | None, stored: torch.dtype) -> None:
    """Of rows, of computation, and of the weight before it was quantized; the last is no dtype of computation."""
    linears = experts4bit(len(COUNTS), compute=compute, stored=stored, quant_type="nf4")
    check(linears, dtype)
    matrix = read(linears, random(1, 64, dtype=dtype))[2]
    assert matrix.dtype == (compute or dtype) and torch.equal(matrix, dense(linears[2], matrix.dtype))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_T43_no_compute_dtype_before_the_first_forward(dtype: torch.dtype) -> None:
    """The first input decides it for good, exactly as in the modules' own forward."""
    theirs, linears = experts4bit(), experts4bit()
    loop(theirs, random(5, 64, dtype=dtype), [1] * 5)
    before = {(m.compute_dtype, m.compute_type_is_set) for m in linears}
    assert read(linears).compute_dtype is None and {(m.compute_dtype, m.compute_type_is_set) for m in linears} == before
    assert read(linears, random(5, 64, dtype=dtype)).compute_dtype == dtype
    for other in LOW:
        like = random(5, 64, dtype=other)
        assert read(linears, like).compute_dtype == (theirs[0].compute_dtype or other)
        assert [(m.compute_dtype, m.compute_type_is_set) for m in linears] == [(m.compute_dtype, m.compute_type_is_set) for m in theirs]


def test_T41_one_expert_with_another_compute_dtype() -> None:
    linears = experts4bit(compute=torch.bfloat16)
    linears[3].compute_dtype = torch.float32
    assert refused(linears, random(1, 64)) == "its 4-bit experts compute in bfloat16, float32"
    linears[3].compute_dtype, linears[3].compute_type_is_set = None, False
    assert refused(linears, random(1, 64)) == "its 4-bit experts compute in bfloat16, float32"
    assert not linears[3].compute_type_is_set  # a refusal changes nothing
    assert read(linears, random(1, 64, dtype=torch.bfloat16)).compute_dtype == torch.bfloat16


def test_float64_without_a_compute_dtype_is_refused() -> None:
    assert refused(experts4bit(), random(1, 64, dtype=torch.float64)) == "its 4-bit experts compute in float64"
    assert read(experts4bit(compute=torch.float32), random(1, 64, dtype=torch.float64)).compute_dtype == torch.float32


def test_T37_under_autocast_as_if_its_dtype_were_the_compute_dtype() -> None:
    """Forward, and backward outside of it: what a linear layer does there, and what bitsandbytes does on the CPU."""

    def run(linears: nn.ModuleList, autocast: bool) -> tuple[Tensor, Tensor]:
        def compute(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return read(linears, x).grouped_mm(x, offsets_of(COUNTS))

        return product_and_gradient(compute, random(44, 64), random(44, 48, seed=1))

    linears = experts4bit(len(COUNTS), compute=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        check(linears)
    assert all(map(torch.equal, run(linears, True), run(experts4bit(len(COUNTS), compute=torch.bfloat16), False)))


# ------------------------------------------------------------------------------------------------------------------------- refusals
def test_T28_weights_that_require_a_gradient() -> None:
    linears = experts4bit(quant_storage=torch.bfloat16)
    linears[2].weight.requires_grad_()
    assert refused(linears) == "the 4-bit weight of expert 2 requires a gradient, which packed values cannot have"


def test_T44_a_dense_layer_among_them() -> None:
    linears = experts4bit()
    linears[1] = nn.Linear(64, 48)
    assert refused(linears) == "expert 1 is a Linear, not a Linear4bit of bitsandbytes"
    assert [ours.is_quantized(m) for m in linears] == [True, False, True, True, True]


def test_a_forward_of_another_class() -> None:
    class Other(bitsandbytes.nn.Linear4bit):  # type: ignore[misc, name-defined]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    linears = experts4bit()
    linears[4].__class__ = Other
    assert refused(linears) == "expert 4 is a Other, not a Linear4bit of bitsandbytes"
    linears[4].__class__ = bitsandbytes.nn.LinearNF4
    check(linears)


def test_T65_a_lost_quant_state_is_found_in_the_module() -> None:
    linears = experts4bit(len(COUNTS), compute=torch.float32)
    linears[0].weight.quant_state = None
    packed = linears[2].weight.data
    linears[2].weight = nn.Parameter(packed, requires_grad=False)  # what FSDP leaves
    found = read(linears)
    assert linears[0].weight.quant_state is None and type(linears[2].weight) is nn.Parameter  # reading repairs nothing
    assert all(torch.equal(found[e], dense(m)) for e, m in enumerate(experts4bit(len(COUNTS))))
    check(linears)


def lose_state(linear: Any) -> None:
    linear.weight.quant_state = linear.quant_state = None


def not_quantized(linear: Any) -> None:
    linear.weight, linear.quant_state = bitsandbytes.nn.Params4bit(torch.zeros(48, 64)), None


def cut(linear: Any) -> None:
    linear.weight.data = linear.weight.data[:512]


def cut_scales(linear: Any) -> None:
    linear.weight.quant_state.absmax = linear.weight.quant_state.absmax[:24]


def three_dimensions(linear: Any) -> None:
    linear.weight.quant_state.shape = torch.Size((1, 48, 64))


def without_shape(linear: Any) -> None:
    linear.weight.quant_state.shape = None


def transposed(linear: Any) -> None:
    linear.weight.quant_state.shape = torch.Size((64, 48))


def to_meta(linear: Any) -> None:
    linear.weight = bitsandbytes.nn.Params4bit(
        torch.empty(1536, 1, dtype=torch.uint8, device="meta"), quant_state=linear.quant_state, bnb_quantized=True
    )


def parametrized(linear: Any) -> None:
    linear._parameters["weight"] = None


UNUSABLE = {
    "T65_lose_state": (lose_state, "has no quant_state"), "T65_not_quantized": (not_quantized, "has no quant_state"),
    "T65_meta": (to_meta, "is on meta"), "T70_three_dimensions": (three_dimensions, "has shape torch.Size([1, 48, 64])"),
    "T70_without_shape": (without_shape, "has shape None"), "T70_transposed": (transposed, "has shape torch.Size([64, 48])"),
    "sharded": (cut, "holds 512 bytes, where 3072 packed values take 1536"), "scales": (cut_scales, "has scales of uint8 [24]"),
    "parametrized": (parametrized, "is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_T65_T70_unusable_weights_are_refused_with_a_reason(name: str) -> None:
    change, words = UNUSABLE[name]
    linears = experts4bit()
    read(linears, random(1, 64))
    change(linears[3])
    assert refused(linears, random(1, 64)).startswith(f"the 4-bit weight of expert 3 {words}")


def test_T70_after_a_merge_by_peft() -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT (pip install peft)")
    linears = experts4bit(len(COUNTS), compute=torch.float32, quant_type="nf4")
    model = nn.ModuleDict({"experts": linears})
    model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
    before = dense(linears[0].base_layer)
    with pytest.warns(UserWarning, match="rounding errors"):
        model.merge_adapter()
    base = nn.ModuleList(getattr(m, "base_layer", m) for m in linears)
    for m in base:
        m.support_avx512bf16_for_cpu = False
    assert not torch.equal(dense(base[0]), before)
    check(base)


def test_T72_prequantized_checkpoints() -> None:
    linears, loaded = experts4bit(len(COUNTS), compute=torch.float32), experts4bit(len(COUNTS), compute=torch.float32)
    for e, (saved, linear) in enumerate(zip(linears, loaded, strict=True)):
        quantize(linear, random(48, 64, seed=100 + e))
        entries = saved.state_dict()
        data = entries.pop("weight")
        linear.weight = bitsandbytes.nn.Params4bit.from_prequantized(data, entries, device="cpu", module=linear)
    assert all(torch.equal(read(loaded)[e], dense(m)) for e, m in enumerate(linears))
    check(loaded)


# ----------------------------------------------------------------------------------------------------------- the layout for some CPUs
@pytest.mark.parametrize("name", ["nf4", "fp4_double", "stored_in_bfloat16", "blocksize_128"])
def test_T66_the_cpu_layout_is_read_as_it_is(name: str) -> None:
    options = FORMATS[name] | {"out_features": 96, "in_features": 128}
    linear, usual = pack_for_cpu(linear4bit(**options)), linear4bit(**options)
    state = usual.weight.quant_state
    scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    usual.weight.quant_state = copy.copy(state)
    usual.weight.quant_state.absmax, usual.weight.quant_state.nested = scales.bfloat16().float(), False
    packed = linear.weight.data.clone()
    assert torch.equal(read([linear])[0], dense(usual))
    assert torch.equal(linear.weight.data, packed)


def test_T67_gradients_of_weights_in_the_cpu_layout() -> None:
    """The module's own forward has none there; ours has, so such experts need not run it."""
    linears = nn.ModuleList(pack_for_cpu(m) for m in experts4bit(len(COUNTS), 64, 128, compute=torch.float32))
    with ours.weights_kept(linears):
        assert not any(m.weight.quant_state.packing_format_for_cpu for m in linears)
        check(linears)
    assert all(m.weight.quant_state.packing_format_for_cpu for m in linears)
    rows, grad = random(44, 128), random(44, 64)
    new = product_and_gradient(lambda x: read(linears, x).grouped_mm(x, offsets_of(COUNTS)), rows, grad)
    with ours.weights_kept(linears):
        expected = product_and_gradient(lambda x: read(linears, x).grouped_mm(x, offsets_of(COUNTS)), rows, grad)
    assert all(map(torch.equal, new, expected))


def test_T67_sizes_that_the_cpu_layout_cannot_have_run_in_evaluation() -> None:
    linears = experts4bit(len(COUNTS), 24, 34, compute=torch.float32).eval()
    for m in linears:
        m.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        out = read(linears, random(1, 34)).grouped_mm(random(44, 34), offsets_of(COUNTS))
    assert torch.equal(out, read(experts4bit(len(COUNTS), 24, 34, compute=torch.float32)).grouped_mm(random(44, 34), offsets_of(COUNTS)))


def test_T66_what_bitsandbytes_makes_of_the_scales_when_it_saves_is_refused() -> None:
    """`state_dict()` undoes the layout of the bytes, but not of the scales unless they are quantized themselves."""
    linears = nn.ModuleList(pack_for_cpu(m) for m in experts4bit(2, 64, 128, quant_type="nf4", compress_statistics=False))
    linears.state_dict()
    assert refused(linears) == "the 4-bit weight of expert 0 has scales of bfloat16 [2, 64] for 8192 values in blocks of 64"


def test_T66_bytes_and_scales_of_different_layouts_are_refused() -> None:
    """What a forward leaves behind that ran on a detached alias of the weight: both share one state."""
    linears = experts4bit(2, 64, 128)
    usual = linears[1].weight.data
    pack_for_cpu(linears[1]).weight.data = usual
    assert refused(linears) == "the 4-bit weight of expert 1 is in the usual layout, its quant_state in the one for the CPU"


def test_undisturbed_takes_back_what_a_forward_decides() -> None:
    linears = experts4bit(1, 64, 64, bias=True, stored=torch.float16)
    linears[0].support_avx512bf16_for_cpu = True
    weight, bias = linears[0].weight, linears[0].bias.data
    with ours.weights_kept(linears.eval()), torch.no_grad():
        linears[0](random(3, 64, dtype=torch.bfloat16))
        assert linears[0].compute_dtype == linears[0].bias.dtype == torch.bfloat16
    assert linears[0].compute_dtype is None and not linears[0].compute_type_is_set and linears[0].support_avx512bf16_for_cpu
    assert linears[0].weight is weight and linears[0].bias.data.data_ptr() == bias.data_ptr() and linears[0].bias.dtype == torch.float16
    assert not weight.quant_state.__dict__.get("packing_format_for_cpu", False)
