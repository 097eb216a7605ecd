"""The speed phase: every case of shapes x T x modes, each with all candidates in turns, within the time there is.

A sample is as many calls in a row as take 20 ms, over rotating sets of inputs; candidates take turns (A B C A B C ...), so that a device
that slows down slows all. What is begun is announced, so that a candidate which takes the process down is left out of the next one.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cases import CUBLAS, DEFAULT_SHAPES, DEFAULT_TOKENS, GROUPED_MM, MODES, OURS, Case, Record
from benchmarks.gpu.device import Device
from benchmarks.gpu.goals import derive, judge_memory
from benchmarks.gpu.peers import COMPILED, COMPILED_TOKENS, PEERS, Candidate, Inputs, Layer, LeftOut
from benchmarks.gpu.results import ResultFile
from benchmarks.gpu.supervise import Deadline, abandoned, announce
from benchmarks.harness import quantile
from benchmarks.shapes import SHAPES
from moe_ext import reference
from moe_ext.experts import ExpertSpec, ExpertWeights
from moe_ext.testing import compare, relative_error

GRAPH_TOKENS = 64  # up to here launches take a good part of the time, and a CUDA graph replays them in one
CHECKED_TOKENS = 64  # of each result, against the formula in float64


@dataclass
class Job:
    """What is measured, and how carefully."""

    shapes: Sequence[str] = DEFAULT_SHAPES
    tokens: Sequence[int] = DEFAULT_TOKENS
    modes: Sequence[str] = MODES
    peers: Sequence[str] = tuple(PEERS)
    samples: int = 15
    sample_ms: float = 20.0
    sets: int = 3
    layers: dict[str, Layer] = field(default_factory=dict, init=False)  # the last one

    def cases(self) -> list[Case]:
        found = []
        for name, tokens in itertools.product(self.shapes, self.tokens):
            for launch in ("eager", "graph") if tokens <= GRAPH_TOKENS else ("eager",):
                found += [Case(SHAPES[name], mode, tokens, launch) for mode in self.modes]
        return found

    def layer(self, name: str, device: Device) -> Layer:
        if name not in self.layers:
            self.layers.clear()  # before the next one is made
            self.layers[name] = Layer(SHAPES[name], device.kind)
        return self.layers[name]


class DeviceLost(Exception):
    """No kernel runs in this process any more."""


def run(job: Job, device: Device, file: ResultFile, deadline: Deadline) -> None:
    torch.manual_seed(0)
    given_up = abandoned()
    cases = job.cases()
    cases.sort(key=lambda case: case.key in file.data["results"])  # what is there already is measured again at last
    for case in cases:
        if deadline.left <= 0:
            file.leave_out(case.key, "no time was left")
            continue
        lost = {key.split(" | ")[1]: reason for key, reason in given_up.items() if key.startswith(case.key + " | ")}
        announce(f"{case.key} | preparation")
        try:
            record = measure_case(case, job, device, deadline, lost)
            file.record(key_of(case, record, file.data["results"]), record)
        except LeftOut as reason:
            file.leave_out(case.key, str(reason))
        except (RuntimeError, AssertionError) as error:  # of making inputs or weights: out of memory, for example
            file.leave_out(case.key, one_line(error))
            check_device(device, error)
        if device.kind == "cuda":
            torch.cuda.empty_cache()


def key_of(case: Case, record: Record, results: Record) -> str:
    """A record takes the place of an earlier one if it has all of its candidates; otherwise both are kept, named by what they have."""
    new, old = list(record["candidates"]), results.get(case.key, {}).get("candidates", {})
    if set(old) <= set(new):
        return case.key
    return f"{case.key} ({', '.join(name for name in new if name not in (OURS, CUBLAS)) or 'alone'})"


def check_device(device: Device, error: Exception) -> None:
    try:
        device.synchronize()
    except RuntimeError as after:
        raise DeviceLost(one_line(error)) from after


def one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}"


# ---- one case
def measure_case(case: Case, job: Job, device: Device, deadline: Deadline, lost: dict[str, str]) -> Record:
    for step in ("preparation", "taking turns"):
        if step in lost:
            raise LeftOut(f"{step}: {lost[step]}")
    layer = job.layer(case.shape.name, device)
    inputs = [Inputs.draw(layer, case.tokens, case.routing, number) for number in range(job.sets)]
    left_out, candidates = dict(lost), dict[str, Candidate]()
    with device.side_stream():  # also for graphs: a backward runs on the stream of its forward
        calls: dict[str, list[Callable[[], Any]]] = {}
        for name in job.peers:
            if name in left_out:
                continue
            announce(f"{case.key} | {name}")
            try:
                candidates[name], calls[name] = prepare(name, case, layer, inputs, device)
            except (LeftOut, ImportError) as reason:
                left_out[name] = f"not importable: {reason}" if isinstance(reason, ImportError) else str(reason)
            except Exception as error:  # whatever a peer raises is why it is not measured
                left_out[name] = one_line(error)
                check_device(device, error)
        announce(f"{case.key} | taking turns")
        times = sample(calls, job, device, deadline)
        measured = {name: summary(values) for name, values in times.items()}
        if case.mode == "forward-inference":
            check(case, layer, inputs[0], calls, measured)
        del calls
        hit = statistics.mean(i.index.unique().numel() for i in inputs)
        record = derive(case, hit, measured) | {"left_out": left_out}
        if case.mode == "backward-full" and case.launch == "eager":
            kept = {name: candidates[name] for name in measured if name not in (CUBLAS, GROUPED_MM)}
            record["memory"] = memory(inputs[0], kept, device)
            record["goals"] += judge_memory(case, record["memory"])
    return record


def prepare(name: str, case: Case, layer: Layer, inputs: list[Inputs], device: Device) -> tuple[Candidate, list[Callable[[], Any]]]:
    """The candidate and a call for each set of inputs, each called once: compiled, tuned, loaded."""
    if name == COMPILED and case.tokens not in COMPILED_TOKENS:
        raise LeftOut(f"compiled for T={' and '.join(map(str, COMPILED_TOKENS))} only: a compilation takes longer than all other figures")
    candidate = layer.once(name, PEERS[name])
    if case.launch == "graph" and not candidate.capturable:
        raise LeftOut("not captured in a CUDA graph")
    calls = [candidate.call(i, case.mode) for i in inputs]
    for call in calls:
        call()
    if case.launch == "graph":
        calls = [device.capture(call)[0] for call in calls]
    device.synchronize()
    return candidate, calls


def sample(calls: dict[str, list[Callable[[], Any]]], job: Job, device: Device, deadline: Deadline) -> dict[str, list[float]]:
    """Milliseconds of a call, `job.samples` times for each candidate."""
    rotating = {name: rotate(sets) for name, sets in calls.items()}
    once = {name: device.milliseconds(call, job.sets) for name, call in rotating.items()}
    counts = {name: max(1, min(5000, math.ceil(job.sample_ms / max(ms, 1e-3)))) for name, ms in once.items()}
    needed = job.samples * sum(max(counts[name] * ms, job.sample_ms) for name, ms in once.items()) / 1e3
    if needed > deadline.left:
        raise LeftOut(f"would take {needed:.1f} s, and {max(deadline.left, 0):.1f} s were left")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(job.samples):
        for name, call in rotating.items():
            times[name].append(device.milliseconds(call, counts[name]))
    return times


def rotate(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    turns: Iterator[Callable[[], Any]] = itertools.cycle(calls)
    return lambda: next(turns)()


def summary(values: list[float]) -> Record:
    return {"p20": quantile(values, 0.2), "p50": statistics.median(values), "p80": quantile(values, 0.8), "samples": len(values)}


# ---- that the same thing was timed, and what it keeps
def check(case: Case, layer: Layer, inputs: Inputs, calls: dict[str, list[Callable[[], Any]]], measured: dict[str, Record]) -> None:
    """Errors of the first rows against the formula in float64; ours is wrong beyond twice that of plain PyTorch."""
    n = min(case.tokens, CHECKED_TOKENS)
    weights = ExpertWeights(gate_up_proj=layer.gate_up_proj.detach(), down_proj=layer.down_proj.detach())
    x, index, w = inputs.x[:n], inputs.index[:n], inputs.weights[:n]
    plain = reference.grouped_experts(x, index, w, weights, ExpertSpec())
    truth = reference.grouped_experts(x.double(), index, w.double(), weights, ExpertSpec())
    for name, record in measured.items():
        result = layer.once(name, PEERS[name]).call(inputs, case.mode)() if case.launch == "graph" else calls[name][0]()
        if not isinstance(result, torch.Tensor) or result.shape != inputs.x.shape:
            continue  # products alone
        record["error"] = relative_error(result[:n], truth)
        report = compare(result[:n].to(plain.dtype), plain, truth)
        if name == OURS and not report.ok:
            record["wrong"] = str(report)


def memory(inputs: Inputs, candidates: dict[str, Candidate], device: Device) -> Record:
    """Bytes that a forward keeps for its backward, weights excluded, and the peak of both; trainable and frozen."""
    found: Record = {}
    for name, candidate in candidates.items():
        entry: Record = {}
        for label, mode in (("", "forward-training"), ("_frozen", "backward-frozen")):
            for parameter in candidate.parameters:
                parameter.requires_grad_(mode == "forward-training")
            entry[f"saved{label}"] = saved_bytes(candidate, inputs)
            entry[f"peak{label or '_full'}"] = device.peak_bytes(partial(step, candidate, inputs))
        found[name] = entry
    return found


def step(candidate: Candidate, inputs: Inputs) -> Any:
    x, weights = inputs.x.detach().requires_grad_(), inputs.weights.detach().requires_grad_()
    leaves = [x, weights, *(p for p in candidate.parameters if p.requires_grad)]
    return torch.autograd.grad(candidate.forward(inputs, x, weights), leaves, inputs.cotangent)


def saved_bytes(candidate: Candidate, inputs: Inputs) -> int:
    """Of every storage that autograd keeps, each once, but not those of the parameters."""
    x, weights = inputs.x.detach().requires_grad_(), inputs.weights.detach().requires_grad_()
    known = {p.untyped_storage().data_ptr() for p in candidate.parameters}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = candidate.forward(inputs, x, weights)
    del out
    return sum(size for pointer, size in kept.items() if pointer not in known)
