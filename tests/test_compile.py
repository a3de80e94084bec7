"""torch.compile of a bounded model: no graph breaks, no recompiles, the scan inside Inductor, exact everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import lbi_compile
from lbi_compile import BoundedModule
from lbi_compile.backend import last_record
from lbi_compile.verify import relative_errors
from tests.cases import Inputs, gradients, in_float64, project, with_batch


def compiled_gradients(bounded: BoundedModule, compiled: object, inputs: Inputs) -> dict[str, Tensor | None]:
    bounded.zero_grad()
    torch.manual_seed(7)
    project(compiled(inputs)).backward()  # type: ignore[operator]
    return {name: None if p.grad is None else p.grad.clone() for name, p in bounded.named_parameters()}


def bounded_without_dropout(name: str, **options: object) -> tuple[BoundedModule, Inputs]:
    model, inputs = in_float64(name, depth=4)
    for module in model.modules():  # Inductor draws other masks than eager
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    return lbi_compile.transform(model, inputs, regions=4, r=4, **options), inputs  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _count_anew() -> None:
    counters.clear()


@pytest.mark.parametrize(
    ("name", "options", "dynamic"),
    [
        pytest.param("mlp", {}, True, marks=pytest.mark.slow),
        # fixed at first, dynamic from the second size on
        pytest.param("mlp", {}, None, marks=pytest.mark.slow),
        pytest.param("transformer", {"interface": "token", "cell": "gru"}, None, marks=pytest.mark.slow),
        pytest.param("transformer", {"interface": "chunked"}, None, marks=pytest.mark.slow),
    ],
)
def test_lbi_backend_has_no_breaks_and_no_recompiles(name: str, options: dict[str, str], dynamic: bool | None) -> None:
    bounded, inputs = bounded_without_dropout(name, **options)
    compiled = torch.compile(bounded, backend="lbi", fullgraph=True, dynamic=dynamic)
    expected = {}
    for batch in (3, 4, 5, 7):
        data = with_batch(inputs, batch)
        expected[batch] = gradients(bounded, data, "autograd")
    graphs = []
    for batch in (3, 4, 5, 7):
        got = compiled_gradients(bounded, compiled, with_batch(inputs, batch))
        graphs.append(counters["stats"]["unique_graphs"])
        assert max(relative_errors(got, expected[batch]).values()) <= 1e-10
    assert not counters["graph_break"]
    assert len(set(graphs if dynamic else graphs[1:])) == 1
    assert last_record().status == "scan"
    assert last_record().jacobians == (2 if options.get("interface") == "token" else 3)


@pytest.mark.slow
def test_plain_inductor_is_exact_as_a_chain() -> None:
    bounded, inputs = bounded_without_dropout("mlp")
    expected = gradients(bounded, inputs, "autograd")
    got = compiled_gradients(bounded, torch.compile(bounded, fullgraph=True), inputs)
    assert max(relative_errors(got, expected).values()) <= 1e-10
    assert not counters["graph_break"]


def test_the_eager_scan_compiles_once_for_all_batch_sizes() -> None:
    bounded, inputs = bounded_without_dropout("mlp")
    for batch in (3, 4, 9):
        gradients(bounded, with_batch(inputs, batch), "scan")
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_mode_that_was_never_run_cannot_be_compiled_blindly() -> None:
    bounded, inputs = bounded_without_dropout("mlp")
    bounded.eval()
    compiled = torch.compile(bounded, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="call the bounded model once"):
        compiled(inputs)
    torch._dynamo.reset()
    expected = bounded(inputs)
    assert torch.equal(torch.compile(bounded, backend="eager", fullgraph=True)(inputs), expected)


@pytest.mark.slow
def test_marks_do_not_stay_on_the_callers_tensor() -> None:
    bounded, inputs = bounded_without_dropout("mlp")
    assert isinstance(inputs, Tensor)
    before = dict(vars(inputs))
    expected = gradients(bounded, inputs, "scan")
    assert dict(vars(inputs)) == before
    got = compiled_gradients(bounded, torch.compile(bounded, backend="aot_eager", fullgraph=True), inputs)
    assert max(relative_errors(got, expected).values()) <= 1e-10


@pytest.mark.slow
def test_parts_of_one_position_are_put_together_whole() -> None:
    """Parts of a larger tensor of first dimension 1 keep its stride there, and `aten._stack` copies as many numbers."""
    bounded, inputs = bounded_without_dropout("transformer", interface="token")
    one = inputs[:1, :1]  # type: ignore[index]
    expected = gradients(bounded, one, "autograd")
    compiled = torch.compile(bounded, backend="lbi", fullgraph=True, dynamic=False)
    for _ in range(20):  # numbers too many go over whatever lies behind
        got = compiled_gradients(bounded, compiled, one)
        assert max(relative_errors(got, expected).values()) <= 1e-10
