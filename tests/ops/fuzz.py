"""Calls the ops of one library with right and wrong arguments: `python tests/ops/fuzz.py LIBRARY COUNT SEED`.

An op either returns or raises; what it must never do is read or write outside of its tensors. That is seen by AddressSanitizer, under
which test_fuzz.py runs this program. Nothing of moe_ext is imported, so each call goes straight to the C++ op. Prints how many calls
returned and how many raised, for each op.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXTREMES = (-(2**31), -(2**31) + 1, -1000, -2, -1, 0, 1, 2, 1000, 2**30, 2**31 - 1)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swigluoai", "none")

Call = tuple[str, list[Any], dict[str, Any]]


class Fuzzer:
    """Draws calls. `wrong` is how often an argument is spoiled."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.wrong = 0.0

    # ---------------------------------------------------------------------------------------------------------------- arguments
    def size(self, most: int, least: int = 0) -> int:
        return self.random.randint(least, most)

    def bad(self, weight: float = 1.0) -> bool:
        return self.random.random() < self.wrong * weight

    def floats(self, *shape: int) -> Tensor:
        t = torch.randn(self.spoiled_shape(shape)).to(self.spoiled_dtype(self.dtype))
        return self.laid_out(t)

    def spoiled_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not self.bad(0.2):
            return shape
        changed = list(shape)
        where = self.size(len(shape) - 1) if shape else 0
        how = self.random.choice(("more", "less", "none", "drop", "add"))
        if how == "add" or not shape:
            changed.insert(where, self.size(3))
        elif how == "drop":
            del changed[where]
        else:
            changed[where] = {"more": changed[where] + 1 + self.size(8), "less": max(changed[where] - 1, 0), "none": 0}[how]
        return tuple(changed)

    def spoiled_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.random.choice((*FLOATS, torch.int64, torch.bool)) if self.bad(0.05) else dtype

    def laid_out(self, t: Tensor) -> Tensor:
        """The same values with other strides; every tensor ends where its memory ends, so that one step further is seen."""
        how = self.random.choice(("plain", "plain", "plain", "transposed", "wide", "expanded"))
        if how == "transposed" and t.dim() >= 2:
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if how == "wide" and t.dim() >= 1:
            wide = torch.zeros(*t.shape[:-1], t.shape[-1] + 3, dtype=t.dtype)
            wide[..., 3:] = t
            return wide[..., 3:]
        if how == "expanded" and t.dim() >= 1 and t.shape[0] > 0:
            return t[:1].expand(t.shape)
        return t

    def ints(self, values: list[int]) -> Tensor:
        if values and self.bad():
            for _ in range(self.size(2, 1)):
                values[self.size(len(values) - 1)] = self.random.choice((*EXTREMES, len(values), len(values) - 1, self.size(40)))
        if self.bad(0.2):
            values = values[:-1] if self.bad(0.5) else [*values, self.size(9)]
        t = torch.tensor(values, dtype=torch.int32)
        if self.bad(0.05):
            return self.random.choice((t.long(), t.float(), t.repeat_interleave(2)[::2], t.reshape(1, -1)))
        return t

    def routing(self) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets and maps of a random routing of S = T K slots to E experts, of which some are dropped."""
        slots: list[list[int]] = [[] for _ in range(self.E + 1)]
        for slot in range(self.S):
            slots[self.size(self.E) if self.random.random() < 0.3 else self.size(self.E - 1)].append(slot)
        offsets, rows = [0], []
        for mine in slots[: self.E]:
            rows += mine
            offsets.append(len(rows))
        to_row = [-1] * self.S
        for row, slot in enumerate(rows):
            to_row[slot] = row
        rows += [-1] * (self.S - len(rows))
        return self.ints(offsets), self.ints(rows), self.ints(to_row)

    def index(self) -> Tensor:
        ids = torch.randint(-1, self.E + 1, self.spoiled_shape((self.T, self.K)), dtype=self.random.choice((torch.int32, torch.int64)))
        if ids.numel() and self.bad():
            ids.view(-1)[self.size(ids.numel() - 1)] = self.random.choice(EXTREMES)
        return self.laid_out(ids.short() if self.bad(0.05) else ids)

    def routing_weights(self) -> Tensor:
        w = torch.rand(self.spoiled_shape((self.T, self.K)))
        return self.laid_out(w.to(self.random.choice(FLOATS)).to(self.spoiled_dtype(torch.float32) if self.bad(0.05) else w.dtype))

    def optional(self, make: Callable[[], Any]) -> Any:
        return make() if self.random.random() < 0.5 else None

    def listed(self, *shape: int) -> list[Tensor]:
        return [self.floats(*shape) for _ in range(self.E + (self.random.choice((-1, 1)) if self.bad(0.1) else 0))]

    def activation(self, gated: bool, stacked: bool = True) -> dict[str, Any]:
        name = self.random.choice(ACTIVATIONS if self.bad() else ACTIVATIONS[:5] + ("swigluoai",) * gated)
        options: dict[str, Any] = {"activation": name, "gated": gated, "alpha": 1.702 if (name == "swigluoai") != self.bad(0.05) else None}
        options["limit"] = self.random.choice((None, 1.0)) if gated else None
        if stacked:
            options["interleaved"] = gated and self.random.random() < 0.5
        return options

    def top_k(self) -> int:
        return self.random.choice((0, -1, 3, 2**31, 2**62)) if self.bad(0.3) else self.K

    # ---------------------------------------------------------------------------------------------------------------------- ops
    def draw(self) -> Call:
        self.T, self.K, self.E = self.size(9), self.size(4, 1), self.size(5, 1)
        self.S = self.T * self.K
        self.H, self.I = self.size(21), self.size(13)
        if self.random.random() < 0.1:  # more than one block of every loop
            self.T, self.H, self.I = self.size(80), self.size(300), self.size(150)
            self.S = self.T * self.K
        self.dtype = self.random.choice(FLOATS)
        self.wrong = self.random.choice((0.0, 0.1, 0.5))
        makers = [getattr(self, name) for name in dir(type(self)) if name.startswith("call_")]
        call: Call = self.random.choice(makers)()
        return call

    def call_sort(self) -> Call:
        return "sort_by_expert", [self.index(), self.random.choice((0, -1, 2**61, 2**62)) if self.bad(0.1) else self.E], {}

    def call_permute(self) -> Call:
        _, r2s, s2r = self.routing()
        return "permute", [self.floats(self.T, self.H), r2s, s2r, self.top_k()], {}

    def call_unpermute(self) -> Call:
        _, r2s, s2r = self.routing()
        return "unpermute", [self.floats(self.S, self.H), r2s, s2r, self.top_k(), self.optional(self.routing_weights)], {}

    def call_unpermute_backward(self) -> Call:
        return (
            "unpermute_backward",
            [self.floats(self.T, self.H), self.floats(self.S, self.H), self.routing()[1], self.routing_weights()],
            {},
        )

    def call_mm(self) -> Call:
        transposed = self.random.random() < 0.5
        shape = (self.H, self.I) if transposed else (self.I, self.H)
        args = [
            self.floats(self.S, self.H),
            self.floats(self.E, *shape),
            self.routing()[0],
            self.optional(lambda: self.floats(self.E, self.I)),
        ]
        return "grouped_mm", args, {"transposed": transposed}

    def call_mm_list(self) -> Call:
        transposed = self.random.random() < 0.5
        shape = (self.H, self.I) if transposed else (self.I, self.H)
        args = [self.floats(self.S, self.H), self.listed(*shape), self.routing()[0], self.optional(lambda: self.listed(self.I))]
        return "grouped_mm.list", args, {"transposed": transposed}

    def call_wgrad(self) -> Call:
        name = self.random.choice(("grouped_mm_wgrad", "grouped_mm_wgrad.list"))
        return name, [self.floats(self.S, self.H), self.floats(self.S, self.I), self.routing()[0]], {}

    def call_bias_grad(self) -> Call:
        return "grouped_bias_grad", [self.floats(self.S, self.H), self.routing()[0]], {}

    def call_activation(self) -> Call:
        gated = self.random.random() < 0.7
        return "gated_activation", [self.floats(self.S, self.I * (1 + gated))], self.activation(gated)

    def call_activation_backward(self) -> Call:
        gated = self.random.random() < 0.7
        args = [self.floats(self.S, self.I), self.floats(self.S, self.I * (1 + gated))]
        return "gated_activation_backward", args, self.activation(gated)

    def stacked(self, gated: bool, transposed: bool) -> list[Any]:
        up, down = (self.I * (1 + gated), self.H), (self.H, self.I)
        shapes = [s[::-1] if transposed else s for s in (up, down)]
        biases = [self.optional(lambda: self.floats(self.E, up[0])), self.optional(lambda: self.floats(self.E, self.H))]
        return [*(self.floats(self.E, *s) for s in shapes), *biases]

    def lists(self, gated: bool) -> list[Any]:
        gate = self.listed(self.I, self.H) if gated else []
        biases = [self.optional(lambda: self.listed(self.I)) if gated else None, self.optional(lambda: self.listed(self.I))]
        return [gate, self.listed(self.I, self.H), self.listed(self.H, self.I), *biases, self.optional(lambda: self.listed(self.H))]

    def call_forward(self) -> Call:
        gated, transposed = self.random.random() < 0.7, self.random.random() < 0.5
        name = self.random.choice(("grouped_forward", "_grouped_forward_train"))
        args = [self.floats(self.T, self.H), self.index(), self.routing_weights(), *self.stacked(gated, transposed)]
        return name, args, {**self.activation(gated), "transposed": transposed, "recompute": self.random.random() < 0.3}

    def call_forward_list(self) -> Call:
        gated = self.random.random() < 0.7
        name = self.random.choice(("grouped_forward.list", "_grouped_forward_train.list"))
        args = [self.floats(self.T, self.H), self.index(), self.routing_weights(), *self.lists(gated)]
        return name, args, {**self.activation(gated, stacked=False), "recompute": self.random.random() < 0.3}

    def saved(self, gated: bool) -> list[Any]:
        x, pre_act = self.floats(self.T, self.H), self.floats(self.S, self.I * (1 + gated))
        kept = self.random.choice(((x, pre_act), (x, None), (None, pre_act)))
        return [self.floats(self.T, self.H), kept[0], self.routing_weights(), kept[1], *self.routing()]

    def call_backward(self) -> Call:
        gated, transposed = self.random.random() < 0.7, self.random.random() < 0.5
        options = {**self.activation(gated), "transposed": transposed, "needs": self.size(255)}
        return "_grouped_backward", [*self.saved(gated), *self.stacked(gated, transposed)], options

    def call_backward_list(self) -> Call:
        gated = self.random.random() < 0.7
        options = {**self.activation(gated, stacked=False), "needs": self.size(255)}
        return "_grouped_backward.list", [*self.saved(gated), *self.lists(gated)], options


def overload(name: str) -> Any:
    packet, _, variant = name.partition(".")
    return getattr(getattr(torch.ops.moe if packet == "grouped_forward" else torch.ops.moe_ext, packet), variant or "default")


def main(library: str, count: int, seed: int) -> None:
    torch.set_num_threads(1)
    torch.ops.load_library(library)
    fuzzer = Fuzzer(seed)
    returned: Counter[str] = Counter()
    raised: Counter[str] = Counter()
    for number in range(count):
        name, args, options = fuzzer.draw()
        try:
            overload(name)(*args, **options)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            # torch's own words for a failed call say nothing: each refusal is a sentence of ours, or of torch's parser of arguments.
            assert "API call failed" not in str(error), (number, name, str(error))
            raised[name] += 1
        else:
            returned[name] += 1
    for name in sorted(returned | raised):
        print(f"{name} returned {returned[name]} raised {raised[name]}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
