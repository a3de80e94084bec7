"""Insert: with nothing put into the gaps the pieces are the captured model, bit for bit; and what they are made of."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from lbi_compile._torch import pytree
from lbi_compile.analysis import Analysis, analyse
from lbi_compile.errors import NoSeparatorError
from lbi_compile.options import Options
from lbi_compile.passes.insert import OutputName, Program
from tests import models
from tests.dags import Dag, Found, Step, find, recipes, run, split, trace

_PROPERTY: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}


@pytest.fixture(autouse=True)
def any_kernel() -> None:
    """Attention has no deterministic kernel with dropout; runs are compared bit for bit on one machine anyway."""
    torch.use_deterministic_algorithms(False)


def pieces_of(program: Program) -> dict[str, Any]:
    named = {"prologue": program.prologue, "stem": program.stem, "head": program.head}
    for k, region in enumerate(program.regions):
        named[f"body {k}"] = region.body
        if region.finish is not None:
            named[f"finish {k}"] = region.finish
    return named


def calls(code: fx.GraphModule, operator: str) -> int:
    return sum(operator in str(node.target) for node in code.graph.nodes if node.op == "call_function")


# --- equal to the model -------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"width": 8, "depth": 5, "dropout": 0.2}
MODELS = {
    "ResidualMLP": (lambda: models.ResidualMLP(6, classes=3, **SMALL), lambda: torch.randn(3, 6)),
    "PostNormMLP": (lambda: models.PostNormMLP(6, classes=3, **SMALL), lambda: torch.randn(3, 6)),
    "BatchNormMLP": (lambda: models.BatchNormMLP(6, classes=3, **SMALL), lambda: torch.randn(3, 6)),
    "PlainMLP": (lambda: models.PlainMLP(6, classes=3, **SMALL), lambda: torch.randn(3, 6)),
    "VisionTransformer": (
        lambda: models.VisionTransformer(heads=2, classes=3, **SMALL),
        lambda: torch.randn(3, 1, 8, 8),
    ),
    "CausalTransformer": (
        lambda: models.CausalTransformer(vocabulary=13, length=8, heads=2, **SMALL),
        lambda: torch.randint(0, 13, (3, 6)),
    ),
}


@functools.cache
def captured(name: str, training: bool) -> tuple[nn.Module, Tensor, Found]:
    make, example = MODELS[name]
    torch.manual_seed(0)
    model, x = make().double().train(training), example()
    x = x.double() if x.is_floating_point() else x
    return model, x, find(model, x)


def analysed(name: str, training: bool, regions: int) -> tuple[nn.Module, Tensor, Found, Analysis]:
    model, x, found = captured(name, training)
    interface = "token" if name == "CausalTransformer" else "zero"
    options = Options(regions, 2, interface, "auto", "auto", "auto", False, 0)
    return model, x, found, analyse(model, found.capture, options)


def _equal(name: str, training: bool, regions: int) -> None:
    model, x, found, analysis = analysed(name, training, regions)
    program = split(found, analysis.canvas, analysis.ends, analysis.finishes)
    assert len(program.regions) == regions
    wanted = trace(model, lambda: model(x))
    got = trace(model, lambda: run(program, [x]))
    assert got.differences(wanted) == []
    assert all(g is not None for g in got.gradients.values())


@pytest.mark.parametrize("regions", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_pieces_in_order_are_the_model(name: str, regions: int) -> None:
    """Outputs, gradients, dropout masks, the random state and the buffers afterwards."""
    _equal(name, True, regions)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("regions", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_pieces_in_order_are_the_model_in_both_modes(name: str, regions: int, training: bool) -> None:
    _equal(name, training, regions)


def _random_cut(steps: list[Step], tap: bool, data: st.DataObject) -> None:
    model = Dag(steps, tap=tap).double().train()
    x = torch.randn(3, 4, dtype=torch.float64)
    found = find(model, x)
    points = [point.node for point in found.points]
    if len(points) < 2:
        return
    count = data.draw(st.integers(2, min(len(points), 5)), "cuts")
    chosen = sorted(data.draw(st.sets(st.integers(0, len(points) - 1), min_size=count, max_size=count), "which"))
    canvas, *ends = (points[i] for i in chosen)
    finishes: list[fx.Node | None] = [None] * len(ends)
    for k, (a, b) in enumerate(itertools.pairwise(chosen)):
        inside = data.draw(st.sampled_from([None, *range(a, b + 1)]), f"finish {k}")
        finishes[k] = None if inside is None else points[inside]
    program = split(found, canvas, ends, finishes)
    got, wanted = trace(model, lambda: run(program, [x])), trace(model, lambda: model(x))
    assert got.differences(wanted, reordered=True) == []


@settings(max_examples=12, **_PROPERTY)
@given(recipes(), st.booleans(), st.data())
def test_pieces_of_random_graphs_are_the_model(steps: list[Step], tap: bool, data: st.DataObject) -> None:
    _random_cut(steps, tap, data)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=500, **_PROPERTY)
@given(recipes(longest=16), st.booleans(), st.data())
def test_pieces_of_many_random_graphs_are_the_model(steps: list[Step], tap: bool, data: st.DataObject) -> None:
    _random_cut(steps, tap, data)


def test_the_comparison_sees_a_gap_that_is_not_empty() -> None:
    model, x, found, analysis = analysed("ResidualMLP", True, 2)
    program = split(found, analysis.canvas, analysis.ends)
    wanted = trace(model, lambda: model(x))
    detached = trace(model, lambda: run(program, [x], gap=lambda name, v: v.detach() if name == "entry 1" else v))
    assert {what.split()[0] for what in detached.differences(wanted)} == {"gradient"}
    nudged = trace(model, lambda: run(program, [x], gap=lambda _, v: v + 1e-12))
    assert "output 0" in nudged.differences(wanted, reordered=True)
    scaled = trace(model, lambda: run(program, [x]))
    scaled.gradients["stem.weight"] *= 1 + 1e-12
    assert scaled.differences(wanted, reordered=True) == ["gradient of stem.weight"]


# --- what the pieces are made of ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer() -> tuple[nn.Module, Found, Analysis, Program]:
    torch.use_deterministic_algorithms(False)
    model, _, found, analysis = analysed("CausalTransformer", True, 3)
    return model, found, analysis, split(found, analysis.canvas, analysis.ends, analysis.finishes)


Cut = tuple[nn.Module, Found, Analysis, Program]


def test_every_node_is_in_one_piece(transformer: Cut) -> None:
    _, found, _, program = transformer
    placed = [node for nodes in program.pieces.values() for node in nodes]
    assert len(placed) == len(set(placed))
    kinds = found.live.kind
    calls = [n for n in found.gm.graph.nodes if n.op == "call_function"]
    left = [n for n in calls if n not in placed and kinds[n] != "parameter-only"]
    assert all("assert" in str(n.target) or kinds[n] == "number" for n in left)


def test_pieces_pass_lint_and_keep_meta(transformer: Cut) -> None:
    _, found, _, program = transformer
    for piece in pieces_of(program).values():
        piece.code.graph.lint()
        for node in piece.code.graph.nodes:
            if node.op == "call_function":
                assert node.meta.keys() == found.node(node.name).meta.keys()
                assert node.meta.get("nn_module_stack") == found.node(node.name).meta.get("nn_module_stack")


def test_the_captured_graph_is_left_alone(transformer: Cut) -> None:
    _, found, analysis, _ = transformer
    before = found.gm.code
    nodes = list(found.gm.graph.nodes)
    split(found, analysis.canvas, analysis.ends, analysis.finishes)
    assert found.gm.code == before
    assert list(found.gm.graph.nodes) == nodes
    assert all(node.graph is found.gm.graph for node in nodes)


def test_a_program_prints_its_pieces_by_name(transformer: Cut) -> None:
    program = transformer[-1]
    text = str(program)
    titles = [line for line in text.splitlines() if line.startswith("# ")]
    regions = [f"# region {k} {part}" for k in range(3) for part in ("body", "finish")]
    assert titles == ["# prologue", "# stem", *regions, "# head"]
    assert text.count("scaled_dot_product_attention.default(") == 5
    assert text.count("def forward(self") == len(titles)


def test_attributes_are_read_at_every_call(transformer: Cut) -> None:
    """Pieces hold no parameters: one that is replaced on its module is the one that runs."""
    model, _, _, program = transformer
    assert not [p for piece in pieces_of(program).values() for p in piece.code.parameters()]
    owners = {(owner, name) for piece in pieces_of(program).values() for owner, name in piece.attributes}
    got = {id(getattr(owner, name)) for owner, name in owners}
    assert {id(p) for p in model.parameters()} <= got


class Tied(nn.Module):
    """The weight of every layer is computed from one parameter; positions are embedded in each layer anew."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.base, self.scale = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.base * self.scale).softmax(-1)
        x = self.stem(x)
        for _ in range(3):
            x = torch.tanh(F.linear(x, weight))
        return x


