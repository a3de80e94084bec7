"""Repeats: a key that tells one form of call from another, and passes that rely on it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbi_compile
from lbi_compile import analysis
from lbi_compile._torch import FakeTensorMode
from lbi_compile.capture import as_inputs, capture
from lbi_compile.passes import axes
from lbi_compile.passes.costs import costs
from lbi_compile.passes.liveness import liveness, memory_order
from lbi_compile.passes.repeats import form_of_call, form_of_nodes

aten = torch.ops.aten


def test_calls_of_one_form_have_one_key_and_others_do_not() -> None:
    with FakeTensorMode():
        a, b, turned = torch.empty(3, 4), torch.empty(3, 4), torch.empty(4, 3).t()
        single = torch.empty(1)
    key = form_of_call(aten.mul.Tensor, (a, 2), {})
    assert key is not None
    assert key == form_of_call(aten.mul.Tensor, (b, 2), {})
    others = [
        form_of_call(aten.add.Tensor, (a, 2), {}),
        form_of_call(aten.mul.Tensor, (a, 2.0), {}),
        form_of_call(aten.mul.Tensor, (a, True), {}),
        form_of_call(aten.mul.Tensor, (turned, 2), {}),
        form_of_call(aten.mul.Tensor, (a.double(), 2), {}),
        form_of_call(aten.mul.Tensor, (a[1:], 2), {}),
    ]
    assert key not in others
    assert len(set(others)) == len(others)
    assert form_of_call(aten.mul_.Tensor, (a, 2), {}) is None
    assert form_of_call(aten.mul.Tensor, (a, single), {}) is None
    assert form_of_call(max, (1, 2), {}) is None


class Repeated(nn.Module):
    """Equal layers, each of which writes into memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(x)
            h[:, 1:].mul_(2.0)
            x = x + h.tanh()
        return x


def test_repeated_layers_keep_memory_of_their_own() -> None:
    gm = capture(Repeated(), as_inputs(Repeated(), torch.randn(3, 6))).graph_module
    order = memory_order(gm)
    written = [[node.name for node in holders] for holders in order.writes.values()]
    assert written == [
        ["linear", "slice_1", "slice_2"],
        ["linear_1", "slice_3", "slice_4"],
        ["linear_2", "slice_5", "slice_6"],
        ["linear_3", "slice_7", "slice_8"],
    ]
    waits = {node.name: [before.name for before in writers] for node, writers in order.memory.items()}
    assert {name: some for name, some in waits.items() if "tanh" in name} == {
        "tanh": ["mul_"],
        "tanh_1": ["mul__1"],
        "tanh_2": ["mul__2"],
        "tanh_3": ["mul__3"],
    }


def test_repeated_layers_cost_alike() -> None:
    model, x = Repeated(), torch.randn(3, 6)
    found = capture(model, as_inputs(model, x))
    record = costs(found.graph_module, example=(x,))
    products = [flops for node, flops in record.flops.items() if "linear" in node.name]
    assert products == [2 * 3 * 6 * 6] * 4
    assert record.total_flops == sum(products)
    assert {record.shape[node] for node in record.shape if "tanh" in node.name} == {(3, 6)}


class Mixing(nn.Module):
    """Layers that mix positions, the last of them with weights of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.widths = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        nn.init.zeros_(self.mixers[3].weight)

    def forward(self, x: Tensor) -> Tensor:
        for mixer, width in zip(self.mixers, self.widths, strict=True):
            x = x + mixer(x.transpose(1, 2)).transpose(1, 2)
            x = x + width(x).tanh()
        return x


def test_operators_wired_alike_have_one_key() -> None:
    model = Mixing()
    found = capture(model, as_inputs(model, torch.randn(2, 6, 4)))
    live = liveness(found.graph_module)
    shapes = costs(found.graph_module, example=as_inputs(model, torch.randn(2, 6, 4)).leaves).shape
    sums = [node for node in live.live if node.target is aten.add.Tensor]
    order = list(live.live)
    steps = [(a, order[order.index(a) + 1 : order.index(b) + 1]) for a, b in itertools.pairwise(sums)]
    forms = [form_of_nodes(nodes, source=a, shapes=shapes) for a, nodes in steps]
    assert len(forms) == 7
    assert len(set(forms)) == 2
    assert forms[0] == forms[2] == forms[4] == forms[6]
    assert form_of_nodes(steps[0][1], source=sums[1], shapes=shapes) != forms[0]


def test_layers_wired_like_one_that_mixes_are_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []
    measure = axes.classify

    def classify(*args: Any, **kwargs: Any) -> Any:
        found = measure(*args, **kwargs)
        kinds.append(found.kind)
        return found

    monkeypatch.setattr(analysis.axes, "classify", classify)
    plan = lbi_compile.plan(Mixing(), torch.randn(2, 6, 4), regions=4, interface="token", readout="sum")
    assert [region.finish is None for region in plan.regions] == [False] * 4
    assert kinds.count("mixed") == 1
    assert kinds.count("position-wise") >= 4
