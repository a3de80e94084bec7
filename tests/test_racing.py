"""The race of ``backward="auto"`` over the steps of a bounded model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import lbi_compile
from lbi_compile import BoundedModule, EngineError, auto, racing
from lbi_compile.verify import relative_errors
from tests.cases import Inputs, gradients, in_float64, project


@pytest.fixture
def close(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every engine is worth a try, nothing is remembered, and times may decide."""
    monkeypatch.setattr(auto, "COMPILED_SLACK", 100.0)
    racing._decisions.cache_clear()
    torch.use_deterministic_algorithms(False)
    yield
    racing._decisions.cache_clear()


def model() -> tuple[BoundedModule, Inputs]:
    net, inputs = in_float64("mlp", depth=4)
    return lbi_compile.transform(net, inputs, regions=3, r=4, interface="pooled", batch_regions=False), inputs


def step(bounded: BoundedModule, inputs: Inputs) -> dict[str, Tensor | None]:
    bounded.zero_grad()
    torch.manual_seed(7)
    project(bounded(inputs)).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in bounded.named_parameters()}


def race(bounded: BoundedModule) -> auto.Race:
    (found,) = bounded._racer._races.values()
    return found


@pytest.mark.usefixtures("close")
def test_engines_take_turns_until_times_decide() -> None:
    bounded, inputs = model()
    expected = gradients(bounded, inputs, "autograd")
    ran = []
    for _ in range(2 * (auto.ROUNDS + 1)):
        assert max(relative_errors(step(bounded, inputs), expected).values()) <= 1e-10
        ran.append(bounded.engine.name)
    assert sorted(set(ran)) == ["autograd", "scan"]
    assert ran.count("scan") == auto.ROUNDS + 1
    decision = race(bounded).decision
    assert decision is not None
    assert set(decision.seconds) == {"autograd", "scan"}
    step(bounded, inputs)
    assert bounded.engine.name == decision.engine
    assert not any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in bounded.parameters())
    again, same = model()  # remembered for a model with the same plan
    step(again, same)
    assert race(again).decision == decision


@pytest.mark.usefixtures("close")
def test_a_forward_without_a_backward_is_a_miss_of_its_own_race() -> None:
    bounded, inputs = model()
    for _ in range(auto.MOST_MISSES + 1):
        bounded(inputs)
        # such as the call before torch.compile(bounded): hooks would make it copy every gradient
        assert not any(p._backward_hooks for p in bounded.parameters())
    decision = race(bounded).decision
    assert decision is not None
    assert "gave nothing to time" in decision.why
    assert not decision.seconds


@pytest.mark.usefixtures("close")
def test_an_engine_that_cannot_run_drops_out(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded, inputs = model()

    def refuse(*_: object) -> None:
        raise EngineError("no scan today", expected="another day", do="wait")

    monkeypatch.setattr(bounded, "_scan", refuse)
    for _ in range(3):
        assert all(gradient is not None for gradient in step(bounded, inputs).values())
        assert bounded.engine.name == "autograd"
    assert "scan cannot run: no scan today" in bounded.engine.why


def test_deterministic_algorithms_leave_it_to_the_cost_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "COMPILED_SLACK", 100.0)
    racing._decisions.cache_clear()
    bounded, inputs = model()
    step(bounded, inputs)
    assert "deterministic" in bounded.engine.why