def test_parameter_only_nodes_are_cloned_where_they_are_read() -> None:
    model = Tied().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    found = find(model, x)
    first, *ends = (node for node in found.live.live if "linear" in node.name)
    program = split(found, first, ends)
    counts = {name: calls(piece.code, "softmax") for name, piece in pieces_of(program).items()}
    assert counts == {"prologue": 0, "stem": 0, "body 0": 1, "body 1": 1, "body 2": 1, "head": 0}
    assert not any("softmax" in name for piece in pieces_of(program).values() for name in piece.inputs)
    wanted, got = trace(model, lambda: model(x)), trace(model, lambda: run(program, [x]))
    assert torch.equal(wanted.outputs[0], got.outputs[0])
    for name, gradient in wanted.gradients.items():  # summed in another order
        torch.testing.assert_close(got.gradients[name], gradient, rtol=1e-14, atol=1e-15)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.steps.add_(1)
        keep = (mask > 0).to(x.dtype)
        x = torch.tanh(self.a(x) * keep)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        x = torch.tanh(self.b(x) * keep)
        return self.c(x) * keep


def test_prologue_values_and_buffers_are_computed_once() -> None:
    model = Masked()
    leaves = (torch.randn(3, 4), torch.tensor([[1.0], [-1.0], [1.0]]))
    found = find(model, leaves)
    points = [point.node for point in found.points]
    program = split(found, points[0], [points[-2], points[-1]])
    counts = {name: (calls(p.code, "gt"), calls(p.code, "add_")) for name, p in pieces_of(program).items()}
    assert counts.pop("prologue") == (1, 1)
    assert {count for count, _ in counts.values()} == {0}
    got = trace(model, lambda: run(program, leaves))
    assert got.differences(trace(model, lambda: model(*leaves))) == []
    assert got.buffers["steps"] == 1
    assert bool(got.buffers["mean"].any())


