"""Liveness: kinds of nodes, what waits for what through memory, and what may run once only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lbi_compile.errors import NoFloatPathError
from lbi_compile.passes.liveness import is_mutating, is_random, liveness
from tests.dags import Found, find, run, split
from tests.models import BatchNormMLP


class Rotary(nn.Module):
    """Masked attention with rotary tables, position embedding, a weight computed from parameters, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(11, 8), nn.Embedding(16, 8)
        self.gain = nn.Parameter(torch.ones(8))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("inverse", 1.0 / 10.0 ** (torch.arange(4) / 4))

    def forward(self, tokens: Tensor) -> Tensor:
        at = torch.arange(tokens.shape[1])
        angle = at[:, None] * self.inverse
        cos, sin = angle.cos(), angle.sin()
        mask = (tokens != 0)[:, None, :] & torch.ones(at.shape[0], at.shape[0], dtype=torch.bool).tril()
        x = self.token(tokens) + self.position(at)
        a, b = x.chunk(2, -1)
        q = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        scores = (q @ q.transpose(1, 2)).masked_fill(~mask, -1e9)
        weight = self.frozen.weight * self.gain
        return F.linear(scores.softmax(-1) @ x, weight) @ self.token.weight.T


def apply(function: Callable[..., Any], **buffers: Tensor) -> nn.Module:
    """A module of one linear layer ``self.layer`` whose forward is ``function(self, x)``."""

    class Applied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            for name, value in buffers.items():
                self.register_buffer(name, value)

        def forward(self, x: Tensor) -> Any:
            return function(self, x)

    return Applied()


def found(function: Callable[..., Any], **buffers: Tensor) -> Found:
    return find(apply(function, **buffers), torch.randn(3, 4))


def one(found: Found, operator: str) -> fx.Node:
    (node,) = found.named(operator)
    return node


# --- kinds --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rotary() -> Found:
    return find(Rotary(), torch.randint(1, 11, (2, 6)))


def kinds(found: Found, operator: str) -> list[str]:
    return [found.live.kind[node] for node in found.named(operator)]


def test_masks_depend_on_inputs_alone(rotary: Found) -> None:
    for operator in ("aten.ne", "aten.__and__", "aten.bitwise_not"):
        assert kinds(rotary, operator) == ["input"]


def test_positions_and_rotary_tables_are_constants(rotary: Found) -> None:
    """Their length is a number read from the input, which makes no value depend on it."""
    for operator in ("aten.arange", "aten.cos", "aten.sin", "aten.tril", "aten.ones"):
        assert kinds(rotary, operator) == ["constant"]
    assert rotary.live.kind[rotary.node("inverse")] == "constant"
    assert set(kinds(rotary, "aten.sym_size")) == {"number"}


def test_a_position_embedding_depends_on_parameters_alone(rotary: Found) -> None:
    assert kinds(rotary, "aten.embedding") == ["live", "parameter-only"]


def test_a_computed_weight_is_parameter_only_even_where_one_factor_is_frozen(rotary: Found) -> None:
    (weight,) = [node for node in rotary.named("aten.mul") if rotary.node("gain") in node.all_input_nodes]
    assert rotary.live.kind[weight] == "parameter-only"
    assert rotary.live.kind[rotary.node("frozen_weight")] == "parameter"


def test_live_nodes_are_those_that_depend_on_both(rotary: Found) -> None:
    for operator in ("aten.softmax", "aten.cat", "aten.masked_fill", "aten.linear"):
        assert kinds(rotary, operator) == ["live"]
    assert [n for n, kind in rotary.live.kind.items() if kind == "live"] == list(rotary.live.live)
    assert rotary.live.sinks == (rotary.live.live[-1],)


def test_only_named_attributes_are_trainable(rotary: Found) -> None:
    fewer = liveness(rotary.gm, trainable=frozenset({"gain"}))
    assert {fewer.kind[node] for node in rotary.named("aten.embedding")} == {"input", "constant"}
    assert fewer.kind[rotary.node("token_weight")] == "constant"
    assert len(fewer.live) == 2  # the last two products, which read the gain


def test_record_is_frozen(rotary: Found) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        rotary.live.live = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x * 2.0,
        lambda self, x: self.layer(x).argmax(-1),
        lambda self, x: self.layer(x).detach(),
        lambda self, x: self.layer.weight * 2.0,
    ],
    ids=["no parameter", "integer", "detached", "no input"],
)
def test_no_float_path_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(NoFloatPathError, match="at least one float output computed from an input and a parameter"):
        found(function)


# --- memory -------------------------------------------------------------------------------------------------------


def halves(self: Any, x: Tensor) -> Tensor:
    memory = torch.zeros_like(x)
    memory[:, :2].copy_(self.layer(x)[:, :2])
    return memory * 2.0


