"""Engines: which one runs, what its backward calls, and what happens where it cannot run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lbi_compile
from lbi_compile import engines
from lbi_compile.errors import DoubleBackwardError, EngineError, OptionError
from lbi_compile.kernels import reference
from lbi_compile.verify import relative_errors
from tests.cases import call, gradients, in_float64, project
from tests.models import ResidualMLP

SCAN = torch.ops.lbi.suffix_scan.default


class CountScans(TorchDispatchMode):
    """Counts calls of the scan; ``zeros`` puts zeros in place of what it gives."""

    def __init__(self, *, zeros: bool = False) -> None:
        super().__init__()
        self.zeros, self.count, self.shapes = zeros, 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is SCAN:
            self.count += 1
            self.shapes.append(tuple(args[0].shape))
            return torch.zeros_like(out) if self.zeros else out
        return out


@pytest.mark.parametrize(("regions", "interface"), [(3, "pooled"), pytest.param(4, "pooled", marks=pytest.mark.slow)])
def test_one_scan_in_the_backward_and_it_matters(regions: int, interface: str) -> None:
    model, inputs = in_float64("mlp", depth=4)
    bounded = lbi_compile.transform(model, inputs, regions=regions, r=4, interface=interface, batch_regions=False)
    expected = gradients(bounded, inputs, "autograd")
    for engine, zeros, count in (("scan", False, 1), ("scan", True, 1), ("chain", False, 0), ("autograd", False, 0)):
        with bounded.with_engine(engine):
            bounded.zero_grad()
            torch.manual_seed(7)
            loss = project(call(bounded, inputs))
        with CountScans(zeros=zeros) as mode:
            loss.backward()
        assert mode.count == count
        assert mode.shapes == [(regions - 1, 3, 4, 4)] * count
        got = {name: p.grad for name, p in bounded.named_parameters()}
        assert (max(relative_errors(got, expected).values()) > 1e-2) == zeros


def wrong_order(J: Tensor, last: Tensor, b: Tensor | None) -> Tensor:
    return reference.suffix_scan(J.flip(0), last, b)


def without_b(J: Tensor, last: Tensor, b: Tensor | None) -> Tensor:
    return reference.suffix_scan(J, last, None)


def not_transposed(J: Tensor, last: Tensor, b: Tensor | None) -> Tensor:
    return reference.suffix_scan(J.transpose(-1, -2), last, b)


@pytest.mark.parametrize(
    "wrongs",
    [(wrong_order,), pytest.param((without_b, not_transposed), marks=pytest.mark.slow)],
    ids=lambda wrongs: " ".join(wrong.__name__ for wrong in wrongs),
)
def test_verify_catches_a_wrong_scan(wrongs: tuple[Callable[..., Tensor], ...]) -> None:
    model, inputs = in_float64("mlp", depth=4)
    # one by one: what is batched does not matter here, and compiles longer
    bounded = lbi_compile.transform(model, inputs, regions=4, r=4, backward="scan", batch_regions=False)
    expected = gradients(bounded, inputs, "autograd")
    for wrong in wrongs:
        library = torch.library.Library("lbi", "IMPL")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a kernel that is replaced
                library.impl("suffix_scan", wrong, "CPU")
            assert max(relative_errors(gradients(bounded, inputs, "scan"), expected).values()) > 1e-3, wrong.__name__
            report = lbi_compile.verify(bounded, inputs)
        finally:
            library._destroy()
        assert not report.ok, wrong.__name__
        assert [check.name for check in report.checks if check.ok is False] == ["gradients"]
    assert max(relative_errors(gradients(bounded, inputs, "scan"), expected).values()) <= 1e-10
    assert lbi_compile.verify(bounded, inputs).ok


def test_a_dispatch_mode_around_the_forward_refuses_the_scan() -> None:
    model, inputs = in_float64("mlp", depth=4)
    bounded = lbi_compile.transform(model, inputs, regions=4, r=4)
    with CountScans(), pytest.raises(EngineError, match=r"TorchDispatchMode[\s\S]*chain"):
        gradients(bounded, inputs, "scan")
    with CountScans():
        gradients(bounded, inputs, "chain")


def test_engine_names_what_ran_and_why() -> None:
    model, inputs = in_float64("mlp", depth=4)
    bounded = lbi_compile.transform(model, inputs, regions=3, r=4, batch_regions=False)
    assert bounded.engine.name == "none"
    call(bounded, inputs)
    assert (bounded.engine.name, bounded.backward) == ("autograd", "auto")
    assert "by the cost model, which predicts" in str(bounded.engine)
    with torch.no_grad():
        call(bounded, inputs)
    assert bounded.engine.name == "none"
    with bounded.with_engine("scan"):
        call(bounded, inputs)
    assert (bounded.engine.name, bounded.engine.why) == ("scan", "asked for")
    assert bounded.backward == "auto"
    with pytest.raises(OptionError, match="backward='fast'"), bounded.with_engine("fast"):
        pass
    assert bounded.backward == "auto"


@pytest.mark.parametrize("boundaries", [0, 1])
def test_without_two_latents_there_is_nothing_to_scan(boundaries: int) -> None:
    assert engines.choose("scan", boundaries=boundaries).name == "scan"
    assert "nothing to scan" in engines.choose("scan", boundaries=boundaries).why


def test_scan_over_too_wide_a_separator_is_refused() -> None:
    torch.manual_seed(0)
    model, inputs = ResidualMLP(10, width=80, depth=4, classes=5), torch.randn(3, 10)
    bounded = lbi_compile.transform(model, inputs, regions=4, interface="identity", backward="scan")
    before = {name: p.detach().clone() for name, p in bounded.named_parameters()}
    with pytest.raises(EngineError, match=r"80[\s\S]*expected[\s\S]*64[\s\S]*what to do"):
        bounded(inputs).sum().backward()
    assert all(torch.equal(before[name], p) for name, p in bounded.named_parameters())
    with bounded.with_engine("chain"):
        bounded(inputs).sum().backward()
    assert all(p.grad is not None for p in bounded.parameters())


@pytest.mark.parametrize(
    "frozen", [pytest.param(("project", "blocks.0", "blocks.1"), marks=pytest.mark.slow), ("blocks.2",)]
)
def test_frozen_parameters_stay_without_gradient(frozen: tuple[str, ...]) -> None:
    model, inputs = in_float64("mlp", depth=4)
    bounded = lbi_compile.transform(model, inputs, regions=4, r=4, batch_regions=False)
    known = dict(bounded.named_parameters())
    chosen = [name for name in known if name.startswith(frozen) or name.startswith("lbi.encode_canvas")]
    assert len(chosen) >= 5, sorted(known)
    for name in chosen:
        known[name].requires_grad_(False)
    expected = gradients(bounded, inputs, "autograd")
    got = gradients(bounded, inputs, "scan")
    assert [name for name, g in got.items() if g is None] == [n for n, g in expected.items() if g is None]
    assert max(relative_errors(got, expected).values()) <= 1e-10
    for name in chosen:
        known[name].requires_grad_(True)  # thawed again: no stale graph may run
    thawed = gradients(bounded, inputs, "scan")
    assert all(g is not None for g in thawed.values())
    assert max(relative_errors(thawed, gradients(bounded, inputs, "autograd")).values()) <= 1e-10


def test_random_state_and_outputs_equal_eager_bit_for_bit() -> None:
    model, inputs = in_float64("transformer", depth=3)
    bounded = lbi_compile.transform(model, inputs, regions=3, r=4, interface="token", cell="gru", batch_regions=False)
    found = {}
    for engine in ("autograd", "chain", "scan"):
        with bounded.with_engine(engine):
            torch.manual_seed(7)
            found[engine] = call(bounded, inputs), torch.get_rng_state()
    for engine in ("chain", "scan"):
        assert torch.equal(found[engine][0], found["autograd"][0])
        assert torch.equal(found[engine][1], found["autograd"][1])


def test_retain_graph_and_two_forwards_before_backward_with_changing_batch() -> None:
    model, inputs = in_float64("mlp", depth=4)
    bounded = lbi_compile.transform(model, inputs, regions=3, r=4, backward="scan")
    assert isinstance(inputs, Tensor)
    small, large = inputs, torch.cat([inputs, inputs * 2])

    def run(engine: str) -> dict[str, Tensor | None]:
        bounded.zero_grad()
        with bounded.with_engine(engine):
            torch.manual_seed(7)
            first, second = project(call(bounded, small)), project(call(bounded, large))
        second.backward(retain_graph=True)
        first.backward()
        second.backward()
        return {name: p.grad.clone() for name, p in bounded.named_parameters() if p.grad is not None}

    assert max(relative_errors(run("scan"), run("autograd")).values()) <= 1e-10
    run("scan")
    assert (bounded.engine.rows, bounded.engine.parts) == (0, 1)  # all of every Jacobian at once


@pytest.mark.parametrize(
    ("request_", "boundaries", "name", "why"),
    [
        ("auto", 0, "autograd", "auto: nothing crosses between regions"),
        ("auto", 1, "autograd", "auto: one latent crosses, so there is no Jacobian and nothing to scan"),
        ("auto", 2, "auto", "at the first training steps, by the cost model, and by their time where that is close"),
        ("scan", 1, "scan", "asked for; 1 latent(s) cross, so there is no Jacobian and nothing to scan"),
        ("scan", 2, "scan", "asked for"),
        ("chain", 0, "chain", "asked for"),
        ("autograd", 5, "autograd", "asked for"),
    ],
)
def test_what_is_settled_beforehand(request_: str, boundaries: int, name: str, why: str) -> None:
    found = engines.choose(request_, boundaries=boundaries)
    assert (found.name, found.why) == (name, why)


def test_an_engine_tells_what_is_out_of_the_ordinary_and_nothing_else() -> None:
    assert str(engines.Engine("scan", "asked for", 3, batched=4)) == "scan (asked for)"
    assert "unrolled over r: a, b" in str(engines.Engine("scan", "", unrolled=(("a", "x"), ("b", "y"))))
    assert "2 parts of the indices" in str(engines.Engine("scan", "", parts=2))
    assert "1 row(s) of a Jacobian at a time" in str(engines.Engine("scan", "", rows=1))
    assert "row(s)" not in str(engines.Engine("scan", "", rows=0))
    assert str(engines.Engine("scan", "", over=("this", "that"))).endswith("jacobian_bytes: this; that")
    assert str(engines.Engine("scan", "", unbatched=(("a", "x"),))).endswith("not batched over regions: a")


def test_requests_are_engines_or_auto() -> None:
    assert [engines.check_request(name) for name in engines.REQUESTS] == ["auto", "autograd", "chain", "scan"]
    with pytest.raises(OptionError, match="backward='fast'"):
        engines.check_request("fast")


def test_an_output_of_the_scan_is_differentiated_once() -> None:
    x = torch.ones(2, requires_grad=True)
    y = engines.once(x * x)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    # a parameter that a model returns belongs to others too; what has no gradient has no hook
    assert engines.once(x) is x
    torch.autograd.grad((x * x).sum(), x, create_graph=True)
    assert engines.once(3) == 3
    assert not engines.once(torch.ones(2)).requires_grad
