"""The end-to-end check against code that is not ours: nothing bounded, so the original model is the oracle."""

from __future__ import annotations

import copy

import pytest
import torch

import lbi_compile
from lbi_compile.verify import relative_errors
from tests.cases import MODELS, call, gradients, in_float64, project
from tests.models import CausalTransformer, ResidualMLP


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{"regions": 1}, {"regions": 3, "interface": "identity"}])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_bit_equal_to_the_model(name: str, options: dict[str, object], training: bool) -> None:
    model, inputs = in_float64(name)
    model.train(training)
    bounded = lbi_compile.transform(model, inputs, **options)  # type: ignore[arg-type]
    torch.manual_seed(7)
    expected = call(model, inputs)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    assert torch.equal(call(bounded, inputs), expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert not list(bounded.lbi.parameters())


def test_identity_scan_equals_the_original_models_gradients() -> None:
    torch.manual_seed(0)
    model = ResidualMLP(10, width=32, depth=4, classes=5, dropout=0.1).double()
    original, x = copy.deepcopy(model), torch.randn(3, 10, dtype=torch.float64)
    bounded = lbi_compile.transform(model, x, regions=4, interface="identity")
    got = gradients(bounded, x, "scan")
    assert bounded.engine.jacobians == 3
    torch.manual_seed(7)
    project(original(x)).backward()
    expected = {name: p.grad for name, p in original.named_parameters()}
    assert max(relative_errors(got, expected).values()) <= 1e-10


@pytest.mark.slow
def test_identity_scan_through_attention_equals_the_original_models_gradients() -> None:
    torch.manual_seed(0)
    model = CausalTransformer(vocabulary=16, length=8, width=8, depth=3, heads=2, dropout=0.1).double()
    original, tokens = copy.deepcopy(model), torch.randint(0, 16, (3, 4))
    # all positions of a sample cross together: R = T * D = 32, so the length has to be a fixed one
    bounded = lbi_compile.transform(model, tokens, regions=3, interface="identity")
    with bounded.with_engine("scan"):
        got = gradients(bounded, tokens, "scan")
    torch.manual_seed(7)
    project(original(tokens)).backward()
    expected = {name: p.grad for name, p in original.named_parameters()}
    assert max(relative_errors(got, expected).values()) <= 1e-10