def added(self: Any, x: Tensor) -> Tensor:
    memory = x.clone()
    memory[0].add_(self.layer(x)[0])
    return memory * 2.0


def put(self: Any, x: Tensor) -> Tensor:
    memory = torch.zeros_like(x)
    memory[:, torch.tensor([0, 3])] = self.layer(x)[:, :2]
    return memory * 2.0


@pytest.mark.parametrize(
    ("function", "writer"), [(halves, "copy_"), (added, "add_"), (put, "index_put_")], ids=["copy", "add", "put"]
)
def test_a_read_of_memory_waits_for_the_write_its_arguments_do_not_show(
    function: Callable[..., Any], writer: str
) -> None:
    """By arguments alone the product reads a constant or an input, so nothing would be live and the model refused."""
    record = found(function)
    read, write = record.named("aten.mul")[-1], one(record, writer)
    assert write not in read.all_input_nodes
    assert record.live.kind[read] == "live"
    assert write in record.live.waits[read]
    assert record.live.memory[read] == (write,)
    (memory,) = read.all_input_nodes
    assert record.live.kind[memory] != "live"
    assert memory in record.live.overwritten


def twice(self: Any, x: Tensor) -> Tensor:
    memory = self.layer(x) + 1.0
    before = memory * 3.0
    memory[:, 0].add_(before[:, 1])
    return memory * 2.0 + before


def test_a_write_waits_for_earlier_reads_of_what_it_overwrites() -> None:
    record = found(twice)
    write = one(record, "add_")
    assert record.named("aten.mul")[0] in record.live.memory[write]


def after(self: Any, x: Tensor) -> Tensor:
    memory = self.layer(x) + 1.0
    torch.relu_(memory)
    view = memory.view(-1)
    return view * 2.0


def test_a_value_made_after_the_write_needs_no_edge_through_memory() -> None:
    record = found(after)
    assert one(record, "relu_") in one(record, "aten.view").all_input_nodes
    assert one(record, "aten.mul") not in record.live.memory
    assert one(record, "aten.add.Tensor") in record.live.overwritten
    assert one(record, "relu_") not in record.live.overwritten


