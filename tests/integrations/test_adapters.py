"""Adapters of peft and fake quantisation of torchao: put in before transform, refused after it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lbi_compile import StaleCaptureError, transform
from tests.models import ResidualMLP
from tests.small_models import gradients, same

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def adapted(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft", reason="needs peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["branch.0", "branch.3"]))


def model_and_input() -> tuple[ResidualMLP, Tensor]:
    return ResidualMLP(5, width=8, depth=3, classes=3).double(), torch.randn(5, 5, dtype=torch.float64)


def test_lora_before_transform():
    model, x = model_and_input()
    frozen = [name for name, _ in model.named_parameters()]
    model = adapted(model).double()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)  # zeros, which hide lora_A from the gradient
    bounded = transform(model, x, regions=3, r=4)
    found = {}
    for engine in ("autograd", "chain", "scan"):
        with bounded.with_engine(engine):
            found[engine] = gradients(bounded, bounded(x))
    taught = {name for name, grad in found["autograd"].items() if grad is not None}
    assert {name.split(".")[0] for name in taught if "lora_" not in name} == {"lbi"}
    assert sum("lora_" in name for name in taught) == 12
    assert len(frozen) == sum(p is None for p in found["autograd"].values())
    assert same(found["chain"], found["autograd"])
    for name in taught:
        torch.testing.assert_close(found["scan"][name], found["autograd"][name], rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        whole = transform(model, x, regions=3, interface="identity")
        assert torch.equal(whole(x), model(x))


@pytest.mark.parametrize("on_the_bounded_model", [False, True])
def test_lora_after_transform(on_the_bounded_model):
    model, x = model_and_input()
    bounded = transform(model, x, regions=3, r=4)
    changed = adapted(bounded if on_the_bounded_model else model)
    with pytest.raises(StaleCaptureError, match=r"blocks\.0") as refused:
        (changed if on_the_bounded_model else bounded)(x)
    assert "then transform" in refused.value.do


def test_quantisation_aware_training_by_torchao():
    quantisation = pytest.importorskip("torchao.quantization", reason="needs torchao")
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model, x = ResidualMLP(32, width=32, depth=3, classes=3), torch.randn(5, 32)
    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantisation.quantize_(model, QATConfig(activation_config=activations, weight_config=weights, step="prepare"))
    whole = transform(model, x, regions=3, interface="identity")
    out = model(x)
    assert torch.equal(whole(x), out)
    expected = gradients(model, out)
    assert same(gradients(model, whole(x)), expected)
    # its rounding has a gradient of its own, which no exporter keeps: modules stay as they are
    assert whole.engine.name == "chain"
