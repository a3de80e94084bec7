"""Axes: static rules and probes together on captured models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lbi_compile.errors import BatchCouplingError
from lbi_compile.passes.axes import (
    Verdict,
    batch_coupling,
    batch_couplings,
    classify,
    coupling_error,
    trace_axis,
)
from lbi_compile.passes.axis_calls import AxisState
from tests.programs import Apply, Program, program

# --- models -------------------------------------------------------------------------------------------------------


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


# --- one axis -------------------------------------------------------------------------------------------------------


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
    assert found.ask(0).why == (
        "3 input positions, but 5 output positions; the axis leaves aten.mul as dim 1 of [5, 3]"
    )
    square = program(Apply(lambda x: x.transpose(0, 1) * 2), torch.randn(3, 3))
    assert square.ask(0).why == "the axis leaves aten.mul as dim 1 of [3, 3]; unsure counts as mixed"
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
    ("expected", "function"),
    [
        ("causal", lambda x: x.cumsum(1)),
        ("anticausal", lambda x: x.flip(1).cumsum(1).flip(1)),
        ("mixed", lambda x: x.flip(1)),
        ("mixed", lambda x: x.roll(1, 1)),
        ("mixed", lambda x: x - x.mean(1, keepdim=True)),
    ],
)
def test_unsure_rules_are_measured(expected: str, function: Callable[[Tensor], Tensor]):
    found = program(Apply(function), torch.randn(3, 5, 4))
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


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_batch_norm_couples_samples_in_training_only(rank: int):
    kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    model, x = nn.Sequential(nn.Tanh(), kind(4), nn.ReLU()), torch.randn(5, 4, *[3] * (rank - (rank == 1)))
    found = program(model, x, dims=1)
    calls = []
    verdict = _coupling(found, fn=lambda x: calls.append(x) or found.run(x), example=x)
    assert (verdict.kind, verdict.how, calls) == ("mixed", "static", [])
    assert verdict.node is not None
    error = coupling_error(verdict.node)
    assert isinstance(error, BatchCouplingError)
    assert error.found.startswith("aten.batch_norm in 1 (")
    assert error.found.endswith(") mixes the samples of a batch")
    assert 'backward="chain", which needs no independent samples' in error.do
    assert "LayerNorm" in error.do
    assert _coupling(program(model, x, training=False)).kind == "position-wise"


class Balanced(nn.Module):
    """A router that divides the scores of its experts by their load in the batch, which has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        scores = x.softmax(-1)
        load = scores.detach().mean(0)
        return x * (scores / load)


class Limited(nn.Module):
    """A router whose experts take two samples each."""

    def forward(self, x: Tensor) -> Tensor:
        expert = F.one_hot(x.argmax(-1), x.shape[-1])
        room = expert.cumsum(0) <= 2
        return x * (expert * room).sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("router", "operator", "line"),
    [(Balanced, "mean", "load = scores.detach().mean(0)"), (Limited, "cumsum", "room = expert.cumsum(0) <= 2")],
)
def test_routers_over_the_batch_are_found_by_value_and_named(router: type[nn.Module], operator: str, line: str):
    torch.manual_seed(0)
    found = program(nn.Sequential(router()), torch.randn(6, 3), dims=1)
    verdict = _coupling(found, fn=found.run, example=found.x)
    assert (verdict.kind, verdict.how) == ("mixed", "probe")
    assert "but values of other positions change the result" in verdict.why
    assert verdict.node is not None
    error = coupling_error(verdict.node)
    assert error.found.startswith(f"aten.{operator} in 0 ({__file__}:")
    assert error.found.endswith(f", in forward: {line}) mixes the samples of a batch")
    assert 'backward="chain"' in error.do
    assert _coupling(found).how == "static"
    assert _coupling(found).kind == "mixed"


