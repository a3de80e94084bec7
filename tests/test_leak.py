"""Nothing from later positions reaches earlier outputs, bit for bit, and whoever lets it through is refused."""

from __future__ import annotations

import pytest
import torch

import lbi_compile
from lbi_compile.errors import FutureLeakError
from tests.models import CausalTransformer

LENGTH = 32
OPTIONS = [
    {"interface": "chunked"},
    {"interface": "token", "cell": "gru"},
    pytest.param({"interface": "token", "cell": "linear"}, marks=pytest.mark.slow),
]


def make(dropout: float = 0.1, **options: str) -> tuple[lbi_compile.BoundedModule, torch.Tensor]:
    torch.manual_seed(0)
    model = CausalTransformer(length=LENGTH, width=32, depth=4, heads=4, dropout=dropout)
    data = torch.tensor(list(b"def leak(x):\n    return x + 1\n\n\nclass A:\n    pass\n")).unsqueeze(0).repeat(2, 1)
    tokens = torch.stack([data[0, :LENGTH], data[0, 8 : 8 + LENGTH]])
    return lbi_compile.transform(model, tokens, regions=4, r=16, **options), tokens


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_later_bytes_change_no_earlier_logit(options: dict[str, str], training: bool) -> None:
    bounded, tokens = make(**options)
    bounded.train(training)
    torch.manual_seed(1)
    expected = bounded(tokens)
    for t in (1, 6, 7, 8, 15, 25, LENGTH - 1):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 101) % 256
        torch.manual_seed(1)
        got = bounded(changed)
        assert torch.equal(got[:, :t], expected[:, :t])
        assert not torch.equal(got[:, t:], expected[:, t:])


@pytest.mark.parametrize("options", OPTIONS)
def test_logits_of_a_prefix_are_the_prefix_of_the_logits(options: dict[str, str]) -> None:
    bounded, tokens = make(**options)
    bounded.double().eval()
    expected = bounded(tokens)
    for t in (2, 6, 7, 8, 20, LENGTH - 1):
        # equal but for the blocking of matrix products, which depends on the number of rows
        torch.testing.assert_close(bounded(tokens[:, :t]), expected[:, :t], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_latents_do_carry_the_past(options: dict[str, str]) -> None:
    bounded, tokens = make(0.0, **options)
    bounded.eval()
    expected = bounded(tokens)
    with torch.no_grad():
        for name, parameter in bounded.lbi.named_parameters():
            if name.startswith("decoders"):
                parameter.zero_()
    assert not torch.allclose(bounded(tokens), expected, atol=1e-4)


def test_a_pooled_latent_on_a_causal_model_is_refused_unless_allowed() -> None:
    with pytest.raises(FutureLeakError, match=r"pooled[\s\S]*causal[\s\S]*allow_leak"):
        make(interface="pooled")
    torch.manual_seed(0)
    model = CausalTransformer(length=LENGTH, width=32, depth=4, heads=4)
    tokens = torch.randint(0, 256, (2, LENGTH))
    bounded = lbi_compile.transform(model, tokens, regions=4, interface="pooled", allow_leak=True)
    report = lbi_compile.verify(bounded, tokens, engine="chain")
    assert report.leak is True
    assert not report.ok
    assert "future leak" in str(report)
