"""Axes: probes against known functions, and the two ways together on captured models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim

from lbi_compile.errors import BatchCouplingError, OptionError
from lbi_compile.passes.axes import (
    Verdict,
    batch_coupling,
    classify,
    coupling_error,
    probe_axis,
    sees_later,
    trace_axis,
)
from lbi_compile.passes.axis_calls import AxisState
from lbi_compile.passes.costs import costs

# --- programs -----------------------------------------------------------------------------------------------------


@dataclass
class Program:
    """A captured model and the part of it from ``source`` to its first output."""

    gm: fx.GraphModule
    x: Tensor
    source: fx.Node

    def __post_init__(self) -> None:
        order = list(self.gm.graph.nodes)
        self.sink: fx.Node = self.gm.graph.output_node().all_input_nodes[0]
        self.nodes = [n for n in order[order.index(self.source) + 1 :] if n.op == "call_function"]
        self.shapes = costs(self.gm, example=(self.x,)).shape
        self._kept = _Keep(self.gm)
        with torch.no_grad():
            self._kept.run(self.x)
        self.values = dict(self._kept.env)

    def run(self, value: Tensor) -> Tensor:
        """The nodes on real numbers."""
        self._kept.env = {**self.values, self.source: value}
        for node in self.nodes:
            self._kept.env[node] = self._kept.run_node(node)
        return self._kept.env[self.sink]

    def ask(self, axis: int, *, measure: bool = False) -> Verdict:
        """``classify`` along an axis of input and output."""
        extra: dict[str, Any] = {"fn": self.run, "example": self.values[self.source]} if measure else {}
        ends: dict[str, Any] = {"source": self.source, "sink": self.sink, "shapes": self.shapes}
        return classify(self.nodes, axis_in=axis, axis_out=axis, **ends, **extra)


class _Keep(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)


def program(model: nn.Module, x: Tensor, *, training: bool = True, dims: int = 0, source: str = "") -> Program:
    """Capture; the first ``dims`` axes are dynamic; ``source`` is the node whose name starts so, else the input."""
    shapes = ({i: Dim.DYNAMIC for i in range(dims)},) if dims else None
    exported = torch.export.export(model.train(training), (x,), dynamic_shapes=shapes, strict=False)
    gm = exported.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    nodes = list(gm.graph.nodes)
    found = next(n for n in nodes if (n.name.startswith(source) if source else n.op == "placeholder"))
    return Program(gm, x, found)


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class FlatMLP(nn.Module):
    """A transformer's MLP the way GPT-2 runs it: on ``[B*T, D]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        y = self.norm(x).view(-1, d)
        return x + self.drop(self.down(F.gelu(self.up(y)))).view(b, t, d)


