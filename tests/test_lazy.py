"""Transform without example inputs: from the model's own examples, else at the first call."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import lbi_compile
from lbi_compile import NotBuiltError, TooManyRegionsError, transform
from tests import cases
from tests.models import ResidualMLP
from tests.untouched import differences, snapshot


def mlp() -> ResidualMLP:
    return ResidualMLP(5, width=8, depth=4, classes=3)


class Lightning(ResidualMLP):
    """As Lightning modules do, it brings an example."""

    def __init__(self) -> None:
        super().__init__(5, width=8, depth=4, classes=3)
        self.example_input_array = torch.randn(4, 5)


def test_nothing_is_made_before_the_first_call():
    model = mlp()
    before = snapshot(model)
    bounded = transform(model, regions=3, r=4)
    assert differences(before, model) == []
    assert bounded.programs == ()
    assert bounded.engine.name == "none"
    with pytest.raises(NotBuiltError, match="optimizer"):
        torch.optim.SGD(bounded.parameters(), lr=0.1)
    with pytest.raises(NotBuiltError, match="optimizer"):
        torch.optim.Adam([{"params": bounded.lbi.parameters()}])
    torch.optim.SGD(model.parameters(), lr=0.1)  # the model itself is as it was


def test_the_first_call_builds_what_example_inputs_would():
    model, x = mlp(), torch.randn(6, 5)
    lazy, eager = transform(model, regions=3, r=4), transform(copy.deepcopy(model), x, regions=3, r=4)
    out = lazy(x)
    assert lazy.plan.hash == eager.plan.hash
    assert torch.equal(out, eager(x))
    assert lazy.state_dict().keys() == eager.state_dict().keys()
    assert all(torch.equal(value, eager.state_dict()[key]) for key, value in lazy.state_dict().items())
    out.sum().backward()
    assert all(p.grad is not None for p in lazy.parameters())
    assert lazy(torch.randn(2, 5)).shape == (2, 3)
    assert len(lazy.programs) == 1
    before = [p.detach().clone() for p in lazy.parameters()]
    torch.optim.SGD(lazy.parameters(), lr=0.1).step()
    assert not any(torch.equal(p, q) for p, q in zip(lazy.parameters(), before, strict=True))


def test_forward_regions_and_verify_build_too():
    model, x = mlp(), torch.randn(6, 5)
    bounded = transform(model, regions=3, r=4)
    out, taps = bounded.forward_regions(x)
    assert torch.equal(out, bounded(x))
    assert len(taps.h) == 3
    other = transform(model, regions=3, r=4)
    assert lbi_compile.verify(other, x).ok
    assert other.plan.hash == bounded.plan.hash


def test_a_first_call_that_fails_leaves_it_as_it_was():
    model, x = mlp(), torch.randn(6, 5)
    bounded = transform(model, regions=9, r=4)
    for _ in range(2):
        with pytest.raises(TooManyRegionsError, match="at most 4 regions"):
            bounded(x)
    with pytest.raises(NotBuiltError):
        _ = bounded.plan
    with pytest.raises(NotBuiltError):
        torch.optim.SGD(bounded.parameters(), lr=0.1)


def test_a_batch_of_one_builds_for_every_batch():
    bounded = transform(mlp(), regions=3, r=4)
    assert bounded(torch.randn(1, 5)).shape == (1, 3)
    assert bounded(torch.randn(7, 5)).shape == (7, 3)
    assert len(bounded.programs) == 1


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double()])
def test_copies_and_moves_before_the_first_call(how):
    bounded = transform(mlp(), regions=3, r=4)
    other = how(bounded)
    with pytest.raises(NotBuiltError, match="optimizer"):
        torch.optim.SGD(other.parameters(), lr=0.1)
    dtype = other.stem.weight.dtype
    assert other(torch.randn(6, 5, dtype=dtype)).shape == (6, 3)
    assert {p.dtype for p in other.parameters()} == {dtype}
    torch.optim.SGD(other.parameters(), lr=0.1)


def test_weights_load_before_the_first_call():
    model, x, source = mlp(), torch.randn(6, 5), mlp()
    bounded = transform(model, regions=1)
    bounded.load_state_dict(source.state_dict(), strict=False)
    assert torch.equal(bounded(x), source(x))


def test_example_input_array():
    model = Lightning()
    bounded = transform(model, regions=3, r=4)
    assert bounded.plan.inputs == (("x", (4, 5)),)
    assert bounded.plan.hash == lbi_compile.plan(model, regions=3, r=4).hash
    torch.optim.SGD(bounded.parameters(), lr=0.1)
    assert bounded(torch.randn(6, 5)).shape == (6, 3)
    assert transform(model, torch.randn(2, 5), regions=3, r=4).plan.inputs == (("x", (2, 5)),)  # what is given wins
    assert lbi_compile.verify(bounded).ok


def test_example_input_array_with_several_arguments():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.example_input_array = (torch.randn(4, 5), torch.randn(4, 5))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.inner(x - y)

    bounded = transform(Pair(), regions=3, r=4)
    assert [name for name, _ in bounded.plan.inputs] == ["x", "y"]


def test_dummy_inputs_of_transformers():
    model, _ = cases.gpt2()
    before = snapshot(model)
    bounded = transform(model, regions=3, r=4)
    assert differences(before, model) == []
    assert [name for name, _ in bounded.plan.inputs] == ["input_ids"]
    assert bounded.plan.dynamic == ("batch", "sequence")
    torch.optim.AdamW(bounded.parameters())
    tokens = torch.randint(32, (2, 11))
    assert bounded(tokens).logits.shape == (2, 11, 32)
