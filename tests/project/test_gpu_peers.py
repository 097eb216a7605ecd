"""Peers of the GPU benchmark that are not installed here: stand-ins with the arguments that their sources have, computing by the formula,
show that they are given the weights and the routing in the form they want.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu import peers as gpu_peers
from benchmarks.gpu.cases import LIGER, SCATTERMOE, SONICMOE
from benchmarks.shapes import SHAPES
from moe_ext import reference
from moe_ext.experts import ExpertSpec, ExpertWeights
from moe_ext.testing import assert_accurate


def stub(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    parts = name.split(".")
    for k in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:k]), types.ModuleType(".".join(parts[:k])))
    vars(sys.modules[name]).update(members)


def stub_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(x: Any, gate_up: Any, down: Any, index: Any, weights: Any) -> Any:
        assert index.dtype == torch.int32
        return reference.grouped_experts(x, index, weights, ExpertWeights(gate_up_proj=gate_up, down_proj=down), ExpertSpec())

    stub(monkeypatch, "liger_kernel.ops.fused_moe", LigerFusedMoEFunction=types.SimpleNamespace(apply=apply))


def stub_scattermoe(monkeypatch: pytest.MonkeyPatch) -> None:
    def flatten_sort_count(index: Any, num_experts: int) -> Any:
        experts, slots = torch.sort(index.flatten(), stable=True)
        return experts, slots, torch.bincount(index.flatten(), minlength=num_experts).cumsum(-1)

    def parallel_linear(x: Any, w: Any, k: int, experts: Any, slots: Any, offsets: Any, gates: Any = None, grouped_in: bool = False,
                        grouped_out: bool = False) -> Any:  # fmt: skip
        rows = x if grouped_in else x[slots // k]
        out = torch.einsum("ri,rio->ro", rows, w[experts])
        if grouped_out:
            return out
        assert gates.dtype == x.dtype
        return (gates.unsqueeze(1) @ torch.empty_like(out).index_copy(0, slots, out).view(*gates.shape, -1)).squeeze(1)

    stub(monkeypatch, "scattermoe", flatten_sort_count=flatten_sort_count, parallel_linear=parallel_linear)


def stub_sonicmoe(monkeypatch: pytest.MonkeyPatch) -> None:
    def moe_general_routing_inputs(x: Any, scores: Any, tokens: Any, experts: Any, w1: Any, b1: None, w2: Any, b2: None, E: int,
                                   stream_id: int, activation_type: str, is_inference_mode_enabled: bool = False) -> Any:  # fmt: skip
        assert tokens.dtype == experts.dtype == torch.int32 and scores.dtype == torch.float32 and activation_type == "swiglu"
        assert w1.shape[2] == w2.shape[2] == E and torch.equal(tokens, tokens.sort().values)
        pre = torch.einsum("rh,oha->rao", x[tokens], w1)[torch.arange(len(tokens)), experts]
        act = F.silu(pre[:, 0::2]) * pre[:, 1::2]
        y = torch.einsum("ri,hia->rah", act, w2)[torch.arange(len(tokens)), experts] * scores[:, None]
        return torch.zeros(x.shape).index_add(0, tokens, y.float()).to(x.dtype), None

    stub(monkeypatch, "sonicmoe.enums", ActivationType=types.SimpleNamespace(SWIGLU="swiglu"))
    stub(monkeypatch, "sonicmoe.functional", moe_general_routing_inputs=moe_general_routing_inputs)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))


@pytest.mark.parametrize(("peer", "install"), [(LIGER, stub_liger), (SCATTERMOE, stub_scattermoe), (SONICMOE, stub_sonicmoe)])
def test_peers_are_called_as_they_say(peer: str, install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    layer = gpu_peers.Layer(SHAPES["tiny"], "cpu")
    inputs = gpu_peers.Inputs.draw(layer, 33, "uniform", 0)
    weights = ExpertWeights(gate_up_proj=layer.gate_up_proj.detach(), down_proj=layer.down_proj.detach())
    args = (inputs.x, inputs.index, inputs.weights)
    plain = reference.grouped_experts(*args, weights, ExpertSpec())
    truth = reference.grouped_experts(inputs.x.double(), inputs.index, inputs.weights.double(), weights, ExpertSpec())
    candidate = gpu_peers.PEERS[peer](layer)
    assert_accurate(candidate.call(inputs, "forward-inference")(), plain, truth, peer)
    x, w, *grads = candidate.call(inputs, "backward-full")()
    assert x.shape == inputs.x.shape and w.shape == inputs.weights.shape and [g.shape for g in grads] == [p.shape for p in layer.weights]
