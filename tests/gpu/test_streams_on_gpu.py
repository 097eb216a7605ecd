"""When and where kernels run: the same bits every time, on any stream, thread and device, in a CUDA graph, without waiting on the host."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_ext import ops
from tests.gpu.on_gpu import QWEN3, ROUTINGS, UNEVEN, Device, Layer, Size, equal, needs_cuda, needs_gpu, rows, tokens

pytestmark = needs_gpu

SIZES = pytest.mark.parametrize("size", [QWEN3, UNEVEN], ids=["qwen3", "uneven"])
TOKENS = pytest.mark.parametrize("T", tokens(1, 64, 1024))


@SIZES
@TOKENS
@pytest.mark.parametrize("routing", ["uniform", "dropped"])
def test_five_runs_agree_bit_for_bit_without_a_host_synchronisation(size: Size, routing: str, T: int, device: Device) -> None:
    layer = Layer.draw(size, T, routing, torch.bfloat16)
    layer.results()  # loads the kernels
    with device.no_host_synchronisation():
        runs = [layer.results() for _ in range(5)]
    assert all(equal(runs[0], run) for run in runs[1:])


def listed(layer: Layer) -> list[Tensor]:
    """The list overload on views of the stacks: the same sums, so the same bits."""
    x, w = (t.detach().requires_grad_() for t in (layer.x, layer.w))
    (gate, up), down = ([list(half) for half in layer.gate_up.chunk(2, 1)], list(layer.down))
    out = ops.grouped_forward_list(x, layer.index, w, gate, up, down)
    return [out.detach(), *torch.autograd.grad(out, [x, w], layer.cotangent)]


@TOKENS
@pytest.mark.parametrize("overload", ["stacked", "frozen", "list"])
def test_a_graph_replays_with_another_routing_and_other_inputs(overload: str, T: int, device: Device) -> None:
    """Forward and backward in one graph. Routings change how many rows each expert has, from all in one to none in many."""
    layer = replace(Layer.draw(QWEN3, T, "uniform", torch.bfloat16), frozen=overload != "stacked")
    compute = listed if overload == "list" else Layer.results
    replay, results = device.capture(lambda: compute(layer))
    for seed, routing in enumerate((*ROUTINGS, "uniform"), start=5):
        x, index, w = rows(QWEN3, T, routing, torch.bfloat16, seed)
        for old, new in ((layer.x, x), (layer.index, index), (layer.w, w), (layer.cotangent, torch.randn_like(x))):
            old.copy_(new)
        replay()
        assert equal(results, compute(layer)), routing


@needs_cuda
def test_streams_at_the_same_time() -> None:
    """Each stream has its own inputs, and the kernels of one overlap those of the other."""
    layers = [Layer.draw(QWEN3, T, "zipf", torch.bfloat16, seed) for seed, T in enumerate((300, 170))]
    expected = [layer.results() for layer in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(8):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[number].append(layers[number].results())
    torch.cuda.synchronize()
    for runs, results in zip(found, expected, strict=True):
        assert all(equal(run, results) for run in runs)


def test_threads_at_the_same_time(device: Device) -> None:
    layers = [Layer.draw(QWEN3, T, "zipf", torch.bfloat16, seed) for seed, T in enumerate(tokens(300, 170) * 2)]
    expected = [layer.results() for layer in layers]
    device.synchronize()
    found: list[list[list[Tensor]]] = [[] for _ in layers]

    def work(number: int) -> None:
        with device.side_stream():
            found[number] += [layers[number].results() for _ in range(5)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    device.synchronize()
    for runs, results in zip(found, expected, strict=True):
        assert len(runs) == 5 and all(equal(run, results) for run in runs)


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one() -> None:
    here = Layer.draw(QWEN3, 100, "uniform", torch.bfloat16)
    there = replace(here, **{name: getattr(here, name).to("cuda:1") for name in ("x", "index", "w", "gate_up", "down", "cotangent")})
    assert torch.cuda.current_device() == 0
    results = there.results()
    assert all(t.device.index == 1 for t in results)
    assert equal(here.results(), [t.to("cuda:0") for t in results])