class GPT2(nn.Module):
    """A GPT-2 of two blocks that returns its logits."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes: dict[str, Any] = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 16}
        self.model = GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, bos_token_id=1, eos_token_id=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


# --- probe --------------------------------------------------------------------------------------------------------


def _kind(fn: Callable[[Tensor], Tensor], *shape: int, **options: Any) -> str:
    x = torch.randn(*(shape or (2, 5, 3)))
    return probe_axis(fn, x, **{"axis_in": 1, "axis_out": 1, **options}).kind


def _attention(x: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], **options)[:, 0]


def _backward_window(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :-1] + x


PROBES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "pointwise": ("position-wise", torch.tanh),
    "linear over features": ("position-wise", lambda x: x @ torch.ones(3, 4)),
    "dropout": ("position-wise", lambda x: F.dropout(x, 0.5)),
    "cumsum": ("causal", lambda x: x.cumsum(1)),
    "shift": ("causal", lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1]),
    "window": ("causal", _backward_window),
    "causal attention": ("causal", lambda x: _attention(x, is_causal=True)),
    "reversed cumsum": ("anticausal", lambda x: x.flip(1).cumsum(1).flip(1)),
    "full attention": ("mixed", _attention),
    "flip": ("mixed", lambda x: x.flip(1)),
    "roll": ("mixed", lambda x: x.roll(1, 1)),
    "mean": ("mixed", lambda x: x - x.mean(1, keepdim=True)),
    "nan": ("mixed", lambda x: x * float("nan")),
    "infinite": ("mixed", lambda x: x * float("inf")),
    "infinite sum": ("mixed", lambda x: (x * float("inf")).cumsum(1)),
    "constant": ("position-wise", lambda x: torch.ones_like(x)),
    "detached": ("position-wise", lambda x: x.detach() * 2),
    "unused": ("position-wise", lambda x: x.new_ones(x.shape, requires_grad=True) * 2),
    "writes to its input": ("position-wise", lambda x: x.relu_()),
}


@pytest.mark.parametrize("name", PROBES)
def test_probe_of_known_functions(name: str):
    expected, fn = PROBES[name]
    for size in (2, 5, 8):
        if (name, size) not in {("flip", 2), ("shift", 2)}:
            assert _kind(fn, 2, size, 3) == expected, size


def test_probe_with_different_axes():
    swap = lambda x: x.transpose(0, 1).cumsum(0)  # noqa: E731
    assert _kind(swap, 2, 5, 3, axis_in=1, axis_out=0) == "causal"
    assert _kind(swap, 2, 5, 3, axis_in=-2, axis_out=0) == "causal"
    assert _kind(swap, 2, 5, 3, axis_in=0, axis_out=1) == "position-wise"
    found = probe_axis(swap, torch.randn(2, 5, 3), axis_in=0, axis_out=0)
    assert found.kind == "mixed"
    assert found.why == "2 input positions, but 5 output positions"


def test_probe_finds_one_reader_among_many_positions():
    def reads_one(x: Tensor, reader: int, read: int) -> Tensor:
        return x + F.one_hot(torch.tensor(reader), 32)[:, None] * x[:, read : read + 1]

    for reader, read in [(5, 6), (6, 5), (30, 1), (17, 18), (3, 11), (7, 3)]:
        assert _kind(partial(reads_one, reader=reader, read=read), 1, 32, 2) != "position-wise"


def test_probe_finds_one_late_reader_in_a_causal_function():
    def reads_one(x: Tensor, reader: int, read: int) -> Tensor:
        return F.one_hot(torch.tensor(reader), 32)[:, None] * x[:, read : read + 1]

    assert _kind(lambda x: x.cumsum(1) + reads_one(x, 15, 17), 1, 32, 2) == "mixed"
    assert _kind(lambda x: x.flip(1).cumsum(1).flip(1) + reads_one(x, 17, 15), 1, 32, 2) == "mixed"


def test_probe_counts_a_nan_as_a_dependence():
    def broken(x: Tensor) -> Tensor:
        y = x * 2
        y.register_hook(lambda g: torch.where(g == 0, g, float("nan")))
        return y

    found = probe_axis(broken, torch.randn(2, 5), axis_in=1, axis_out=1)
    assert (found.kind, found.why) == ("mixed", "the gradient of position 2 is NaN")


def test_probe_asks_about_other_positions_each_time():
    asked = []

    def watched(x: Tensor) -> Tensor:
        y = x * 2
        y.register_hook(lambda g: asked.append(g.any(0).nonzero().flatten().tolist()))
        return y

    probe_axis(watched, torch.randn(2, 11), axis_in=1, axis_out=1, seeds=4)
    single = [positions[0] for positions in asked if len(positions) == 1]
    assert single[:3] == [5, 0, 10]
    assert len(set(single)) == len(single) == 4


def test_probe_of_a_single_position_or_too_few_seeds():
    assert _kind(torch.tanh, 2, 1, 3) == "mixed"
    with pytest.raises(OptionError, match="seeds=2"):
        probe_axis(torch.tanh, torch.randn(2, 3), axis_in=0, axis_out=0, seeds=2)


def test_probe_finds_paths_that_a_dead_unit_hides():
    gate = lambda x: x * torch.relu(x.sum(1, keepdim=True) + 1e-3)  # noqa: E731
    x = torch.randn(1, 6, 4)
    x -= x.mean(1, keepdim=True) + 1e-2  # the sum over positions is just below zero: the gate is shut
    assert not gate(x).any()
    assert probe_axis(gate, x, axis_in=1, axis_out=1).kind == "mixed"


def test_probe_draws_the_same_numbers_each_time_and_puts_the_state_back():
    drawn = []

    def noisy(x: Tensor) -> Tensor:
        drawn.append(torch.rand(3))
        return x * 2

    x = torch.randn(2, 5, requires_grad=True)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert probe_axis(noisy, x, axis_in=1, axis_out=1, seeds=5).kind == "position-wise"
    assert torch.equal(torch.get_rng_state(), state)
    assert len(drawn) == 5
    assert all(torch.equal(values, drawn[0]) for values in drawn)
    assert x.grad is None


def test_probe_puts_the_state_back_after_an_error():
    def broken(x: Tensor) -> Tensor:
        torch.rand(3)
        raise ZeroDivisionError

    x, state = torch.randn(2, 5), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        probe_axis(broken, x, axis_in=1, axis_out=1)
    assert torch.equal(torch.get_rng_state(), state)


# --- captured models ----------------------------------------------------------------------------------------------


def test_encoder_layer_mixes_positions_and_keeps_samples_apart():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    found = program(layer, torch.randn(3, 5, 8), dims=2)
    assert found.ask(0) == Verdict("position-wise", "static", "every operator on the way keeps the positions apart")
    unsure = found.ask(1)
    assert (unsure.kind, unsure.how) == ("mixed", "static")
    assert unsure.node is not None
    assert "scaled_dot_product_attention" in unsure.node.name
    measured = found.ask(1, measure=True)
    assert (measured.kind, measured.how, measured.node) == ("mixed", "probe", unsure.node)


def test_causal_attention_is_measured_to_be_causal():
    def causal(x: Tensor) -> Tensor:
        heads = x.view(3, 5, 2, 4).transpose(1, 2)
        return x + F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).reshape(3, 5, 8)

    found = program(Apply(causal), torch.randn(3, 5, 8))
    assert found.ask(0).kind == "position-wise"
    assert found.ask(1, measure=True).kind == "causal"
    assert found.ask(1).kind == "mixed"


def test_flattened_linear_layers_are_position_wise():
    found = program(FlatMLP(6), torch.randn(3, 5, 6), dims=2)
    states = trace_axis(found.nodes, source=found.source, axis=1, shapes=found.shapes)
    (flat,) = [state for node, state in states.items() if node.name == "linear"]
    assert flat == AxisState("at", dim=0, stride=1)
    states = trace_axis(found.nodes, source=found.source, axis=0, shapes=found.shapes)
    (flat,) = [state for node, state in states.items() if node.name == "linear"]
    assert flat == AxisState("at", dim=0, stride=5)
    for axis in (0, 1):
        assert found.ask(axis) == Verdict(
            "position-wise", "static", "every operator on the way keeps the positions apart"
        )
    assert found.ask(2).kind == "mixed"


def test_gpt2_keeps_samples_apart_and_is_causal():
    found = program(GPT2(), torch.randint(0, 11, (3, 5)), source="dropout")
    assert found.ask(0).how == "static"
    assert found.ask(0).kind == "position-wise"
    assert found.ask(1, measure=True).kind == "causal"


def test_gpt2_mlp_is_a_finish():
    found = program(GPT2(), torch.randint(0, 11, (3, 5)), source="dropout")
    adds = [n for n in found.nodes if n.name.startswith("add") and n.meta["nn_module_stack"].__len__() == 4]
    residual, end = adds[:2]  # after the attention and after the MLP of the first block
    between = found.nodes[found.nodes.index(residual) + 1 : found.nodes.index(end) + 1]
    verdict = classify(between, source=residual, sink=end, axis_in=1, axis_out=1, shapes=found.shapes)
    assert (verdict.kind, verdict.how) == ("position-wise", "static")


def test_an_axis_that_leaves_in_another_dim_is_not_position_wise():
    found = program(Apply(lambda x: x.transpose(0, 1) * 2), torch.randn(3, 5))
    assert found.ask(0).why == "the axis leaves aten.mul as dim 1 of [5, 3]; unsure counts as mixed"
    ends: dict[str, Any] = {"source": found.source, "sink": found.sink, "shapes": found.shapes}
    assert classify(found.nodes, axis_in=0, axis_out=1, **ends).kind == "position-wise"
    assert classify(found.nodes, axis_in=0, axis_out=-1, **ends).kind == "position-wise"


def test_a_repeated_axis_is_not_the_axis():
    found = program(Apply(lambda x: x.repeat(1, 2)), torch.randn(3, 5))
    assert found.ask(1).kind == "mixed"
    assert found.ask(0).kind == "position-wise"


def test_a_value_that_ignores_the_source():
    found = program(Apply(lambda x: torch.zeros_like(x) + 1), torch.randn(3, 5))
    assert found.ask(1) == Verdict("position-wise", "static", "does not depend on the source")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cumsum", "causal"), ("reversed cumsum", "anticausal"), ("flip", "mixed"), ("roll", "mixed"), ("mean", "mixed")],
)
def test_unsure_rules_are_measured(name: str, expected: str):
    found = program(Apply(PROBES[name][1]), torch.randn(3, 5, 4))
    assert found.ask(1, measure=True).kind == expected
    assert found.ask(1).kind == "mixed"
    assert found.ask(0) == found.ask(0, measure=True)


def test_what_no_rule_covers_is_measured():
    found = program(Apply(lambda x: torch.diagonal_scatter(x, x.diagonal(0, 1, 2) * 2, 0, 1, 2)), torch.randn(3, 5, 4))
    assert found.ask(0).kind == "mixed"
    assert found.ask(0, measure=True).how == "probe"
    assert found.ask(0, measure=True).kind == "position-wise"
    assert found.ask(0, measure=True).node is None


# --- samples ------------------------------------------------------------------------------------------------------


def _coupling(found: Program, **extra: Any) -> Verdict:
    return batch_coupling(found.nodes, source=found.source, sink=found.sink, shapes=found.shapes, **extra)


def _norm_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))


def test_batch_norm_couples_samples_in_training_only():
    found = program(_norm_net(), torch.randn(5, 4), dims=1)
    calls = []
    verdict = _coupling(found, fn=lambda x: calls.append(x) or found.run(x), example=torch.randn(5, 4))
    assert (verdict.kind, verdict.how, calls) == ("mixed", "static", [])
    assert verdict.node is not None
    error = coupling_error(verdict.node)
    assert isinstance(error, BatchCouplingError)
    assert error.found.startswith("aten.batch_norm in 1 (")
    assert error.found.endswith(") mixes the samples of a batch")
    assert 'backward="chain", which needs no independent samples' in error.do
    assert "LayerNorm" in error.do
    assert _coupling(program(_norm_net(), torch.randn(5, 4), training=False)).kind == "position-wise"


def test_other_couplings_are_found_and_named():
    found = program(Apply(lambda x: x - x.cumsum(0)), torch.randn(5, 4))
    verdict = _coupling(found, fn=found.run, example=found.x)
    assert (verdict.kind, verdict.how) == ("mixed", "probe")
    assert verdict.node is not None
    error = coupling_error(verdict.node)
    assert "aten.cumsum" in error.found
    assert __file__ in error.found
    assert "LayerNorm" not in error.do


def test_convolutions_keep_samples_apart():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))
    found = program(model, torch.randn(4, 3, 6, 6), dims=1)
    assert _coupling(found) == Verdict("position-wise", "static", "every operator on the way keeps the positions apart")


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x: x.cumsum(1), False),
        (lambda x: x * x.detach().sum(1, keepdim=True), True),
        (lambda x: x + (x.sum(-1).argmax(1) < 3)[:, None, None], True),
        (lambda x: F.dropout(x, 0.5), False),
        (lambda x: x.flip(1), True),
    ],
)
def test_dependence_without_gradient_is_seen_by_value(fn: Callable[[Tensor], Tensor], expected: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 4)
    state = torch.get_rng_state()
    assert sees_later(fn, x, axis_in=1, axis_out=1) is expected
    assert torch.equal(torch.get_rng_state(), state)