class UnreadNoise(nn.Module):
    """A draw, and a buffer written in a block, whose results nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        F.dropout(x, 0.5)
        with torch.no_grad():
            self.mean.add_(x.mean(0))
        return self.b(F.dropout(x, 0.5))


def test_draws_and_writes_that_nobody_reads_still_happen() -> None:
    model, x = UnreadNoise(), torch.randn(3, 4)
    found = find(model, x)
    assert len(found.named("dropout")) == 2
    points = [point.node for point in found.points]
    program = split(found, points[0], [points[-1]])
    got = trace(model, lambda: run(program, [x]))
    assert got.differences(trace(model, lambda: model(x))) == []
    assert bool(got.buffers["mean"].any())


class Blocks(nn.Module):
    """Blocks under ``no_grad`` and autocast, one inside the other, on tensors of dynamic sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        with torch.no_grad():
            self.mean.add_(x.mean(0))
            with torch.autocast("cpu", enabled=False):
                scale = self.b(x.to(torch.float32)).exp()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = F.dropout(self.b(x * scale), 0.5).float()
        return self.c(x)


def test_blocks_run_as_blocks_and_can_be_compiled() -> None:
    """The operators the exporter makes of them are refused by Dynamo where dynamic sizes enter."""
    model, x = Blocks(), torch.randn(3, 4)
    found = find(model, x)
    assert len(found.named("wrap_with")) == 2
    points = [point.node for point in found.points]
    program = split(found, points[0], [points[1], points[-1]])
    assert trace(model, lambda: run(program, [x])).differences(trace(model, lambda: model(x))) == []
    codes = [m for p in pieces_of(program).values() for m in p.code.modules() if isinstance(m, fx.GraphModule)]
    assert len(codes) == len(pieces_of(program)) + 3
    assert not any(isinstance(n.target, torch._ops.HigherOrderOperator) for code in codes for n in code.graph.nodes)
    compiled = torch.compile(lambda x: run(program, [x])[0], backend="aot_eager", dynamic=True, fullgraph=True)
    for size in (3, 5):
        x = torch.randn(size, 4)
        torch.manual_seed(1)
        wanted = model(x)
        torch.manual_seed(1)
        got = compiled(x)
        assert torch.equal(got, wanted)
        assert got.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):  # dtypes of the capture are not asserted, in no block either
        outputs = []
        for call in (lambda: model(x), lambda: run(program, [x])[0]):
            torch.manual_seed(1)
            outputs.append(call())
    assert torch.equal(*outputs)


# --- outputs ------------------------------------------------------------------------------------------------------


