"""Targets of local credit rules are those of ``cross_entropy``; what is no classification is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lbi_compile import OptionError, TargetError
from lbi_compile.credit.losses import forward_divergence
from lbi_compile.credit.targets import TargetReader
from tests.credit_models import CLASSES, bound


@pytest.mark.parametrize("weight", [None, (1.0, 2.0, 0.5, 3.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["classes", "ignored", "probabilities"])
def test_targets_are_those_of_cross_entropy(kind, smoothing, weight):
    logits = torch.randn(6, CLASSES, 3).double().requires_grad_()
    y = torch.randint(0, CLASSES, (6, 3))
    if kind == "ignored":
        y[::2, 1:] = -100
    target = torch.randn(6, CLASSES, 3).double().softmax(1) if kind == "probabilities" else y
    own = None if weight is None else torch.tensor(weight).double()
    expected = F.cross_entropy(logits, target, weight=own, label_smoothing=smoothing)
    reader = TargetReader(CLASSES, weight=weight, ignore_index=-100, label_smoothing=smoothing)
    targets = reader(target, shape=logits.shape, class_dim=1, fold=lambda v: v.movedim(1, -1), like=logits)
    got = targets.mean(forward_divergence(logits.movedim(1, -1).reshape(-1, CLASSES), None, targets, 1.0))
    if not smoothing and kind != "probabilities":  # a divergence is the cross entropy less that of the target
        torch.testing.assert_close(got, expected)
    gradients_of = [torch.autograd.grad(loss, logits)[0] for loss in (got, expected)]
    torch.testing.assert_close(*gradients_of, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "target",
    [
        torch.randn(6),
        torch.randn(6, CLASSES),
        torch.ones(6, CLASSES),
        torch.zeros(6, 1).long(),
        torch.ones(6) > 0,
        [0] * 6,
    ],
)
@pytest.mark.parametrize("credit", ["sid", "hbll"])
def test_regression_is_refused(credit, target):
    bounded, x, _ = bound(credit)
    with pytest.raises(TargetError, match="classification"):
        bounded.local_loss(x, target=target)


def test_options_that_do_not_exist():
    for options in ({"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"weight": (1.0, 2.0)}):
        with pytest.raises(OptionError):
            TargetReader(CLASSES, **{"weight": None, "ignore_index": -100, "label_smoothing": 0.0, **options})
