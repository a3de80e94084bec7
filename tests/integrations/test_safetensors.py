"""Parameters in safetensors: files without code, tied weights once."""

from __future__ import annotations

import pytest
import torch

from lbi_compile import transform
from lbi_compile.demo_model import CausalTransformer

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")


def test_parameters_of_a_model_with_tied_weights(tmp_path):
    def made(seed: int):
        torch.manual_seed(seed)
        model = CausalTransformer(vocabulary=16, length=8, width=8, depth=2, heads=2, tied=True)
        return transform(model, torch.randint(16, (2, 8)), regions=2, r=4, backward="autograd")

    bounded, other = made(1), made(2)
    safetensors.save_model(bounded, tmp_path / "model.safetensors")
    missing, unexpected = safetensors.load_model(other, tmp_path / "model.safetensors")
    assert not missing
    assert not unexpected
    tokens = torch.randint(16, (3, 8))
    assert torch.equal(other(tokens), bounded(tokens))
    # the original model reads its part of the file
    stored = safetensors.load_file(tmp_path / "model.safetensors")
    assert {name for name in stored if name.startswith("lbi.")}
    assert {name for name in stored if not name.startswith("lbi.")} < set(other.source.state_dict())
