"""Experts that are bitsandbytes `Linear4bit` modules (NF4 or FP4): frozen, and run grouped on the packed weights as they are.

`read` turns the E modules of one projection into a `Projection`, or raises Refused where their own forward must run. A product
dequantizes the experts that have rows, a chunk of bounded size at a time, with bitsandbytes' own op, and again in the backward; with
a `DenseCache` it does so only when their contents have changed. Importing this imports no bitsandbytes: whoever has a Linear4bit has
loaded it.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import _formulas, ops
from ...experts import Projection
from ..usable import Refused, autocast_is_on

#: Dense bytes that one chunk of experts may take on the CPU; a single expert may be larger. Small chunks stay in the processor's
#: caches between being written and being read, larger ones spread over more threads.
WORKSPACE_BYTES = 16 << 20

#: What bitsandbytes dequantizes to. To float64 it returns memory that it has not written: delete when it refuses or supports it.
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_DISABLE_TORCH_FUNCTION = torch._C.DisableTorchFunctionSubclass  # Params4bit overrides it: every look at .device would be a call


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a `Linear4bit`; one below an adapter is the adapter's base layer."""
    kind = _linear4bit()
    return kind is not None and isinstance(module, kind)


def _linear4bit() -> Any:
    library = sys.modules.get("bitsandbytes")
    return None if library is None else library.nn.Linear4bit


# ------------------------------------------------------------------------------------------------------------------------- reading
def read(linears: Sequence[nn.Module], like: Tensor | None = None, cache: DenseCache | None = None) -> Quantized4bit:
    """The weights of the E modules of one projection at this moment; raises Refused where their own forward must run.

    like: the input of the call. It decides the compute dtype of modules that have none yet, for good, as their own first forward
    would. Hooks and replaced forwards are the caller's to look for. Runs once per forward over all experts.
    """
    kind = _linear4bit()
    weights: list[_Weight] = []
    distinct: dict[Any, int] = {}
    last: Any = None
    known: Any = None
    with _DISABLE_TORCH_FUNCTION():
        for i, linear in enumerate(linears):
            if type(linear) is not known:
                known = type(linear)
                if kind is None or not issubclass(known, kind) or known.forward is not kind.forward:
                    raise Refused(f"expert {i} is a {known.__name__}, not a Linear4bit of bitsandbytes")
            attributes = linear.__dict__
            weight = attributes["_parameters"].get("weight")
            # FSDP and others rebuild the parameter without its state; the module keeps it.
            state = getattr(weight, "quant_state", None) or attributes.get("quant_state")
            signature = _signature(attributes, weight, state)
            if signature != last:  # what is checked is checked once for all that are alike
                distinct.setdefault(signature, i)
                last = signature
            weights.append(_Weight(linear, weight, state))
        examples = [weights[i] for i in distinct.values()]
        for i, example in zip(distinct.values(), examples, strict=True):
            try:
                _check(example, weights[0], like)
            except Refused as refused:
                raise Refused(f"the 4-bit weight of expert {i} {refused}") from None
    dtypes = {dtype for w in examples if (dtype := _compute_dtype(w.linear, like)) is not None}
    if len(dtypes) > 1 or not dtypes <= set(COMPUTE_DTYPES):
        raise Refused(f"its 4-bit experts compute in {', '.join(sorted(_name(d) for d in dtypes))}")
    if like is not None:
        _decide_compute_dtype(linears, like)
    return Quantized4bit(weights, dtypes.pop() if dtypes else None, cache)


class _Weight(NamedTuple):
    linear: nn.Module
    weight: Any
    state: Any


def _signature(attributes: dict[str, Any], weight: Any, state: Any) -> tuple[Any, ...]:
    """All that `_check` and `_compute_dtype` look at."""
    if weight is None or state is None:
        return weight is None, state is None
    fields = state.__dict__
    absmax = fields["absmax"]
    return (
        type(weight), weight.device, weight.nbytes, weight.requires_grad, absmax.device, absmax.dtype, absmax.shape,
        fields["shape"], fields["blocksize"], fields["nested"], fields.get("packing_format_for_cpu") and weight.shape,
        attributes["compute_dtype"], attributes["compute_type_is_set"], attributes["in_features"], attributes["out_features"],
    )  # fmt: skip


