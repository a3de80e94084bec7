"""Evaluator: parts of a graph run as the model runs them, and leave nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbi_compile.passes.evaluate import Evaluator
from tests.dags import Dag, Found, Step, find
from tests.models import BatchNormMLP, ResidualMLP


def evaluator(found: Found, *, seed: int = 0) -> Evaluator:
    return Evaluator(found.gm, found.live, found.capture.inputs.leaves, seed=seed)


@pytest.fixture
def residual() -> tuple[nn.Module, Tensor, Found]:
    model, x = ResidualMLP(6, width=8, depth=3, classes=3, dropout=0.3).double().train(), torch.randn(4, 6).double()
    return model, x, find(model, x)


def test_values_are_those_of_the_model_under_the_seed(residual: tuple[nn.Module, Tensor, Found]) -> None:
    model, x, found = residual
    values = evaluator(found, seed=5).values
    torch.manual_seed(5)
    assert torch.equal(values[found.live.sinks[0]], model(x))
    assert set(values) == {node for node in found.gm.graph.nodes if node.op != "output"}
    assert not values[found.live.sinks[0]].requires_grad


def test_a_part_is_a_function_of_its_source(residual: tuple[nn.Module, Tensor, Found]) -> None:
    """Against the same computation written by hand, dropout masks included."""
    model, _, found = residual
    assert isinstance(model, ResidualMLP)
    source, *_, sink = found.named("aten.add.Tensor")
    value = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    got = evaluator(found, seed=3).function(source, sink)(value)
    torch.manual_seed(3)
    wanted = model.blocks[2](model.blocks[1](value))
    assert torch.equal(got, wanted)
    gradients = (torch.autograd.grad(out.sum(), value)[0] for out in (got, wanted))
    assert torch.equal(*gradients)


def test_every_run_of_a_part_draws_the_same_numbers(residual: tuple[nn.Module, Tensor, Found]) -> None:
    _, _, found = residual
    source, sink = found.points[0].node, found.live.sinks[0]
    function, value = evaluator(found).function(source, sink), torch.ones(4, 8, dtype=torch.float64)
    assert torch.equal(function(value), function(value))
    assert not torch.equal(function(value), evaluator(found, seed=1).function(source, sink)(value))


def test_other_values_are_those_of_the_run() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return torch.tanh(self.b(h)) * h

    model, x = Skip(), torch.randn(3, 4)
    found = find(model, x)
    value = torch.randn(3, 4)
    got = evaluator(found).function(found.node("linear_1"), found.live.sinks[0])(value)
    assert torch.equal(got, torch.tanh(value) * model.a(x))


def test_buffers_random_state_gradients_and_inputs_are_left_alone() -> None:
    class Writes(BatchNormMLP):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(1.0)
            return super().forward(x)

    model, x = Writes(6, width=8, depth=2, classes=3, dropout=0.3).train(), torch.randn(4, 6)
    found = find(model, x)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kept = x.clone()
    random = torch.get_rng_state()
    runs = evaluator(found)
    source, sink = found.points[0].node, found.live.sinks[0]
    for _ in range(2):
        runs.function(source, sink)(runs.values[source]).sum()
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(x, kept)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
    torch.manual_seed(0)
    assert torch.equal(runs.values[sink], model(x.clone()))
    assert any(not torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())  # the model's own call


KINDS = ["linear", "write", "again", "linear", "index", "again", "alias", "zeros", "skip"]


@pytest.mark.parametrize("at", range(3))
def test_a_part_that_writes_to_memory_finds_it_as_it_was_at_the_source(at: int) -> None:
    """Rerun from a value of the run itself, every part gives what the run gave, as often as it is asked."""
    model = Dag([Step(kind, 1, 2) for kind in KINDS]).double()
    found = find(model, torch.randn(3, 4, dtype=torch.float64))
    runs = evaluator(found)
    source, sink = found.points[[0, len(found.points) // 2, -2][at]].node, found.live.sinks[0]
    function = runs.function(source, sink)
    value = runs.values[source].clone()
    wanted = runs.values[sink].clone()
    assert torch.equal(wanted, model(*found.capture.inputs.leaves))
    other = function(value + 1.0)
    assert not torch.equal(other, wanted)
    assert torch.equal(function(value), wanted)
    assert torch.equal(runs.values[sink], wanted)


def test_a_source_may_be_written_over_without_touching_the_argument() -> None:
    class Over(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x), inplace=True) + 1.0)

    model, x = Over(), torch.randn(3, 4)
    found = find(model, x)
    value = torch.randn(3, 4, requires_grad=True)
    kept = value.detach().clone()
    got = evaluator(found).function(found.node("linear"), found.live.sinks[0])(value)
    assert torch.equal(got, model.b(kept.relu() + 1.0))
    assert torch.equal(value, kept)
    (gradient,) = torch.autograd.grad(got.sum(), value)
    assert torch.equal(gradient != 0, kept > 0)


def test_constants_among_the_inputs() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor, scale: float, names: list[str], *, mask: Any = None) -> Tensor:
            return self.a(x) * scale * len(names)

    model = Scaled()
    inputs = (torch.randn(3, 4), 2.0, ["a", "b"])
    found = find(model, inputs)
    assert torch.equal(evaluator(found).values[found.live.sinks[0]], model(*inputs))
