"""What every op of the table promises: its schema, fake and autograd fit together, torch.compile and eager agree, results and
gradients obey the error rule, whole numbers come out exactly, and nothing depends on the run or the number of threads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from moe_ext import functional as _functional  # noqa: F401  (loads the ops)
from tests.helpers.error_rule import check_error_rule
from tests.helpers.op_table import CASES, OPS, Case, results_and_gradients, tensors

DIFFERENTIABLE = [c for c in CASES if c.entry.differentiable]
LOW = [torch.float32, torch.bfloat16, torch.float16]
# One case per op is traced through AOTAutograd; tracing depends on the op and its optional arguments, not on the routing.
TRACED = [
    "grouped_forward-tiny_bias", "grouped_forward-gpt_oss", "grouped_forward.list-default", "grouped_forward.list-ungated_relu2",
    "sort_by_expert-random_int64", "permute-default", "unpermute-weighted", "unpermute-plain", "grouped_mm-bias", "grouped_mm.list-default",
    "grouped_mm_wgrad-default", "gated_activation-gpt_oss", "_grouped_backward-all", "_grouped_backward.list-all",
]  # fmt: skip


def cases(chosen: list[Case], *dtypes: torch.dtype) -> Any:
    """Parametrisation; with dtypes, over both."""
    if not dtypes:
        return pytest.mark.parametrize("case", [pytest.param(c, id=str(c)) for c in chosen])
    pairs = [pytest.param(c, d, id=f"{c}-{str(d).removeprefix('torch.')}") for c in chosen for d in dtypes]
    return pytest.mark.parametrize(("case", "dtype"), pairs)


def by_name(*names: str) -> list[Case]:
    found = [c for c in CASES if str(c) in names]
    assert len(found) == len(names), set(names) - {str(c) for c in found}
    return found


def test_the_table_has_every_op() -> None:
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith(("moe::", "moe_ext::"))]
    names = {s.name.partition("::")[2] + (f".{s.overload_name}" if s.overload_name else "") for s in schemas}
    assert names == set(OPS)


@cases(CASES)
def test_opcheck(case: Case) -> None:
    args, kwargs = case.inputs(torch.float32)
    args = case.with_leaves(args)
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if str(case) in TRACED:
        utils.append("test_aot_dispatch_dynamic")
    if case.label == "expanded":  # opcheck copies its inputs in place, which memory shared by elements does not allow
        utils.remove("test_schema")
    opcheck(case.function, args, kwargs, test_utils=utils)


@cases(CASES)
def test_fake_has_the_shape_dtype_and_strides_of_the_real_result(case: Case) -> None:
    args, kwargs = case.inputs(torch.bfloat16)
    mode = FakeTensorMode()

    def fake(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return mode.from_tensor(value)
        return type(value)(fake(v) for v in value) if isinstance(value, (tuple, list)) else value

    with mode:
        expected = tensors(case.function(*fake(args), **kwargs))
    real = tensors(case.function(*args, **kwargs))
    assert [(t.shape, t.dtype, t.stride(), t.device) for t in expected] == [(t.shape, t.dtype, t.stride(), t.device) for t in real]


def _compiled_equals_eager(case: Case, backend: str) -> None:
    args, kwargs = case.inputs(torch.float32)
    compiled = torch.compile(lambda *a: case.function(*a, **kwargs), fullgraph=True, backend=backend)
    torch._dynamo.reset()
    expected = results_and_gradients(case, case.function, args, kwargs)
    for found, value in zip(results_and_gradients(case, compiled, args, {}), expected, strict=True):
        assert torch.equal(found, value)


@cases(by_name(*TRACED))
def test_compiled_equals_eager(case: Case) -> None:
    _compiled_equals_eager(case, "aot_eager")


@cases(by_name("grouped_forward-tiny_bias", "grouped_forward.list-default"))
def test_inductor_equals_eager(case: Case) -> None:
    _compiled_equals_eager(case, "inductor")


@cases(CASES, *LOW)
def test_error_is_at_most_twice_that_of_plain_pytorch(case: Case, dtype: torch.dtype) -> None:
    check_error_rule(case, dtype, "cpu")


def _exact_on_whole_numbers(case: Case) -> bool:
    """Whether whole numbers stay whole: without an activation, and with those that are piecewise polynomials."""
    has_activation = any(word in case.op for word in ("grouped_forward", "grouped_backward", "activation"))
    activation = case.inputs(torch.float64, integers=True)[1].get("activation", "silu")
    return not has_activation or activation in ("relu", "relu2")


@cases([c for c in CASES if _exact_on_whole_numbers(c)])
def test_whole_numbers_are_exact_in_float64(case: Case) -> None:
    args, kwargs = case.inputs(torch.float64, integers=True)
    new = results_and_gradients(case, case.function, args, kwargs)
    truth = results_and_gradients(case, case.entry.reference, args, kwargs)
    assert any(t.any() for t in truth) or case.label.startswith("no_")
    for i, (n, t) in enumerate(zip(new, truth, strict=True)):
        assert torch.equal(n, t), f"tensor {i}"


def _has_elements(case: Case) -> bool:
    return case.label not in ("no_tokens", "no_rows", "expanded", "float32_routing")  # shared or float32 values cannot be differenced


@cases([c for c in DIFFERENTIABLE if _has_elements(c)])
def test_gradcheck(case: Case) -> None:
    args, kwargs = case.inputs(torch.float64)
    args = case.with_leaves(args)
    leaves = [t for t in tensors(list(args)) if t.requires_grad]

    def function(*values: torch.Tensor) -> Any:
        rest = iter(values)

        def put(value: Any) -> Any:
            if isinstance(value, list):
                return [put(v) for v in value]
            return next(rest) if isinstance(value, torch.Tensor) and value.requires_grad else value

        return case.function(*[put(a) for a in args], **kwargs)

    exhaustive = case.label == "tiny_bias"  # the whole Jacobian; elsewhere a random projection of it
    assert torch.autograd.gradcheck(function, leaves, fast_mode=not exhaustive)


@cases(CASES, torch.bfloat16)
def test_runs_and_thread_counts_agree_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    args, kwargs = case.inputs(dtype)
    runs = []
    for threads in (2, 2, 1):
        torch.set_num_threads(threads)
        runs.append(results_and_gradients(case, case.function, args, kwargs))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
