"""The inference form of a bounded model in ONNX, run by onnxruntime."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

from lbi_compile import transform
from lbi_compile.demo_model import CausalTransformer

pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxscript", reason="needs onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnx(tmp_path):
    model = CausalTransformer(vocabulary=16, length=16, width=8, depth=3, heads=2)
    tokens = torch.randint(16, (3, 8))
    bounded = transform(model, tokens, regions=3, r=4).eval()
    sizes = {"tokens": {0: Dim("batch"), 1: Dim("positions", max=16)}}
    with torch.no_grad():
        bounded(tokens)
        torch.onnx.export(bounded, (tokens,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=sizes, verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        assert [given.name for given in session.get_inputs()] == ["tokens"]
        for batch, length in ((3, 8), (2, 11)):
            tokens = torch.randint(16, (batch, length))
            (found,) = session.run(None, {"tokens": tokens.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), bounded(tokens), rtol=1e-5, atol=1e-5)
