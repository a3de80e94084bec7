"""From a model to its local rule: the cut, what the plan keeps, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lbi_compile import SID, InterfaceError, OptionError, Plan, plan, transform
from lbi_compile.errors import PlanError
from tests.credit_models import problem


def test_refusals():
    model, x, y = problem()
    for options in ({"interface": "token"}, {"backward": "scan"}, {"readout": "sum"}, {"cell": "gru"}):
        with pytest.raises(OptionError, match="with credit='sid'"):
            transform(model, x, regions=2, credit="sid", **options)
    with pytest.raises(OptionError, match="exact"):
        transform(model, x, regions=2, credit="backprop")
    with pytest.raises(OptionError, match="one for each region"):
        transform(model, x, regions=2, credit=SID(alpha=(0.5, 0.4, 0.3)))
    with pytest.raises(OptionError, match="credit='exact'"):
        transform(model, x, regions=2).local_loss(x, target=y)
    with pytest.raises(OptionError, match="hbll"):
        transform(model, x, regions=2, credit="sid").forward_path(x, hops=1)


class Skips(nn.Module):
    """A net with a long skip: two values cross its middle."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers[:3]:
            x = layer(x).relu()
        h = x
        for layer in self.layers[3:]:
            h = layer(h).relu() * x
        return self.head(h)


@pytest.mark.parametrize("credit", ["sid", "hbll"])
def test_boundaries_of_several_lanes_are_refused(credit):
    with pytest.raises(InterfaceError, match="one value at every boundary"):
        transform(Skips(), torch.randn(4, 6), regions=["layers.4", "layers.5"], credit=credit)


def test_plans_know_their_credit():
    model, x, _ = problem()
    exact, *local = (plan(model, x, regions=2, r=4, credit=credit) for credit in ("exact", "sid", "hbll"))
    assert [made.credit for made in (exact, *local)] == ["exact", "sid", "hbll"]
    assert len({made.hash for made in (exact, *local)}) == 3
    bounded = transform(model, x, regions=2, r=4, credit="sid")
    assert bounded.plan.hash == local[0].hash
    assert Plan.from_json(bounded.plan.to_json()) == bounded.plan
    # a local plan holds a cut for other local rules, but no interface for exact credit
    assert transform(model, x, regions=local[0], credit="hbll").plan.hash == local[1].hash
    for make in (plan, transform):
        with pytest.raises(PlanError, match="made for credit='sid' with credit='exact'"):
            make(model, x, regions=local[0])


def test_same_cut_as_exact_credit():
    model, x, y = problem(8)
    exact = transform(model, x, regions=3, r=4)
    bounded = transform(model, x, regions=exact.plan, credit="sid")
    assert (
        bounded.plan.boundaries == exact.plan.boundaries == transform(model, x, regions=3, credit="sid").plan.boundaries
    )
    assert bounded.local_loss(x, target=y).isfinite()
