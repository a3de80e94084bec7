"""Writes into memory: what they leave true of other names, in small graphs; random ones are in ``test_axis_rules``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lbi_compile.passes.axes import trace_axis
from lbi_compile.passes.axis_calls import AxisState
from tests.axis_checks import calls, shapes_of, trace
from tests.programs import program
from tests.random_graphs import Builder

aten = torch.ops.aten


def test_a_write_through_a_view_spoils_what_follows():
    """``buffer[:, 0] = x`` in pieces: the buffer did not depend on x when it was made."""
    build = Builder((2, 3))
    buffer = build.call(aten.zeros.default, [3, 2, 3], dtype=torch.float64)
    view = build.call(aten.select.int, buffer, 1, 0)
    piece = build.call(aten.select.int, build.source, 0, 0)
    write = build.call(aten.copy_.default, view, piece)
    after = build.call(aten.mul.Tensor, buffer, 2.0)
    assert None not in (view, write, after)
    states = trace(build, 1)
    assert states[buffer].kind == "absent"  # type: ignore[index]
    assert states[after].kind == "mixed"  # type: ignore[index]
    assert states[after].node is write  # type: ignore[index]


def test_a_write_into_memory_of_one_name_changes_its_state():
    """``x += skip`` of a residual block, and a buffer that is filled before it is read by its own name."""
    build = Builder((2, 3))
    first = build.call(aten.mul.Tensor, build.constant(2, 3), 2.0)
    branch = build.call(aten.relu_.default, first)
    joined = build.call(aten.add_.Tensor, branch, build.source)
    buffer = build.call(aten.zeros.default, [2, 3], dtype=torch.float64)
    build.call(aten.copy_.default, buffer, build.source)
    after = build.call(aten.mul.Tensor, build.call(aten.t.default, buffer), 2.0)
    mixed = build.call(aten.zeros.default, [2, 3], dtype=torch.float64)
    build.call(aten.copy_.default, mixed, build.call(aten.cumsum.default, build.source, 0))
    other = build.call(aten.mul.Tensor, build.source, 2.0)
    assert None not in (joined, after, mixed, other)
    states = trace(build, 0)
    for name in (first, branch, joined, buffer, other):
        assert states[name] == AxisState("at", dim=0)  # type: ignore[index]
    assert states[after] == AxisState("at", dim=1)  # type: ignore[index]
    assert states[mixed].kind == "mixed"  # type: ignore[index]
    assert trace(build, 1)[mixed] == AxisState("at", dim=1)  # type: ignore[index]


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("early", [True, False])
def test_a_view_made_before_a_write_spoils_what_follows(early: bool, listed: bool):
    """A view that is not listed may have been made before it."""
    build = Builder((2, 3))
    value = build.call(aten.mul.Tensor, build.constant(2, 3), 2.0)
    view = build.call(aten.t.default, value) if early else None
    write = build.call(aten.add_.Tensor, value, build.source)
    again = build.call(aten.mul_.Tensor, value, 3.0)
    view = view or build.call(aten.t.default, value)
    after = build.call(aten.mul.Tensor, view, 2.0)
    assert None not in (value, view, write, again, after)
    nodes = [node for node in calls(build) if listed or node is not view]
    states = trace_axis(nodes, source=build.source, axis=0, shapes=shapes_of(build))
    if listed and not early:
        assert states[again] == AxisState("at", dim=0)  # type: ignore[index]
        assert states[after] == AxisState("at", dim=1)  # type: ignore[index]
    else:
        assert states[after].kind == "mixed"  # type: ignore[index]
        assert states[after].node is write  # type: ignore[index]


def test_a_write_inside_a_block_without_gradient_spoils_what_follows():
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            buffer = torch.zeros(3, 5)
            view = buffer.t()
            with torch.no_grad():
                view.copy_(x.flip(0).t())
            return buffer * 2 + x

    found = program(Net(), torch.randn(3, 5))
    verdict = found.ask(0)
    assert verdict.kind == "mixed"
    assert verdict.why.startswith("wrap_with_set_grad_enabled writes the axis into memory other nodes may read")
    assert found.ask(0, measure=True).kind == "mixed"


def test_a_write_to_two_arguments_spoils_what_follows():
    """The noise of a random ReLU is 1 where its argument is positive."""
    build = Builder((2, 3))
    value = build.call(aten.mul.Tensor, build.source, 2.0)
    noise = build.call(aten.zeros.default, [2, 3], dtype=torch.float64)
    write = build.call(aten.rrelu_with_noise_.default, value, noise, 0.1, 0.3, True)
    after = build.call(aten.mul.Tensor, noise, 2.0)
    assert None not in (value, noise, write, after)
    assert trace(build, 0)[after].kind == "mixed"  # type: ignore[index]


def test_an_operator_that_may_give_its_argument_back_makes_no_memory():
    build = Builder((2, 3))
    value = build.call(aten.mul.Tensor, build.constant(2, 3), 2.0)
    write = build.call(aten.add_.Tensor, build.call(aten.conj_physical.default, value), build.source)
    after = build.call(aten.mul.Tensor, value, 2.0)
    assert None not in (value, write, after)
    assert trace(build, 0)[after].kind == "mixed"  # type: ignore[index]


def test_a_write_that_keeps_the_axis_spoils_nothing():
    build = Builder((2, 3))
    double = build.call(aten.mul.Tensor, build.source, 2.0)
    build.call(aten.relu_.default, build.call(aten.view.default, double, [6]))
    build.call(aten.add_.Tensor, build.constant(4), 1)
    after = build.call(aten.mul.Tensor, double, 2.0)
    assert trace(build, 0)[after] == AxisState("at", dim=0)  # type: ignore[index]