def _sorted_experts(x: Tensor) -> Tensor:
    """Tokens of all samples in one list, sorted by expert, worked on and put back."""
    tokens = x.flatten(0, 1)
    order = tokens.argmax(-1).argsort(stable=True)
    worked = (tokens[order] * 2).tanh()
    return torch.zeros_like(worked).index_copy(0, order, worked).view_as(x)


def _own_experts(x: Tensor) -> Tensor:
    """Every token fetches the matrix of its expert."""
    tokens = x.flatten(0, 1)
    table = torch.linspace(-1, 1, 4 * 4 * 4).view(4, 4, 4)
    return torch.bmm(table[tokens.argmax(-1)], tokens[:, :, None])[:, :, 0].view_as(x)


@pytest.mark.parametrize(("router", "how"), [(_sorted_experts, "probe"), (_own_experts, "static")])
def test_routers_of_single_tokens_keep_samples_and_positions_apart(router: Callable[[Tensor], Tensor], how: str):
    found = program(Apply(router), torch.randn(3, 5, 4), dims=2)
    verdict = _coupling(found, fn=found.run, example=found.x)
    assert (verdict.kind, verdict.how) == ("position-wise", how)
    assert found.ask(1, measure=True).kind == "position-wise"


def test_time_first_models_keep_samples_apart():
    """`[T, B, D]`."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
    found = program(layer, torch.randn(5, 3, 8))
    assert _coupling(found, axis_in=1, axis_out=1).kind == "position-wise"
    assert _coupling(found, axis_in=1, axis_out=1).how == "static"
    assert _coupling(found, axis_in=1, axis_out=0).kind == "mixed"
    assert _coupling(found).kind == "mixed"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("first", [True, False])
def test_recurrent_nets_keep_samples_apart_and_are_causal(kind: type[nn.RNNBase], first: bool):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = kind(4, 5, 2, batch_first=first)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[0].tanh()

    found = program(Net(), torch.randn(3, 6, 4))
    samples, times = (0, 1) if first else (1, 0)
    assert _coupling(found, axis_in=samples, axis_out=samples).how == "static"
    assert found.ask(samples).kind == "position-wise"
    assert found.ask(times, measure=True).kind == "causal"


def test_several_sinks_are_settled_in_one_pass():
    def forward(x: Tensor) -> tuple[Tensor, ...]:
        normed = F.batch_norm(x, None, None, training=True)
        return x * 2, x.cumsum(0), x.t().relu(), (x - x.mean(0)).flip(1), x.diagonal_scatter(x[0, :2], 0), normed

    found = program(Apply(forward), torch.randn(2, 3))
    sinks = dict.fromkeys(found.gm.graph.output_node().all_input_nodes, 0)
    transposed = list(sinks)[2]
    sinks[transposed] = 1
    asked = []

    def function(sink: fx.Node) -> Callable[[Tensor], Tensor]:
        asked.append(sink)
        return Program(found.gm, found.x, found.source, sink).run

    several = batch_couplings(
        found.nodes, source=found.source, sinks=sinks, shapes=found.shapes, function=function, example=found.x
    )
    kinds = [verdict.kind for verdict in several.values()]
    assert kinds == ["position-wise", "mixed", "position-wise", "mixed", "mixed", "mixed"]
    assert asked == [sink for sink in sinks if several[sink].how == "probe"] == [list(sinks)[i] for i in (1, 3, 4)]
    for sink, dim in sinks.items():
        extra: dict[str, Any] = {"fn": Program(found.gm, found.x, found.source, sink).run, "example": found.x}
        ends: dict[str, Any] = {"source": found.source, "sink": sink, "shapes": found.shapes}
        assert several[sink] == batch_coupling(found.nodes, axis_out=dim, **ends, **extra)
    unmeasured = batch_couplings(found.nodes, source=found.source, sinks=sinks, shapes=found.shapes)
    assert {verdict.how for verdict in unmeasured.values()} == {"static"}


def test_other_couplings_are_found_and_named():
    class Running(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.cumsum(0)

    found = program(Running(), torch.randn(5, 4))
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