def counted(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.count.add_(self.layer(x).mean(0))
    return self.layer(x) + self.count


def test_writes_inside_a_no_grad_block_are_seen() -> None:
    """The exporter hides the block in an operator of its own."""
    record = found(counted, count=torch.zeros(4))
    block, count = one(record, "wrap_with_set_grad"), record.node("count")
    assert is_mutating(block)
    assert record.live.overwritten == {count}
    assert record.live.kind[block] == "live"
    assert len(block.users) == 1  # the later read takes what the block gives


def test_a_graph_without_writes_has_no_memory_edges(rotary: Found) -> None:
    assert dict(rotary.live.memory) == {}
    assert rotary.live.overwritten == frozenset()
    assert all(set(waits) == set(node.all_input_nodes) for node, waits in rotary.live.waits.items())


# --- once only ----------------------------------------------------------------------------------------------------


class DroppedWeight(nn.Module):
    """A weight with dropout, read by two layers: each must see the same mask."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = F.dropout(self.weight * 2.0, 0.5, self.training)
        return F.linear(torch.tanh(F.linear(self.layer(x), weight)), weight)


def test_a_random_value_of_parameters_is_not_cloned() -> None:
    training, evaluation = (find(DroppedWeight().train(mode), torch.randn(3, 4)) for mode in (True, False))
    assert kinds(training, "aten.dropout") == ["live"]
    assert kinds(evaluation, "aten.dropout") == ["parameter-only"]
    assert kinds(training, "aten.mul") == kinds(evaluation, "aten.mul") == ["parameter-only"]


def noise_first(self: Any, x: Tensor) -> Tensor:
    return self.layer(F.dropout(x, 0.5) + torch.rand(4))


def noise_later(self: Any, x: Tensor) -> Tensor:
    return self.layer(F.dropout(self.layer(x), 0.5) + F.dropout(x, 0.5) + torch.rand(4))


def test_a_random_draw_is_not_moved_ahead_of_a_live_one() -> None:
    """The prologue runs first, so a draw may go there only if no live draw comes before it."""
    early, late = found(noise_first), found(noise_later)
    assert kinds(early, "aten.dropout") == ["input"]
    assert kinds(early, "aten.rand") == ["constant"]
    assert kinds(late, "aten.dropout") == ["live", "live"]
    assert kinds(late, "aten.rand") == ["live"]


class Normed(nn.Module):
    """A spectral norm in training mode updates its buffers from the weight alone, at every use of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.normed = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(torch.tanh(self.normed(torch.tanh(self.first(x)))))


def test_what_writes_a_buffer_from_parameters_alone_is_not_cloned() -> None:
    record = find(Normed(), torch.randn(3, 4))
    blocks = record.named("wrap_with_set_grad")
    assert len(blocks) == 2
    assert {record.live.kind[block] for block in blocks} == {"live"}
    assert {record.live.kind[node] for node in record.named("aten.flatten")} == {"parameter-only"}


def written_weight(self: Any, x: Tensor) -> Tensor:
    weight = self.layer.weight * 1.0
    weight[0].copy_(x[0])
    return F.linear(torch.tanh(F.linear(x, weight)), weight)


def test_a_parameter_only_value_that_a_live_node_writes_to_is_not_cloned() -> None:
    record = found(written_weight)
    assert kinds(record, "aten.mul") == ["live"]


def built_weight(self: Any, x: Tensor) -> Tensor:
    weight = self.layer.weight * 1.0
    weight[0].mul_(2.0)
    return F.linear(torch.tanh(F.linear(self.layer(x), weight)), weight)


def test_a_weight_written_by_itself_alone_is_cloned_with_its_writes() -> None:
    model = apply(built_weight)
    record = find(model, torch.randn(3, 4))
    assert kinds(record, "aten.mul") == ["parameter-only", "parameter-only"]
    first, second = (node for node in record.named("aten.linear")[:2])
    tanh = one(record, "aten.tanh")
    program = split(record, first, [second, tanh])
    assert [piece.body.code.code.count("mul_.") for piece in program.regions] == [1, 0]
    assert program.head.code.code.count("mul_.") == 1
    (got,) = run(program, record.capture.inputs.leaves)
    assert torch.equal(got, model(*record.capture.inputs.leaves))


def test_running_statistics_are_updated_once() -> None:
    model = BatchNormMLP(4, width=4, depth=3, classes=2).train()
    record = find(model, torch.randn(5, 4))
    canvas, *inner = [point.node for point in record.points if "add" in point.node.name or point.position == 0]
    program = split(record, canvas, inner)
    expected = {name: b.clone() for name, b in model.named_buffers()}
    run(program, record.capture.inputs.leaves)
    after_program = {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(expected[name])
    model(*record.capture.inputs.leaves)
    for name, buffer in model.named_buffers():
        assert not torch.equal(buffer, expected[name])
        assert torch.equal(after_program[name], buffer)


# --- which operators draw -----------------------------------------------------------------------------------------


def attention(p: float) -> Callable[..., Any]:
    return lambda self, x: self.layer(F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=p)[0])


@pytest.mark.parametrize(
    ("function", "operator", "random"),
    [
        (lambda self, x: F.dropout(self.layer(x), 0.5, True), "dropout", True),
        (lambda self, x: F.dropout(self.layer(x), 0.5, False), "dropout", False),
        (lambda self, x: F.dropout(self.layer(x), 0.0, True), "dropout", False),
        (lambda self, x: F.alpha_dropout(self.layer(x), 0.5, True), "alpha_dropout", True),
        (lambda self, x: F.feature_alpha_dropout(self.layer(x), 0.5, True), "feature_alpha", True),
        (lambda self, x: F.dropout1d(self.layer(x), 0.5, True), "feature_dropout", True),
        (lambda self, x: F.rrelu(self.layer(x), training=True), "rrelu", True),
        (lambda self, x: self.layer(x) + torch.randn_like(x), "randn_like", True),
        (lambda self, x: self.layer(x) * torch.bernoulli(x.sigmoid()), "bernoulli", True),
        (lambda self, x: self.layer(x) + torch.empty_like(x).uniform_(), "uniform_", True),
        (lambda self, x: self.layer(x)[:, torch.randperm(4)], "randperm", True),
        (attention(0.5), "scaled_dot_product", True),
        (attention(0.0), "scaled_dot_product", False),
        (lambda self, x: torch.tanh(self.layer(x)), "tanh", False),
        (lambda self, x: torch.relu_(self.layer(x)), "relu_", False),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, bool)) else "",
)
def test_is_random_says_what_draws(function: Callable[..., Any], operator: str, random: bool) -> None:
    """Compared with the generator itself: it moves exactly where some operator is random."""
    torch.use_deterministic_algorithms(False)  # attention has no deterministic kernel with dropout
    model = apply(function)
    record = find(model, torch.randn(3, 4))
    assert is_random(one(record, operator)) is random
    assert any(map(is_random, record.gm.graph.nodes)) is random
    before = torch.get_rng_state()
    model(torch.ones(3, 4))
    assert torch.equal(before, torch.get_rng_state()) is not random


def test_random_numbers_inside_a_block_are_seen() -> None:
    def noisy(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            noise = torch.rand_like(x)
        return self.layer(x) + noise

    assert is_random(one(found(noisy), "wrap_with_set_grad"))