class Outputs(nn.Module):
    """Returns taps, an input, a parameter, a constant, a computed weight, the canvas and the end of a region."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        canvas = self.a(x)
        hidden = torch.tanh(canvas)
        double = hidden * 2.0
        middle = self.b(hidden)
        end = self.c(torch.sin(middle))
        return {
            "x": x, "bias": self.a.bias, "three": 3, "none": None, "weight": self.b.weight * 2.0,
            "canvas": canvas, "hidden": hidden, "middle": middle, "end": end, "again": [end, double],
        }  # fmt: skip


def test_outputs_of_every_kind() -> None:
    model, x = Outputs(), torch.randn(3, 4)
    found = find(model, x)
    program = split(found, found.node("linear"), [found.node("linear_1"), found.node("linear_2")])
    assert trace(model, lambda: run(program, [x])).differences(trace(model, lambda: model(x))) == []
    rebuilt = pytree.tree_unflatten(run(program, [x]), program.out_spec)
    assert list(rebuilt) == list(model(x))
    assert rebuilt["x"] is x
    assert rebuilt["bias"] is model.a.bias
    assert (rebuilt["three"], rebuilt["none"]) == (3, None)


def test_an_output_that_ends_the_last_region_is_what_the_head_reads() -> None:
    """Under the summed readout the head reads another value than the region leaves."""
    model, x = Outputs(), torch.randn(3, 4)
    found = find(model, x)
    program = split(found, found.points[0].node, [found.node("linear_1"), found.node("linear_2")])
    out = pytree.tree_unflatten(run(program, [x], gap=lambda n, v: v + 1 if n == "head" else v), program.out_spec)
    assert torch.equal(out["end"], model(x)["end"] + 1)
    assert torch.equal(out["middle"], model(x)["middle"])
    assert program.outputs.count(OutputName("head")) == 2


# --- cuts that are none -------------------------------------------------------------------------------------------


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x))
        return self.c(torch.tanh(self.b(h)) + h)


def test_a_value_past_a_cut_is_refused() -> None:
    found = find(Skip(), torch.randn(3, 4))
    with pytest.raises(NoSeparatorError, match="linear_1 crosses boundary 1 beside tanh"):
        split(found, found.node("linear"), [found.node("tanh"), found.node("add")])


def test_the_canvas_may_be_read_past_a_cut() -> None:
    model, x = Skip(), torch.randn(3, 4)
    found = find(model, x)
    program = split(found, found.node("linear_1"), [found.node("tanh"), found.node("add")])
    assert torch.equal(run(program, [x])[0], model(x))


def test_a_value_past_the_start_of_a_finish_is_refused() -> None:
    found = find(Skip(), torch.randn(3, 4))
    with pytest.raises(NoSeparatorError, match="region 0 finish reads linear_1 past its boundary"):
        split(found, found.node("linear"), [found.node("add")], [found.node("linear_2")])


class Overwritten(Skip):
    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x))
        return self.c(torch.relu_(h))


def test_a_lane_that_is_written_over_is_refused() -> None:
    found = find(Overwritten(), torch.randn(3, 4))
    with pytest.raises(NoSeparatorError, match="the memory of linear_1 is used across a boundary"):
        split(found, found.node("linear"), [found.node("linear_1"), found.node("relu_")])


class Hidden(Skip):
    def forward(self, x: Tensor) -> Tensor:
        memory = torch.zeros_like(x)
        memory[:, :2].copy_(self.a(x)[:, :2])
        h = torch.tanh(self.b(memory))
        return self.c(h) * memory


def test_memory_past_a_cut_is_refused() -> None:
    """The last product reads a constant by its arguments; what it finds there was written by a live node."""
    found = find(Hidden(), torch.randn(3, 4))
    with pytest.raises(NoSeparatorError, match="the memory of copy_ is used across a boundary"):
        split(found, found.node("linear"), [found.node("linear_1"), found.node("tanh")])


class Dead(Skip):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        torch.tanh(h)
        return self.b(h)


def test_a_region_may_end_in_a_value_that_nobody_reads() -> None:
    model, x = Dead(), torch.randn(3, 4)
    found = find(model, x)
    program = split(found, found.node("linear"), [found.node("tanh")])
    gaps: dict[str, Tensor] = {}
    (out,) = run(program, [x], gap=lambda name, value: gaps.setdefault(name, value))
    assert torch.equal(out, model(x))
    assert torch.equal(gaps["head"], torch.tanh(model.a(x)))


def test_one_region_needs_no_separator() -> None:
    model, x = Hidden(), torch.randn(3, 4)
    found = find(model, x)
    program = split(found, found.node("linear"), [found.node("tanh")])
    assert trace(model, lambda: run(program, [x])).differences(trace(model, lambda: model(x))) == []