def _check(w: _Weight, first: _Weight, like: Tensor | None) -> None:
    weight, state = w.weight, w.state
    if weight is None:
        raise Refused("is missing or is computed by a parametrization")
    if not isinstance(weight, sys.modules["bitsandbytes"].nn.Params4bit) and type(weight) not in (nn.Parameter, Tensor):
        raise Refused(f"is a {type(weight).__name__}, not a plain tensor")
    if state is None:
        raise Refused("has no quant_state: it is not quantized yet, or has lost it")
    if weight.requires_grad:
        raise Refused("requires a gradient, which packed values cannot have")
    device = first.weight.device if like is None else like.device
    if weight.device != device or state.absmax.device != device:
        raise Refused(f"is on {weight.device}, its scales on {state.absmax.device}, where {device} is needed")
    shape = (w.linear.out_features, w.linear.in_features)
    if state.shape != shape or state.shape != first.state.shape:
        raise Refused(f"has shape {state.shape}, where its module says {shape} and expert 0 has {first.state.shape}")
    _check_sizes(weight, state)


def _check_sizes(weight: Tensor, state: Any) -> None:
    """Sizes are checked because the kernels of bitsandbytes do not: they would read past the end of a sharded weight."""
    numbers, absmax = state.shape.numel(), state.absmax
    if weight.nbytes != (numbers + 1) // 2:
        raise Refused(f"holds {weight.nbytes} bytes, where {numbers} packed values take {(numbers + 1) // 2}: is it sharded?")
    if _is_cpu_layout(state) and weight.shape[0] != state.shape[0]:
        raise Refused("is in the usual layout, its quant_state in the one for the CPU")
    expected = (torch.bfloat16, 2) if _is_cpu_layout(state) else (torch.uint8, 1) if state.nested else (torch.float32, 1)
    # Delete when `_convert_weight_packed_for_cpu_inverse` restores scales that are not nested: `state_dict()` leaves them wrong.
    if (absmax.dtype, absmax.dim()) != expected or absmax.numel() != -(numbers // -state.blocksize):
        raise Refused(f"has scales of {_name(absmax.dtype)} {list(absmax.shape)} for {numbers} values in blocks of {state.blocksize}")


def _compute_dtype(linear: Any, like: Tensor | None) -> torch.dtype | None:
    """What `linear` would compute in, by the rule of its own forward; None when that depends on an input that is not there."""
    if like is None or linear.compute_type_is_set:
        return linear.compute_dtype or (None if like is None else like.dtype)
    return like.dtype if like.dtype in (torch.float32, torch.bfloat16) else linear.compute_dtype or like.dtype


def _decide_compute_dtype(linears: Sequence[Any], like: Tensor) -> None:
    """What the first forward of a Linear4bit does. Those without tokens are included: a set of experts has one compute dtype."""
    for linear in linears:
        if not linear.compute_type_is_set:
            linear.set_compute_type(like)
            linear.compute_type_is_set = True


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------------------- projection
class Quantized4bit(Projection):
    """E frozen 4-bit matrices. Rows are cast to the compute dtype and the product back to the dtype of the rows."""

    def __init__(self, weights: Sequence[_Weight], compute_dtype: torch.dtype | None, cache: DenseCache | None = None) -> None:
        self.weights = weights
        self.compute_dtype = compute_dtype
        self.cache = cache

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype that the weights had when they were quantized: most likely that of the model's hidden states."""
        return self.matrix(0).stored_dtype

    def grouped_mm(self, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and _formulas.transformed((rows,)):  # its weights are constants
            dtype = self._dtype(rows)
            out = _grouped_mm(rows.to(dtype), expert_offsets, lambda e: self.matrix(e).dequantize(dtype), len(self), self._shape())
            return out.to(rows.dtype)
        return _GroupedMM.apply(rows, expert_offsets, self)

    def _dtype(self, rows: Tensor) -> torch.dtype:
        """What a product with `rows` computes in."""
        return torch.get_autocast_dtype(rows.device.type) if autocast_is_on(rows.device) else self.compute_dtype or rows.dtype

    def _shape(self) -> torch.Size:
        return self.weights[0].state.shape

    def __getitem__(self, e: int) -> Tensor:
        """In the compute dtype (without one, float32): dequantized anew, and without a gradient."""
        return self.matrix(e).dequantize(self.compute_dtype or torch.float32)

    def tensors(self) -> list[Tensor]:
        """The packed values and their scales; no dtype of theirs is a dtype of computation."""
        return [t for w in self.weights for t in (w.weight, w.state.absmax)]

    def matrix(self, e: int) -> _Matrix:
        return _Matrix(self.weights[e].weight, self.weights[e].state)


class _Matrix:
    """One packed matrix as it is now. New weights, moves and merges of its module do not reach it; edits in place are noticed."""

    def __init__(self, weight: Tensor, state: Any) -> None:
        with _DISABLE_TORCH_FUNCTION():
            self.data = weight.detach()
        self.state = _copy(state)
        if state.nested:
            self.state.state2 = _copy(state.state2)
        self.stored_dtype: torch.dtype = state.__dict__.get("original_dtype", state.dtype)  # the CPU layout calls itself bfloat16
        self.kept: Tensor | None = None  # by a cache
        self.versions = self._versions()

    def _versions(self) -> tuple[int, ...]:
        return tuple(t._version for t in self.parts() if not t.is_inference())

    def parts(self) -> list[Tensor]:
        """Every tensor that the values depend on."""
        state = self.state
        return [self.data, state.absmax, *((state.offset, state.state2.absmax, state.state2.code) if state.nested else ())]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """`[out, in]`: what the forward multiplies with, rounded once."""
        if self.kept is not None and self.kept.dtype in (dtype, torch.float32):
            return self.kept.to(dtype)
        if self.versions != self._versions():
            raise RuntimeError("a 4-bit weight was changed in place between forward and backward")
        data, state = (self.data, self.state) if not _is_cpu_layout(self.state) else _undo_cpu_layout(self.data, self.state)
        state.dtype = dtype  # of the result
        flat = data.view(torch.uint8).reshape(-1)  # a first dimension of 1 would be taken for a transposed weight
        return sys.modules["bitsandbytes"].functional.dequantize_4bit(flat, state).reshape(state.shape)

    def dequantize_for_grad(self, dtype: torch.dtype) -> Tensor:
        """What bitsandbytes' backward multiplies with: rounded to the dtype that was quantized, then to that of the gradient.

        Delete when its backward dequantizes as its forward does.
        """
        through = self.stored_dtype not in (dtype, torch.float32)
        return self.dequantize(self.stored_dtype).to(dtype) if through else self.dequantize(dtype)


def _copy(state: Any) -> Any:
    twin = object.__new__(type(state))
    twin.__dict__.update(state.__dict__)
    return twin


class _GroupedMM(torch.autograd.Function):
    """Forward and the gradient of the rows. No dense weight is kept in between but those of a cache."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, expert_offsets: Tensor, projection: Quantized4bit) -> Tensor:
        cache, dtype = projection.cache, projection._dtype(rows)
        matrices: dict[int, _Matrix] = {}

        def dense(e: int) -> Tensor:
            matrix = matrices[e] = projection.matrix(e)
            if cache is not None:
                matrix.kept = cache.dense(projection.weights[e].linear, matrix, dtype)
            return matrix.dequantize(dtype)

        shape = projection._shape()
        ctx.save_for_backward(expert_offsets)
        ctx.matrices, ctx.dtype, ctx.shape = matrices, dtype, shape
        out = _grouped_mm(rows.to(dtype), expert_offsets, dense, len(projection), shape)
        return out.to(rows.dtype)

    @staticmethod
    @_formulas.each_of_a_batch
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (expert_offsets,) = ctx.saved_tensors
        matrices, dtype = ctx.matrices, ctx.dtype
        count = expert_offsets.numel() - 1
        grad_rows = _grouped_mm(grad.to(dtype), expert_offsets, lambda e: matrices[e].dequantize_for_grad(dtype), count, ctx.shape, True)
        return grad_rows.to(grad.dtype), None, None


def _grouped_mm(
    rows: Tensor, expert_offsets: Tensor, dense: Callable[[int], Tensor], count: int, shape: torch.Size, transposed: bool = False
) -> Tensor:
    """`rows` times the matrices `dense(e)` of `shape`, or times their transposes, a chunk of experts at a time."""
    parts = [
        ops.grouped_mm(rows[span], [dense(e) for e in experts], offsets, transposed=transposed)
        for span, experts, offsets in _chunks(expert_offsets, count, shape.numel() * rows.element_size())
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else rows.new_zeros(rows.shape[0], shape[1 if transposed else 0])


def _chunks(expert_offsets: Tensor, count: int, expert_bytes: int) -> Iterator[tuple[slice, Sequence[int], Tensor]]:
    """Rows, their experts, and where in these rows each expert begins. Experts without rows are left out; but reading the offsets
    would wait for a GPU, so that there all experts are one chunk."""
    if expert_offsets.device.type != "cpu":
        yield slice(None), range(count), expert_offsets
        return
    starts = expert_offsets.tolist()
    busy = [e for e in range(count) if starts[e + 1] > starts[e]]
    step = max(1, WORKSPACE_BYTES // expert_bytes)
    for i in range(0, len(busy), step):
        experts = busy[i : i + step]
        first, end = starts[experts[0]], starts[experts[-1] + 1]
        last = i + step >= len(busy)  # takes the rows past the end along: their results are zero
        offsets = torch.tensor([starts[e] - first for e in experts] + [end - first], dtype=torch.int32)
        yield slice(first, None if last else end), experts, offsets


# --------------------------------------------------------------------------------------------------------------------------- cache
@dataclass
class _Entry:
    format: tuple[Any, ...]
    parts: list[Tensor]
    dense: Tensor


class DenseCache:
    """Dense copies of 4-bit experts, for one owner; copies and pickles of the owner start with an empty one.

    An entry is used while every byte that it was made from is what it was, and that is what is compared: merges, loading, moves and
    edits, also through `.data`, which neither identity nor `_version` shows. This reads the packed bytes and a copy of them at each
    forward (on a GPU it also waits for the result), and keeps the dense weights of every expert that ever had a token.
    """

    def __init__(self) -> None:
        self._entries: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()

    def dense(self, linear: nn.Module, matrix: _Matrix, dtype: torch.dtype) -> Tensor:
        """`matrix.dequantize(dtype)`, from the last call with the same contents if there was one."""
        parts, state = matrix.parts(), matrix.state
        format = (dtype, state.shape, state.blocksize, state.quant_type, _is_cpu_layout(state), [(t.dtype, t.device) for t in parts])
        entry = self._entries.get(linear)
        if entry is None or entry.format != format or not all(map(torch.equal, entry.parts, parts)):
            entry = self._entries[linear] = _Entry(format, [t.clone() for t in parts], matrix.dequantize(dtype))
        return entry.dense

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        self._entries.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


# -------------------------------------------------------------------------------------------------- what bitsandbytes does to modules
# On processors with AVX512-BF16 the forward of a Linear4bit in evaluation, without a gradient, rewrites its weight for a kernel that
# has no backward: other order of nibbles, scales in bfloat16. Such weights are read here as they are. Delete when it no longer does.
def _is_cpu_layout(state: Any) -> bool:
    return state.__dict__.get("packing_format_for_cpu", False)


def _undo_cpu_layout(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Packed bytes and a state in the usual layout, with the values that the weight has now (its scales stay rounded)."""
    out_features, in_features = state.shape
    pairs = data.reshape(out_features // 32, in_features // 2, 1, 16, 2)  # 32 rows share a byte column: low nibbles are rows 0-15
    nibbles = torch.cat((pairs & 15, pairs >> 4), dim=2).reshape(out_features // 32, in_features // 2, 32, 2).transpose(1, 2)
    usual = _copy(state)
    usual.packing_format_for_cpu = False
    usual.dtype = state.original_dtype
    usual.absmax = state.absmax.T.reshape(-1).float()
    return (nibbles[..., 0] << 4 | nibbles[..., 1]).reshape(-1, 1), usual


@contextlib.contextmanager
def weights_kept(root: nn.Module) -> Iterator[None]:
    """Inside, the forward of a `Linear4bit` below `root` leaves its weight alone, and has a gradient also where it was rewritten before.

    Afterwards weights, and the compute dtypes and dtypes of biases that a forward decides for good, are what they were.
    """
    modules = [m for m in root.modules() if is_quantized(m)]
    saved = [(m, dict(m.__dict__), dict(m._parameters)) for m in modules]
    biases = [(bias, bias.data) for _, _, parameters in saved if (bias := parameters.get("bias")) is not None]
    try:
        for m in modules:
            m.__dict__["support_avx512bf16_for_cpu"] = False
            _use_usual_layout(m)
        yield
    finally:
        for m, attributes, parameters in saved:
            m._parameters.update(parameters)
            m.__dict__.update({name: attributes[name] for name in _DECIDED_BY_FORWARD if name in attributes})
        for bias, data in biases:
            bias.data = data


_DECIDED_BY_FORWARD = ("compute_dtype", "compute_type_is_set", "quant_state", "support_avx512bf16_for_cpu")


def _use_usual_layout(linear: nn.Module) -> None:
    weight = linear._parameters["weight"]
    state = getattr(weight, "quant_state", None)
    if weight is None or state is None or not _is_cpu_layout(state):
        return
    data, usual = _undo_cpu_layout(weight.detach(), state)
    linear.__dict__["quant_state"] = usual
    linear._parameters["weight"] = type(weight)(data, quant_state=usual, bnb_quantized=True)


def example(root: nn.Module) -> Tensor | None:
    """An empty tensor of the dtype and on the device that the first `Linear4bit` below `root` was made from."""
    for m in root.modules():
        state = getattr(m._parameters.get("weight"), "quant_state", None) if is_quantized(m) else None
        if state is not None:
            return torch.empty(0, dtype=state.dtype, device=m._parameters["weight"].device)  # type: ignore[union-attr]
    return None


# ------------------------------------------------------------------------------------------------------------------- stacked experts
def stacked_note(model: nn.Module, module: nn.Module) -> str | None:
    """What a user of a 4-bit model should know about the stacked experts `module`; None when there is nothing to say."""
    size = _parametrized_bytes(module)
    if size:
        return f"its experts are 4-bit stacks of bitsandbytes, which are dequantized whole at each forward: {_gigabytes(size)}"
    dense = [p for p in module.parameters(recurse=False) if p.dim() >= 3 and p.is_floating_point()]
    if not dense or not any(map(is_quantized, model.modules())):
        return None
    size = sum(p.numel() * p.element_size() for p in dense)
    dtype = _name(dense[0].dtype)
    return f"loaded in 4 bit, but its experts are stacked parameters, which bitsandbytes leaves in {dtype}: {_gigabytes(size)}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _parametrized_bytes(module: nn.Module) -> int:
    """Dense bytes of the parameters that bitsandbytes dequantizes at every access, all of them during a forward."""
    library, found = sys.modules.get("bitsandbytes.nn.parametrize"), module._modules.get("parametrizations")
    if library is None or not isinstance(found, nn.ModuleDict):
        return 0
    states = [p.quant_state for chain in found.values() for p in chain if isinstance(p, library.Bnb4bitParametrization)]
    return sum(state.shape.numel() * state.dtype.itemsize for state in states)
